"""``--precision-shrink``: a failed check is followed by the search for the smallest input that fails as it did."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from precision_runtime import Report
from precision_runtime.auditing import Originals
from precision_runtime.record import Smallest
from precision_runtime.shrinking import shrink
from pytest_precision.pasting import Origin, pasted

# Verdicts asked for at most. Most of what can be left out is so by then, and a test is not kept for minutes.
AUDITS = 60
# What user code may raise on inputs that it was not written for. pytest's own are no ``Exception``.
RAISED = (Exception, pytest.fail.Exception, pytest.skip.Exception)


def shrunk(
    report: Report,
    function: Callable[..., Any],
    args: Sequence[Any],
    mode: str,
    asked: Mapping[str, Any],
    originals: Originals,
    origin: Origin,
) -> Report:
    """``report`` of a failed check with the smallest input found, or with the reason why there is none.

    ``asked`` are the arguments of the audit that failed, ``mode`` its mode's name. A set-up model is judged as it was,
    by ``originals``. Nothing that goes wrong in the search hides the finding.
    """
    try:
        found = shrink(
            function, args, asked["kwargs"], asked["mode"], accelerator=asked["accelerator"],
            gradients=asked["gradients"], budget=asked["budget"], audits=AUDITS, originals=originals,
            options=asked["options"], report=report,
        )  # fmt: skip
    except RAISED as error:
        return replace(report, smallest=Smallest(note=f"{type(error).__name__}: {error}"))
    source = pasted(function, found, mode, asked, origin)
    return replace(report, smallest=Smallest(found.before, found.after, found.audits, source))
