"""The entry point: hooks and the fixture, one or two lines each.

pytest imports this file in every run of an environment that has it installed, so it imports the standard library and
pytest only; each hook first asks whether the run uses precision at all.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import pytest

from pytest_precision import FIXTURE

if TYPE_CHECKING:
    from pytest_precision.context import PrecisionContext


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare options and ini keys."""
    from pytest_precision.settings import add_options

    add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Register markers; refuse options that cannot be understood."""
    from pytest_precision.settings import configure

    configure(config)


@pytest.hookimpl(trylast=True)  # last: ids end in the lane, and the lanes of one case are neighbours
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Spread precision-aware tests over their lanes."""
    parameters = (mark.name for call in getattr(metafunc, "_calls", ()) for mark in call.marks)
    if (
        FIXTURE in metafunc.fixturenames
        or metafunc.definition.get_closest_marker("precision") is not None
        or "precision" in parameters
    ):
        from pytest_precision.matrix import spread

        spread(metafunc)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # first: a test without lanes is gone before others count or split
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None]:
    """Put fixtures in order; then heed what other hooks have marked, and say which tests could not be spread."""
    if _precise(items):
        from pytest_precision.arrange import arrange

        arrange(config, items)
    yield
    if _precise(items):
        from pytest_precision.settle import settle

        settle(config, items)


def _precise(items: list[pytest.Item]) -> bool:
    return any("precision" in item.keywords or "precision_case" in item.keywords for item in items)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Put what the test found on its reports, as plain data."""
    report = yield
    if FIXTURE in getattr(item, "fixturenames", ()):
        from pytest_precision.baseline import judge
        from pytest_precision.outcome import attach

        judge(item, report)
        attach(item, report)
    return report


@pytest.fixture
def precision_ctx(request: pytest.FixtureRequest) -> Iterator[PrecisionContext]:
    """The test's lane: its mode and accelerator, inputs with the same values in every mode, and ``check``.

    ``check(f, *args)`` runs ``f`` in the mode and in FP64, forward and backward, and fails when more bits are lost than
    the mode must lose. ``setup``, ``autocast``, ``backward``, ``step`` and the other verbs are the runtime's.
    """
    from pytest_precision.lend import lend

    yield from lend(request)
