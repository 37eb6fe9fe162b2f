"""Which of a test's markers ``precision`` count: those of the nearest level, and those that hooks added since."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest

MARKER = "precision"
Marks = tuple[pytest.Mark, ...]

# Kept by the collector of a function, under its name: the markers that it had when its lanes were made, by level.
LEVELS = pytest.StashKey[dict[str, list[Marks]]]()


def precise(marks: Iterable[pytest.Mark]) -> Marks:
    """Those that are ours."""
    return tuple(mark for mark in marks if mark.name == MARKER)


def levels_of(definition: pytest.Item) -> list[Marks]:
    """The markers of a function, its class, that class's bases, its module and so on, nearest first; kept for later."""
    levels = [marks for node in definition.iter_parents() for marks in _levels(node) if marks]
    assert definition.parent is not None
    definition.parent.stash.setdefault(LEVELS, {})[definition.name] = levels
    return levels


def of_call(item: pytest.Item) -> Marks:
    """The markers of a test's parameter set (``pytest.param``)."""
    return precise(getattr(getattr(item, "callspec", None), "marks", ()))


def nearest(item: pytest.Item) -> Marks:
    """The markers that a test's lanes are made by: those of its parameter set, or else of the nearest level."""
    return of_call(item) or next(iter(_kept(item)), ())


def added(item: pytest.Item) -> Marks:
    """The markers that the test has since its lanes were made."""
    known = [*of_call(item), *(mark for level in _kept(item) for mark in level)]
    new: list[pytest.Mark] = []
    for mark in item.iter_markers(MARKER):
        place = next((place for place, each in enumerate(known) if each is mark), None)
        if place is None:
            new.append(mark)
        else:
            del known[place]
    return tuple(new)


def is_met(item: pytest.Item) -> bool:
    """Whether lanes were made for the test's function, or for some of its parameter sets."""
    return _name(item) in _of_parent(item)


def _kept(item: pytest.Item) -> list[Marks]:
    return _of_parent(item).get(_name(item), [])


def _of_parent(item: pytest.Item) -> dict[str, list[Marks]]:
    return item.parent.stash.get(LEVELS, {}) if item.parent is not None else {}


def _name(item: pytest.Item) -> str:
    return getattr(item, "originalname", None) or item.name


def _levels(node: Any) -> Iterator[Marks]:
    """A node's own markers; pytest has those of a class and of its bases in one list, a subclass's last."""
    own = precise(node.own_markers)
    if own and isinstance(node, pytest.Class):
        for owner in node.obj.__mro__:
            written = vars(owner).get("pytestmark", ())
            here = [getattr(each, "mark", each) for each in (written if isinstance(written, list) else [written])]
            yield tuple(mark for mark in own if any(mark is each for each in here))
            own = tuple(mark for mark in own if not any(mark is each for each in here))
    yield own
