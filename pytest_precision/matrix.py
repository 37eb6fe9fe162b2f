"""Which lanes a test runs in, and their spreading over the test as parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import pytest

from precision_runtime.modes import MODES
from pytest_precision import FIXTURE
from pytest_precision.lanes import AUTO, NO_LANE, Lane
from pytest_precision.machine import Machine
from pytest_precision.marker import Marked, parse_mark
from pytest_precision.marks import Marks, levels_of, precise
from pytest_precision.problems import Problems
from pytest_precision.settings import Settings, settings_of


@dataclass(frozen=True)
class Named:
    """What markers of one level say, the lanes that they name, each with what its marker says, and lanes as params."""

    said: Sequence[Marked]
    lanes: Mapping[Lane, Marked]
    params: list[Any]


class Matrix:
    """The lanes of each test under the run's settings; one of these per session."""

    def __init__(self, settings: Settings, machine: Machine) -> None:
        self.settings = settings
        self.machine = machine
        self._named: dict[object, Named] = {}

    def lanes(self, marked: Marked, ambient: bool = False) -> list[Lane]:
        """The lanes of a test with this marker; empty where the options leave none.

        Modes that the marker names are never widened; the option ``--precision-lanes`` narrows them, and is the list
        of modes for a test that names none. Accelerators likewise.
        """
        settings, only = self.settings, self.settings.lanes
        explicit = settings.matrix or bool(marked.accelerators) or (only is not None and only.names_accelerators)
        default = self.machine.default() if explicit else AUTO
        lanes: dict[Lane, None] = {}
        for mode in marked.modes or self._modes():
            for accelerator in marked.accelerators or self._accelerators(mode, default):
                if only is None or only.selects(mode, accelerator):
                    lanes[Lane(mode, accelerator, accelerator == default, ambient, bool(marked.modes))] = None
        return list(lanes)

    def named(self, marks: Marks, ambient: bool, problems: Problems) -> Named:
        """The lanes that markers of one level name; what is wrong with the markers goes to ``problems``.

        Kept for markers that are written alike, because suites mark thousands of tests in the same words.
        """
        words = {(repr(mark.args), repr(mark.kwargs)): mark for mark in marks}
        key = (*words, ambient)
        if key not in self._named:
            told, lanes, ids = Problems(), dict[Lane, Marked](), set[str]()
            said = [parse_mark(mark, told) for mark in words.values()] or [Marked()]
            for marked in said:
                mine = self.lanes(marked, ambient)
                if twice := [lane.id for lane in mine if lane.id in ids]:
                    told.add(f"two markers precision name {', '.join(twice)}: a lane goes by one; make them one marker")
                ids |= {lane.id for lane in mine}
                lanes |= dict.fromkeys(mine, marked)
            if told:
                problems.take(told)
                return Named(said, lanes, [])
            params = [_param(lane, marked) for lane, marked in lanes.items()]
            self._named[key] = Named(said, lanes, params or [_param(NO_LANE, Marked())])
        return self._named[key]

    def _modes(self) -> Sequence[str]:
        if self.settings.lanes is not None:
            return self.settings.lanes.modes()
        return tuple(MODES) if self.settings.matrix else self.settings.modes

    def _accelerators(self, mode: str, default: str) -> list[str]:
        matrix, only = self.settings.matrix, self.settings.lanes
        usual = (self.settings.accelerators or self.machine.found()) if matrix else (default,)
        named = only.accelerators(mode) if only is not None else ()
        return [each for name in named or (None,) for each in (usual if name is None else (name,))]


MATRIX = pytest.StashKey[Matrix]()


def matrix_of(config: pytest.Config) -> Matrix:
    """Return the session's matrix."""
    if MATRIX not in config.stash:
        settings = settings_of(config)
        config.stash[MATRIX] = Matrix(settings, Machine(probe=not settings.collect_only))
    return config.stash[MATRIX]


def spread(metafunc: pytest.Metafunc) -> None:
    """Give a test its lanes, unless the user has parametrised the fixture in their own way."""
    definition, calls = metafunc.definition, getattr(metafunc, "_calls", ())
    levels = levels_of(definition)
    if any(FIXTURE in _names(mark) for mark in definition.iter_markers("parametrize")):
        return
    if any(FIXTURE in call.params for call in calls):  # by a pytest_generate_tests
        return
    ambient = FIXTURE not in metafunc.fixturenames
    if ambient:
        metafunc.fixturenames.append(FIXTURE)
    written = next(iter(levels), ())
    if not any(precise(call.marks) for call in calls):
        metafunc.parametrize(FIXTURE, _params(definition, written, ambient), indirect=True)
        return
    made: list[Any] = []
    for marks, same in groupby(calls, key=lambda call: precise(call.marks) or written):
        metafunc._calls = list(same)
        if marks or not ambient:  # else another parameter set of the test asks for lanes, and this one does not
            metafunc.parametrize(FIXTURE, _params(definition, marks, ambient), indirect=True)
        made += metafunc._calls
    metafunc._calls = made


def _params(definition: pytest.Item, marks: Marks, ambient: bool) -> list[Any]:
    problems = Problems()
    params = matrix_of(definition.config).named(marks, ambient, problems).params
    if problems:
        pytest.fail(wrong(definition, problems), pytrace=False)
    return params


def wrong(item: pytest.Item, problems: Problems) -> str:
    """What is wrong with the markers of a test, and where that test is."""
    file, line, _ = item.location
    place = file if line is None else f"{file}:{line + 1}"
    return f"{place}, {item.nodeid.partition('::')[2]}:\n{problems.text()}"


def _param(lane: Lane, marked: Marked) -> Any:
    case = pytest.mark.precision_case(mode=lane.mode, accelerator=lane.accelerator)
    marks = [case, pytest.mark.xfail(reason=marked.xfail[lane.mode])] if lane.mode in marked.xfail else [case]
    return pytest.param(lane, id=lane.id, marks=marks)


def _names(mark: pytest.Mark) -> list[str]:
    names = mark.args[0] if mark.args else mark.kwargs.get("argnames", ())
    return [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
