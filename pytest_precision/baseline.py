"""Baselines: each lane's lost bits and headroom as they were, and whether it has become worse. Imports no torch."""

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
from pytest_precision.headroom import Left, bits_of_headroom
from pytest_precision.outcome import outcome_of
from pytest_precision.settings import settings_of

if TYPE_CHECKING:
    from pytest_precision.report.row import Row

# Bits. With the same seed, which the plugin gives every test, other kernels and threads change a figure of a real model
# by at most 0.27 bits, nine in ten by less than 0.04 (benchmarks/baseline_margin.py): this is about twice the largest.
# Other weights or inputs change it by up to 1.5 bits: a test that draws others is another test.
MARGIN = 0.5
# Bits of headroom. It is measured in whole powers of two, so one is the least that it can fall by, and already a factor
# of two of room that is gone. The edges of a format's range are looked for in FP64 values, which other kernels change
# by 1e-15 of themselves; edges of instability go by lost bits, and only one within a fraction of a bit of its budget
# could move. Of 72 lanes, 43 of them with an edge, none differed between kernels (benchmarks/headroom_margin.py).
STEP = 1
VERSION = 1
Key = tuple[str, str]  # case and lane


@dataclass(frozen=True)
class Baseline:
    """Lost bits, and bits of headroom where they were measured, by case and lane."""

    figures: Mapping[Key, float] = field(default_factory=dict)
    headroom: Mapping[Key, int] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Baseline:
        """Read a file; raises ``pytest.UsageError`` for one that is no baseline."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["version"] != VERSION:
                raise ValueError(f"its version is {data['version']!r}, and {VERSION} is known here")
            lost, left = _flat(data["lost_bits"]), _flat(data.get("headroom", {}))
            return cls({key: float(value) for key, value in lost}, {key: int(value) for key, value in left})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise pytest.UsageError(
                f"{path} is no baseline ({type(error).__name__}: {error}); delete it and make it anew with "
                "--precision-update-baseline"
            ) from error

    def write(self, path: Path) -> None:
        """Write the file in one go, sorted, so that changes are easy to review.

        Headroom is a key of its own, and only where some was measured: files of suites without it stay as they are, and
        versions that do not know it read the rest.
        """
        lost = {key: "inf" if math.isinf(value) else round(value, 2) for key, value in self.figures.items()}
        data: dict[str, Any] = {"version": VERSION, "lost_bits": _nested(lost)}
        if self.headroom:
            data["headroom"] = _nested(self.headroom)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
        beside = path.with_name(f"{path.name}.{os.getpid()}.new")
        beside.write_text(text + "\n", encoding="utf-8")
        beside.replace(path)

    def updated(self, rows: Sequence[Row]) -> Baseline:
        """With the figures of these rows; what did not run stays."""
        left = {key: found.bits for key, found in headroom_of(rows).items()}
        return Baseline({**self.figures, **figures_of(rows)}, {**self.headroom, **left})

    def keys(self) -> set[Key]:
        """Every lane that it knows something of."""
        return {*self.figures, *self.headroom}


def _flat(cases: Mapping[str, Mapping[str, Any]]) -> list[tuple[Key, Any]]:
    return [((case, lane), value) for case, lanes in cases.items() for lane, value in lanes.items()]


def _nested(figures: Mapping[Key, Any]) -> dict[str, dict[str, Any]]:
    cases: dict[str, dict[str, Any]] = {}
    for (case, lane), value in sorted(figures.items()):
        cases.setdefault(case, {})[lane] = value
    return cases


def is_worse(lost: float, before: float) -> bool:
    """Whether a lane loses more than it did, by more than the margin."""
    return lost > before + MARGIN


def has_less(left: Left, before: int) -> bool:
    """Whether a lane has less headroom than it had. Where no edge was reached, nobody knows: ``limit`` ended it."""
    return left.reached and left.bits <= before - STEP


def has_more(left: Left, before: int) -> bool:
    """Whether a lane has more headroom than it had."""
    return left.bits >= before + STEP


def figures_of(rows: Iterable[Row]) -> dict[Key, float]:
    """Lost bits of the lanes that ran to their end."""
    return {(row.case, row.lane): row.lost_bits for row in rows if row.lost_bits is not None and _ended(row)}


def headroom_of(rows: Iterable[Row]) -> dict[Key, Left]:
    """Headroom of the lanes that ran to their end, where it was measured."""
    return {(row.case, row.lane): row.left for row in rows if row.left is not None and _ended(row)}


def _ended(row: Row) -> bool:
    """A lane that failed may not have come to its last check."""
    return row.verdict in ("pass", "xfail", "xpass") or row.worse


@dataclass(frozen=True)
class Comparison:
    """A run beside a baseline: figures that are worse or better by more than the margin, new ones, and lanes not run.

    ``compared`` counts lanes.
    """

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
    lost, left = figures_of(rows), headroom_of(rows)
    worse, better, new = list[_Line](), list[_Line](), list[_Line]()
    for key, now in lost.items():
        before = baseline.figures.get(key)
        if before is None:
            new.append((key, bits(now)))
        elif is_worse(now, before) or is_worse(before, now):
            (worse if now > before else better).append((key, f"{bits(now)}, {bits(before)} before"))
    for key, found in left.items():
        known = baseline.headroom.get(key)
        if known is None:
            new.append((key, found.sentence()))
        elif has_less(found, known) or has_more(found, known):
            told = f"{found.sentence()}, {bits_of_headroom(known)} before"
            (worse if found.bits < known else better).append((key, told))
    ran = {(row.case, row.lane) for row in rows if row.ran}
    return Comparison(
        path=path.name,
        compared=len({*lost, *left} & baseline.keys()),
        worse=_told(worse),
        better=_told(better),
        new=_told(new),
        gone=tuple(f"{case} in {lane}" for case, lane in sorted(baseline.keys() - ran)),
        updated=updated,
    )


_Line = tuple[Key, str]  # a lane, and what is said of it


def _told(lines: Iterable[_Line]) -> tuple[str, ...]:
    return tuple(f"{case} in {lane}: {what}" for (case, lane), what in sorted(lines))


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
    """Note what the lane lost and had left before on its outcome, and fail a test that is worse now.

    A lane that is known to fail fails, too: known is how much it lost.
    """
    outcome = outcome_of(item) if report.when == "call" else None
    baseline = baseline_of(item.config) if outcome is not None else None
    if outcome is None or baseline is None:
        return
    key, lost, left = (outcome.case, outcome.lane), outcome.lost_bits, outcome.left
    if lost is not None:
        outcome.before = baseline.figures.get(key)
    if left is not None:
        outcome.headroom_before = baseline.headroom.get(key)
    files = settings_of(item.config).files
    if files.update or not (report.passed or hasattr(report, "wasxfail")):
        return
    said = []
    if lost is not None and outcome.before is not None and is_worse(lost, outcome.before):
        said.append(
            f"{outcome.case} in {outcome.lane} loses {bits(lost)} beyond what the mode must lose; "
            f"{bits(outcome.before)} in the baseline {files.baseline}, and {MARGIN} more are allowed"
        )
    if left is not None and outcome.headroom_before is not None and has_less(left, outcome.headroom_before):
        said.append(
            f"{outcome.case} in {outcome.lane} has {left.sentence()}; {bits_of_headroom(outcome.headroom_before)} in "
            f"the baseline {files.baseline}, and none fewer are allowed ({_edge(outcome.headrooms)})"
        )
    if not said:
        return
    outcome.worse = True
    known: Any = vars(report).pop("wasxfail", None)
    report.outcome = "failed"
    report.longrepr = (
        "\n".join(said)
        + (f" (it is known to fail: {known})" if known else "")
        + ". Where that is as it should be, --precision-update-baseline takes it in."
    )


def _edge(measured: Iterable[Mapping[str, Any]]) -> str:
    """What ends the least of them, in a line."""
    from precision_runtime.ranging.room import Headroom

    return min((Headroom.from_dict(dict(each)) for each in measured), key=lambda found: found.bits).headline()
