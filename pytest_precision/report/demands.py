"""What a run must have done to be green: every required lane, and something at all where the matrix was asked for."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from pytest_precision.report.row import Row
from pytest_precision.settings import settings_of


def unmet(config: pytest.Config, rows: Iterable[Row]) -> list[str]:
    """Return one line for each demand that the run did not meet; skipped tests and crashes meet none."""
    settings = settings_of(config)
    ran = [row for row in rows if row.ran]
    lines = []
    if settings.matrix and not ran:
        lines.append("--precision-matrix ran no test in any lane, so it shows nothing")
    require = settings.require
    for mode in require.modes() if require is not None else ():
        for accelerator in require.accelerators(mode) if require is not None else ():
            if not any(row.mode == mode and accelerator in (None, row.accelerator) for row in ran):
                lane = mode if accelerator is None else f"{mode}@{accelerator}"
                lines.append(f"required lane {lane} ran in no test (--precision-require)")
    return lines
