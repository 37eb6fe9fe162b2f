"""What a test found out about its lane, collected while it runs and put on its reports as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import pytest

from pytest_precision.arrange import lane_of
from pytest_precision.headroom import Left, left_of
from pytest_precision.lanes import Lane
from pytest_precision.transport import plain

ATTRIBUTE = "precision"  # of a test report: a dict as ``Outcome.to_dict`` makes it


@dataclass
class Outcome:
    """One test in one lane. ``status`` is how the lane runs: native, emulated, unsupported; "" before that is known.

    ``runs`` is what the mode became on this machine where that is not what its name says ("auto": "bf16-mixed").
    """

    case: str  # node id without the lane
    lane: str
    mode: str
    accelerator: str
    status: str = ""
    runs: str = ""
    before: float | None = None  # lost bits in the baseline
    headroom_before: int | None = None  # bits of headroom in the baseline
    worse: bool = False  # it failed because it is worse than in the baseline
    checks: list[dict[str, Any]] = field(default_factory=list)  # precision_runtime's Report.to_dict(), in order
    headrooms: list[dict[str, Any]] = field(default_factory=list)  # its Headroom.to_dict(), in order

    def to_dict(self) -> dict[str, Any]:
        """Builtins only."""
        return dict(plain(asdict(self)))

    @property
    def lost_bits(self) -> float | None:
        """The most bits that a check lost; None when nothing was checked."""
        return max((float(check["lost_bits"]) for check in self.checks), default=None)

    @property
    def left(self) -> Left | None:
        """The least headroom that was measured; None when none was."""
        return left_of(self.headrooms)

    @property
    def excess(self) -> float | None:
        """The greatest excess of a check; None when nothing was checked."""
        return max((float(check["excess"]) for check in self.checks), default=None)

    @property
    def blame(self) -> str:
        """The module (or else the op) that the first finding names; empty when all is well."""
        for check in self.checks:
            for finding in check["findings"]:
                return str(finding["module"] or finding["op"] or check["subject"])
        return ""

    def properties(self) -> list[tuple[str, object]]:
        """Flat JUnit properties."""
        known: dict[str, object] = {
            "precision.mode": self.mode,
            "precision.accelerator": self.accelerator,
            "precision.status": self.status,
            **({"precision.runs": self.runs} if self.runs else {}),
        }
        if self.checks:
            known["precision.lost_bits"] = self.lost_bits
            known["precision.excess"] = self.excess
            known["precision.blame"] = self.blame
        if self.left is not None:
            known["precision.headroom"] = self.left.bits
        return [(name, plain(value)) for name, value in known.items()]


OUTCOME = pytest.StashKey[Outcome]()


def outcome_of(item: pytest.Item) -> Outcome | None:
    """Return the test's outcome, made when first asked for; None for a test without a lane of ours."""
    if OUTCOME not in item.stash:
        lane = lane_of(item)
        if lane is None:
            return None
        start(item, lane, lane.id)
    return item.stash[OUTCOME]


def start(item: pytest.Item, lane: Lane, part: str) -> Outcome:
    """Begin the outcome of the test in the lane; ``part`` is what the test's id has for the lane."""
    outcome = Outcome(case=case_of(item, part), lane=lane.id, mode=lane.mode, accelerator=lane.accelerator)
    item.stash[OUTCOME] = outcome
    return outcome


def case_of(item: pytest.Item, part: str) -> str:
    """Return the test's node id without the part for its lane; lanes of one case share it."""
    callspec = getattr(item, "callspec", None)
    if callspec is None or not item.nodeid.endswith(f"[{callspec.id}]"):
        return item.nodeid
    # The part is known, so this is no parsing: it comes last, unless another plugin's parameters follow it.
    others = f"-{callspec.id}-".replace(f"-{part}-", "-").strip("-")
    stem = item.nodeid[: -len(callspec.id) - 2]
    return f"{stem}[{others}]" if others else stem


def attach(item: pytest.Item, report: pytest.TestReport) -> None:
    """Put the outcome on a report: on the set-up's already, so that a worker that is killed leaves its lane behind."""
    if report.when == "teardown" and report.passed:
        return
    outcome = outcome_of(item)
    if outcome is not None:
        setattr(report, ATTRIBUTE, outcome.to_dict())
