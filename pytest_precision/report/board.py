"""Collects the rows of the matrix from test reports, in the process that prints (under xdist the controller)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_precision.report.ending import Ending
    from pytest_precision.report.row import Row


class Board:
    """A plugin object, registered where reports arrive. It does nothing until a report carries precision data."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.rows: dict[str, Row] = {}
        self._ending: Ending | None = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take in a phase of a test."""
        data = getattr(report, "precision", None)
        if data is not None or report.nodeid in self.rows:
            from pytest_precision.report.row import Row

            self.rows.setdefault(report.nodeid, Row(report.nodeid)).take(report, data)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Compare, write the files that were asked for, and fail a session that did not do what it had to."""
        if self.rows or self._asked():
            from pytest_precision.report.ending import end

            self._ending = end(self.config, list(self.rows.values()))
            if self._ending.owed and session.exitstatus in _GREEN:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the matrix and the findings, where precision tests ran, and what the run owes."""
        if self._ending is not None:
            from pytest_precision.report.terminal import summarise

            rows = list(self.rows.values())
            summarise(terminalreporter, self.config, rows, self._ending.owed, self._ending.notes)

    def _asked(self) -> bool:
        given = any(self.config.getoption(f"precision_{name}") for name in _ASKING)
        return given or any(self.config.getini(f"precision_{name}") for name in ("require", "baseline"))


_ASKING = ("matrix", "require", "json", "html", "summary", "baseline")
_GREEN = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
