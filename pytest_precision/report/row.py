"""One test in one lane, as its reports told it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest

from pytest_precision.headroom import Left, left_of

Verdict = Literal["", "pass", "FAIL", "skip", "xfail", "xpass", "error", "crash"]
RAN = ("pass", "FAIL", "xfail", "xpass")


class Row:
    """The verdict of a test in a lane, with what its checks found. Reports arrive phase by phase."""

    def __init__(self, nodeid: str) -> None:
        self.nodeid = nodeid
        self.verdict: Verdict = ""
        self.reason = ""
        self.data: dict[str, Any] = {}

    def take(self, report: pytest.TestReport, data: dict[str, Any] | None) -> None:
        """Take in one phase. A report of no known phase is what xdist makes of a killed worker."""
        self.data = data or self.data
        if report.when not in ("setup", "call", "teardown"):
            self.verdict, self.reason = "crash", "the worker was killed"
        elif hasattr(report, "wasxfail"):
            self.verdict = "xfail" if report.skipped else "xpass"
            self.reason = str(report.wasxfail).removeprefix("reason: ")
        elif report.skipped:
            self.verdict, self.reason = "skip", _reason(report)
        elif report.failed:
            if report.when == "call":
                self.verdict, self.reason = "FAIL", _first_line(report)
            elif self.verdict in ("", "pass"):
                self.verdict, self.reason = "error", _first_line(report)
        elif report.when == "call":
            self.verdict = "pass"

    @property
    def ran(self) -> bool:
        """Whether the test's own code ran to an end in the lane."""
        return self.verdict in RAN

    @property
    def case(self) -> str:
        """Node id without the lane."""
        return str(self.data["case"])

    @property
    def lane(self) -> str:
        """The lane as test ids have it."""
        return str(self.data["lane"])

    @property
    def mode(self) -> str:
        """The mode's name."""
        return str(self.data["mode"])

    @property
    def runs(self) -> str:
        """What the mode became on the machine, as "auto" and half on XLA do; else empty."""
        return str(self.data.get("runs", ""))

    @property
    def accelerator(self) -> str:
        """The accelerator's name; ``auto`` where the set-up never came to look."""
        return str(self.data["accelerator"])

    @property
    def status(self) -> str:
        """How the lane runs: native, emulated, simulated, unsupported, or empty."""
        return str(self.data["status"])

    @property
    def checks(self) -> Sequence[Mapping[str, Any]]:
        """The audits' reports as dicts."""
        return list(self.data["checks"])

    @property
    def lost_bits(self) -> float | None:
        """The most bits that a check lost; None when nothing was checked."""
        return max((float(check["lost_bits"]) for check in self.checks), default=None)

    @property
    def before(self) -> float | None:
        """Lost bits in the baseline; None without one, or where the lane is new."""
        before = self.data.get("before")
        return None if before is None else float(before)

    @property
    def headrooms(self) -> Sequence[Mapping[str, Any]]:
        """The measurements of headroom as dicts."""
        return list(self.data.get("headrooms", ()))

    @property
    def left(self) -> Left | None:
        """The least headroom that was measured; None when none was."""
        return left_of(self.headrooms)

    @property
    def headroom_before(self) -> int | None:
        """Bits of headroom in the baseline; None without one, or where the lane is new."""
        before = self.data.get("headroom_before")
        return None if before is None else int(before)

    @property
    def worse(self) -> bool:
        """Whether the test failed because it is worse than in the baseline."""
        return bool(self.data.get("worse"))

    @property
    def figure(self) -> float | None:
        """Lost bits, where they are what the verdict rests on: not of a test that failed for another reason."""
        if not self.ran or (self.verdict == "FAIL" and self.failed_check is None and not self.worse):
            return None
        return self.lost_bits

    @property
    def failed_check(self) -> Mapping[str, Any] | None:
        """The first check that found something."""
        return next((check for check in self.checks if check["findings"]), None)


def _first_line(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(getattr(crash, "message", None) or report.longrepr or "")
    return text.strip().partition("\n")[0]


def _reason(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    return str(report.longrepr)
