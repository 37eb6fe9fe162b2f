"""Collects the rows of the matrix from test reports, in the process that prints (under xdist the controller)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_precision.report.row import Row


class Board:
    """A plugin object, registered where reports arrive. It does nothing until a report carries precision data."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.rows: dict[str, Row] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take in a phase of a test."""
        data = getattr(report, "precision", None)
        if data is not None or report.nodeid in self.rows:
            from pytest_precision.report.row import Row

            self.rows.setdefault(report.nodeid, Row(report.nodeid)).take(report, data)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fail a session that did not run what it had to."""
        if self.config.getoption("precision_matrix") or self._required():
            from pytest_precision.report.demands import unmet

            if unmet(self.config, self.rows.values()) and session.exitstatus in _GREEN:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the matrix and the findings, where precision tests ran, and what the run owes."""
        if self.rows or self.config.getoption("precision_matrix") or self._required():
            from pytest_precision.report.terminal import summarise

            summarise(terminalreporter, self.config, list(self.rows.values()))

    def _required(self) -> bool:
        return bool(self.config.getoption("precision_require") or self.config.getini("precision_require"))


_GREEN = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
