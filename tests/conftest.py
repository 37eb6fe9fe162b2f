"""Options of this repository's own suite."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow: run with --slow")
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def no_job_on_github(monkeypatch: pytest.MonkeyPatch) -> None:
    """Suites that tests run write no summaries into that of the job which runs this suite."""
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
