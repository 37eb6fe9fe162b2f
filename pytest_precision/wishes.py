"""What all its markers together ask of a test in one lane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from pytest_precision.lanes import AUTO, Lane
from pytest_precision.marker import Marked, parse_mark
from pytest_precision.marks import added, nearest
from pytest_precision.matrix import Matrix, matrix_of
from pytest_precision.problems import Problems


@dataclass(frozen=True)
class Wishes:
    """None: the run's settings decide. ``runtime`` is what ``PrecisionRuntime`` is given beside the mode."""

    budget: float | None = None
    gradients: bool | None = None
    runtime: Mapping[str, Any] = field(default_factory=dict)


def wishes_of(item: pytest.Item, lane: Lane, problems: Problems) -> Wishes:
    """What the marker says that names the lane; each argument that a marker gives which was added since counts more."""
    matrix = matrix_of(item.config)
    said = matrix.named(nearest(item), lane.ambient, problems)
    own = said.lanes.get(lane)
    if own is None:  # of a user's own parametrisation
        own = next((marked for marked in said.said if lane.mode in marked.modes), said.said[0])
    found = Wishes(own.budget, own.gradients, own.runtime.of(lane.mode))
    later = added_for(lane, later_of(item, problems), matrix, problems)
    if later is None:
        return found
    return Wishes(
        found.budget if later.budget is None else later.budget,
        found.gradients if later.gradients is None else later.gradients,
        {**found.runtime, **later.runtime.of(lane.mode)},
    )


def later_of(item: pytest.Item, problems: Problems) -> list[Marked]:
    """What the markers say that were added since the lanes were made."""
    alike = {(repr(mark.args), repr(mark.kwargs)): mark for mark in added(item)}
    return [parse_mark(mark, problems) for mark in alike.values()]


def added_for(lane: Lane, later: Sequence[Marked], matrix: Matrix, problems: Problems) -> Marked | None:
    """The one of these markers that speaks of the lane; None without one. Two are a mistake."""
    accelerator = matrix.machine.default() if lane.accelerator == AUTO else lane.accelerator
    found = [
        marked
        for marked in later
        if (not marked.modes or lane.mode in marked.modes)
        and (not marked.accelerators or accelerator in marked.accelerators)
    ]
    if len(found) > 1:
        problems.add(f"two markers precision that hooks added speak of {lane.id}: make them one marker")
    return next(iter(found), None)
