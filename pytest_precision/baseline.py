"""Baselines: the lost bits of each lane as they were, and whether a lane has become worse. Imports no torch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from precision_runtime.record import bits
from pytest_precision.outcome import outcome_of
from pytest_precision.settings import settings_of

if TYPE_CHECKING:
    from pytest_precision.report.row import Row

# Bits. With the same seed, which the plugin gives every test, other kernels and threads change a figure of a real model
# by at most 0.27 bits, nine in ten by less than 0.04 (benchmarks/baseline_margin.py): this is about twice the largest.
# Other weights or inputs change it by up to 1.5 bits: a test that draws others is another test.
MARGIN = 0.5
VERSION = 1
Key = tuple[str, str]  # case and lane


@dataclass(frozen=True)
class Baseline:
    """Lost bits by case and lane."""

    figures: Mapping[Key, float] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Baseline:
        """Read a file; raises ``pytest.UsageError`` for one that is no baseline."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["version"] != VERSION:
                raise ValueError(f"its version is {data['version']!r}, and {VERSION} is known here")
            return cls(
                {(case, lane): float(lost) for case, lanes in data["lost_bits"].items() for lane, lost in lanes.items()}
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise pytest.UsageError(
                f"{path} is no baseline ({type(error).__name__}: {error}); delete it and make it anew with "
                "--precision-update-baseline"
            ) from error

    def write(self, path: Path) -> None:
        """Write the file in one go, sorted, so that changes are easy to review."""
        cases: dict[str, dict[str, float | str]] = {}
        for (case, lane), lost in sorted(self.figures.items()):
            cases.setdefault(case, {})[lane] = "inf" if math.isinf(lost) else round(lost, 2)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"version": VERSION, "lost_bits": cases}, indent=1, ensure_ascii=False, allow_nan=False)
        beside = path.with_name(f"{path.name}.{os.getpid()}.new")
        beside.write_text(text + "\n", encoding="utf-8")
        beside.replace(path)

    def updated(self, rows: Iterable[Row]) -> Baseline:
        """With the figures of these rows; what did not run stays."""
        return Baseline({**self.figures, **figures_of(rows)})

    def before(self, case: str, lane: str) -> float | None:
        """What the lane lost; None where it is new."""
        return self.figures.get((case, lane))


def is_worse(lost: float, before: float) -> bool:
    """Whether a lane loses more than it did, by more than the margin."""
    return lost > before + MARGIN


def figures_of(rows: Iterable[Row]) -> dict[Key, float]:
    """Lost bits of the lanes that ran to their end. One that failed may not have come to its last check."""
    return {
        (row.case, row.lane): row.lost_bits
        for row in rows
        if row.lost_bits is not None and (row.verdict in ("pass", "xfail", "xpass") or row.worse)
    }


@dataclass(frozen=True)
class Comparison:
    """A run beside a baseline: lanes that lost more or less by more than the margin, new ones, and those not run."""

    path: str
    compared: int
    worse: tuple[str, ...]
    better: tuple[str, ...]
    new: tuple[str, ...]
    gone: tuple[str, ...]
    updated: bool

    def lines(self) -> list[str]:
        """What the terminal and the summary say of it."""
        said = [f"baseline {self.path}: {self.compared} compared, {len(self.worse)} worse"]
        if self.updated:
            said = [f"baseline {self.path}: written, {self.compared} were known, {len(self.new)} are new"]
        said += _listed("worse", self.worse)
        said += _listed("better; --precision-update-baseline takes that in" if not self.updated else "better",
                        self.better)  # fmt: skip
        said += _listed("new" if self.updated else "new, not in the baseline", self.new)
        return said + _listed("of the baseline did not run" + (" and were kept" if self.updated else ""), self.gone)


MOST = 10  # names listed of a kind


def _listed(what: str, names: tuple[str, ...]) -> list[str]:
    if not names:
        return []
    more = [f"  … and {len(names) - MOST} more"] if len(names) > MOST else []
    return [f"  {len(names)} {what}:", *(f"    {name}" for name in names[:MOST]), *more]


def compare(path: Path, baseline: Baseline, rows: Sequence[Row], updated: bool) -> Comparison:
    """Put a run beside the baseline as it was before the run."""
    now = figures_of(rows)
    known = {key: (lost, baseline.figures[key]) for key, lost in now.items() if key in baseline.figures}

    def told(key: Key) -> str:
        lost, before = known[key]
        return f"{key[0]} in {key[1]}: {bits(lost)}, {bits(before)} before"

    return Comparison(
        path=path.name,
        compared=len(known),
        worse=tuple(told(key) for key, pair in sorted(known.items()) if is_worse(*pair)),
        better=tuple(told(key) for key, (lost, before) in sorted(known.items()) if is_worse(before, lost)),
        new=tuple(f"{case} in {lane}: {bits(lost)}" for (case, lane), lost in sorted(now.items())
                  if (case, lane) not in baseline.figures),
        gone=tuple(f"{case} in {lane}" for case, lane in sorted(set(baseline.figures) - {(r.case, r.lane) for r in rows
                                                                                         if r.ran})),
        updated=updated,
    )  # fmt: skip


BASELINE = pytest.StashKey[Baseline]()


def baseline_of(config: pytest.Config) -> Baseline | None:
    """The run's baseline as it was before the run; None without one."""
    path = settings_of(config).files.baseline
    if path is None:
        return None
    if BASELINE not in config.stash:
        config.stash[BASELINE] = Baseline.read(path) if path.exists() else Baseline()
    return config.stash[BASELINE]


def judge(item: pytest.Item, report: pytest.TestReport) -> None:
    """Note what the lane lost before on its outcome, and fail a test that loses more now.

    A lane that is known to fail fails, too: known is how much it lost.
    """
    outcome = outcome_of(item) if report.when == "call" else None
    baseline = baseline_of(item.config) if outcome is not None else None
    if outcome is None or baseline is None or outcome.lost_bits is None:
        return
    before = outcome.before = baseline.before(outcome.case, outcome.lane)
    ended = report.passed or hasattr(report, "wasxfail")
    if before is None or settings_of(item.config).files.update or not ended or not is_worse(outcome.lost_bits, before):
        return
    outcome.worse = True
    known: Any = vars(report).pop("wasxfail", None)
    report.outcome = "failed"
    report.longrepr = (
        f"{outcome.case} in {outcome.lane} loses {bits(outcome.lost_bits)} beyond what the mode must lose; "
        f"{bits(before)} in the baseline {settings_of(item.config).files.baseline}, and {MARGIN} more are allowed"
        + (f" (it is known to fail: {known})" if known else "")
        + ". Where that is as it should be, --precision-update-baseline takes it in."
    )
