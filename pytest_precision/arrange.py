"""What is done once all tests are collected: fixtures in order, tests without a lane out, unspread tests said."""

from __future__ import annotations

import unittest
from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from pytest_precision import FIXTURE
from pytest_precision.lanes import NO_LANE, Lane


class PrecisionWarning(pytest.PytestWarning):
    """A test asks for precision lanes and cannot have them."""


def lane_of(item: pytest.Item) -> Lane | None:
    """Return the lane that this plugin gave the test; None for a user's own parametrisation."""
    callspec = getattr(item, "callspec", None)
    lane = callspec.params.get(FIXTURE) if callspec is not None else None
    return lane if isinstance(lane, Lane) else None


def arrange(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Do it, in one pass; ``items`` is changed in place."""
    kept: list[pytest.Item] = []
    empty: list[pytest.Item] = []
    unspread: list[pytest.Item] = []
    names: object = None
    for item in items:
        lane = lane_of(item)
        (empty if lane is NO_LANE else kept).append(item)
        if lane is None:
            if item.get_closest_marker("precision") is not None and FIXTURE not in getattr(item, "fixturenames", ()):
                unspread.append(item)
        elif item.fixturenames is not names:  # type: ignore[attr-defined]  # one list for all lanes of a function
            names = item.fixturenames  # type: ignore[attr-defined]
            _lane_first(item)
    if empty:
        items[:] = kept
        config.hook.pytest_deselected(items=empty)
    _say(unspread)


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
    groups: dict[object, list[pytest.Item]] = {}
    for item in items:
        groups.setdefault(item.parent, []).append(item)
    for parent, members in groups.items():
        cls = getattr(members[0], "cls", None)
        case = isinstance(cls, type) and issubclass(cls, unittest.TestCase)
        why = "unittest.TestCase methods take no parameters" if case else "they cannot be parametrised"
        names = ", ".join(item.name for item in members[:5]) + (", …" if len(members) > 5 else "")
        text = (
            f"{len(members)} test(s) of {getattr(parent, 'name', '')} are marked precision but run in no precision "
            f"mode, because {why}: {names}. Write them as functions or in a plain class."
        )
        try:
            members[0].warn(PrecisionWarning(text))
        except PrecisionWarning:  # warnings are errors in this run: end it with the text, not with a traceback
            raise pytest.UsageError(text) from None
