"""What is done once all tests are collected: fixtures in order, tests without a lane out; unspread tests said."""

from __future__ import annotations

import unittest
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest

from pytest_precision import FIXTURE
from pytest_precision.lanes import NO_LANE, Lane
from pytest_precision.marks import MARKER, is_met

EARLIER = (
    "Mark them where they are written, or in pytest_generate_tests: "
    "metafunc.definition.add_marker(pytest.mark.precision(...))."
)


class PrecisionWarning(pytest.PytestWarning):
    """A test asks for precision lanes and cannot have them."""


def lane_of(item: pytest.Item) -> Lane | None:
    """Return the lane that this plugin gave the test; None for a user's own parametrisation."""
    callspec = getattr(item, "callspec", None)
    lane = callspec.params.get(FIXTURE) if callspec is not None else None
    return lane if isinstance(lane, Lane) else None


def arrange(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Do it, in one pass, before other hooks see the tests; ``items`` is changed in place."""
    empty: list[pytest.Item] = []
    names: object = None
    for item in items:
        lane = lane_of(item)
        if lane is NO_LANE:
            empty.append(item)
        elif lane is None:
            _without_lane(item)
        elif item.fixturenames is not names:  # type: ignore[attr-defined]  # one list for all lanes of a function
            names = item.fixturenames  # type: ignore[attr-defined]
            _lane_first(item)
    take_away(config, items, empty)


def take_away(config: pytest.Config, items: list[pytest.Item], away: Sequence[pytest.Item]) -> None:
    """Deselect tests; ``items`` is changed in place."""
    if away:
        gone = set(map(id, away))
        items[:] = [item for item in items if id(item) not in gone]
        config.hook.pytest_deselected(items=away)


def stop(session: pytest.Session, text: str) -> None:
    """End the run with the text. A worker's ``UsageError`` would be lost; why its session fails is passed on."""
    if not hasattr(session.config, "workerinput"):
        raise pytest.UsageError(text) from None
    session.shouldfail = text


def warn_unspread(items: Iterable[pytest.Item]) -> None:
    """Say which tests are marked and have no lane, and why."""
    marked = (item for item in items if item.get_closest_marker(MARKER) is not None and lane_of(item) is None)
    _say(item for item in marked if FIXTURE not in getattr(item, "fixturenames", ()))


def _without_lane(item: pytest.Item) -> None:
    """Of a test that runs in lanes for some of its parameters only, the others share the list of fixtures."""
    if is_met(item) and hasattr(item, "callspec") and FIXTURE not in item.callspec.params:
        names: list[str] = item.fixturenames  # type: ignore[attr-defined]
        item.fixturenames = [name for name in names if name != FIXTURE]  # type: ignore[attr-defined]


def _lane_first(item: pytest.Item) -> None:
    """Set the lane up before the test's other function-scoped fixtures and after all wider ones.

    So models that fixtures build have the same weights in every lane, and what a module's or session's fixture
    changes for good is not undone after the first test. A test that does not ask for the fixture gets it here: pytest 9
    prunes a name that was added at collection.
    """
    names: list[str] = item.fixturenames  # type: ignore[attr-defined]
    info = getattr(item, "_fixtureinfo", None)  # scopes are public on a fixture's definition, the way there is not
    definitions: Mapping[str, Any] = getattr(info, "name2fixturedefs", {})
    if FIXTURE in names:
        names.remove(FIXTURE)
    narrow = (place for place, name in enumerate(names) if _scope(name, definitions.get(name)) == "function")
    names.insert(next(narrow, len(names)), FIXTURE)


def _scope(name: str, definitions: Any) -> str:
    if name == "request":  # no fixture, and anywhere in the list
        return "any"
    return str(definitions[-1].scope) if definitions else "function"


def _say(items: Iterable[pytest.Item]) -> None:
    groups: dict[tuple[object, str], list[pytest.Item]] = {}
    for item in items:
        groups.setdefault((item.parent, _why(item)), []).append(item)
    for (parent, why), members in groups.items():
        names = ", ".join(item.name for item in members[:5]) + (", …" if len(members) > 5 else "")
        text = (
            f"{len(members)} test(s) of {getattr(parent, 'name', '')} are marked precision but run in no precision "
            f"mode, because {why.format(names=names)}"
        )
        try:
            members[0].warn(PrecisionWarning(text))
        except PrecisionWarning:  # warnings are errors in this run: end it with the text, not with a traceback
            stop(members[0].session, text)


def _why(item: pytest.Item) -> str:
    cls = getattr(item, "cls", None)
    if isinstance(cls, type) and issubclass(cls, unittest.TestCase):
        return "unittest.TestCase methods take no parameters: {names}. Write them as functions or in a plain class."
    if isinstance(item, pytest.Function):
        return f"a hook marked them after tests were made: {{names}}. {EARLIER}"
    return "they cannot be parametrised: {names}. Write them as functions or in a plain class."
