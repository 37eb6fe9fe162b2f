"""Markers that hooks add once tests are collected: they leave lanes out and say more of the others; they make none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pytest_precision.arrange import EARLIER, lane_of, stop, take_away, warn_unspread
from pytest_precision.lanes import Lane
from pytest_precision.marks import added, nearest
from pytest_precision.matrix import Matrix, matrix_of, wrong
from pytest_precision.problems import Problems
from pytest_precision.wishes import added_for, later_of


def settle(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Heed them, after all other hooks; ``items`` is changed in place.

    Ends the run for markers that cannot be understood and for lanes that nobody made.
    """
    away: list[pytest.Item] = []
    mistakes: dict[str, str] = {}  # each with the first test that has it
    for item in items:
        lane = lane_of(item)
        if lane is None or not added(item):
            continue
        problems = Problems()
        if not _stays(item, lane, matrix_of(config), problems):
            away.append(item)
        if problems:
            mistakes.setdefault(problems.text(), wrong(item, problems))
    if mistakes:
        stop(items[0].session, "\n".join(mistakes.values()))
        return
    take_away(config, items, away)
    warn_unspread(items)


def _stays(item: pytest.Item, lane: Lane, matrix: Matrix, problems: Problems) -> bool:
    """Whether markers that were added leave the test its lane; one that is known to fail there is marked so."""
    later = later_of(item, problems)
    if problems:
        return True
    made = matrix.named(nearest(item), lane.ambient, problems).lanes
    modes = tuple(dict.fromkeys(each.mode for each in made))
    for marked in later:
        wanted = matrix.lanes(replace(marked, modes=marked.modes or modes), lane.ambient)
        missing = {each.id for each in wanted} - {each.id for each in made}
        if missing and (marked.modes or marked.accelerators):
            problems.add(
                f"a hook's marker precision names {', '.join(sorted(missing))}, and the test has only the lanes "
                f"{', '.join(each.id for each in made)}: after tests were made no lane can be added. {EARLIER}"
            )
    mine = added_for(lane, later, matrix, problems)
    if mine is None:
        return False
    if lane.mode in mine.xfail:
        item.add_marker(pytest.mark.xfail(reason=mine.xfail[lane.mode]))
    return True
