"""Which lanes a test runs in, and their spreading over the test as parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from precision_runtime.modes import MODES
from pytest_precision import FIXTURE
from pytest_precision.lanes import AUTO, NO_LANE, Lane
from pytest_precision.machine import Machine
from pytest_precision.marker import Marked, parse_mark
from pytest_precision.problems import Problems
from pytest_precision.settings import Settings, settings_of


class Matrix:
    """The lanes of each test under the run's settings; one of these per session."""

    def __init__(self, settings: Settings, machine: Machine) -> None:
        self.settings = settings
        self.machine = machine
        self._params: dict[object, list[Any]] = {}

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

    def params(self, mark: pytest.Mark | None, ambient: bool) -> list[Any]:
        """``pytest.param`` for each lane, with its id and marks; raises ``pytest.fail`` for a bad marker.

        Kept for markers that are written alike, because suites mark thousands of tests in the same words.
        """
        key = (mark and mark.args, repr(mark.kwargs) if mark else "", ambient)
        if key not in self._params:
            problems = Problems()
            marked = parse_mark(mark, problems)
            if problems:
                pytest.fail(problems.text(), pytrace=False)
            self._params[key] = [_param(lane, marked) for lane in self.lanes(marked, ambient) or [NO_LANE]]
        return self._params[key]

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
    definition = metafunc.definition
    if any(FIXTURE in _names(mark) for mark in definition.iter_markers("parametrize")):
        return
    if any(FIXTURE in call.params for call in getattr(metafunc, "_calls", ())):  # by a pytest_generate_tests
        return
    ambient = FIXTURE not in metafunc.fixturenames
    params = matrix_of(metafunc.config).params(definition.get_closest_marker("precision"), ambient)
    if ambient:
        metafunc.fixturenames.append(FIXTURE)
    metafunc.parametrize(FIXTURE, params, indirect=True)


def _param(lane: Lane, marked: Marked) -> Any:
    case = pytest.mark.precision_case(mode=lane.mode, accelerator=lane.accelerator)
    marks = [case, pytest.mark.xfail(reason=marked.xfail[lane.mode])] if lane.mode in marked.xfail else [case]
    return pytest.param(lane, id=lane.id, marks=marks)


def _names(mark: pytest.Mark) -> list[str]:
    names = mark.args[0] if mark.args else mark.kwargs.get("argnames", ())
    return [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
