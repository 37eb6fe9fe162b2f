"""The option ``--precision-matrix``."""

from __future__ import annotations

import pytest

from precision_runtime.modes import GROUPS, MODES
from pytest_precision.lanes import Lane, parse_selection
from pytest_precision.machine import Machine
from pytest_precision.marker import Marked
from pytest_precision.matrix import Matrix
from pytest_precision.problems import Problems
from pytest_precision.settings import Settings

TESTS = """
@pytest.mark.precision("16-mixed")
def test_named(precision_ctx): pass

def test_unnamed(precision_ctx): pass

@pytest.mark.precision
def test_ambient(): pass

def test_plain(): pass
"""


def test_without_it_tests_run_in_their_modes_or_those_of_the_ini(ids):
    assert ids(TESTS, ini="precision_modes = 32-true") == [
        "test_named[16-mixed]",
        "test_unnamed[32-true]",
        "test_ambient[32-true]",
        "test_plain",
    ]


def test_with_it_tests_run_in_all_modes_or_those_that_they_name(ids):
    collected = ids(TESTS, "--precision-matrix", ini="precision_modes = 32-true")
    on_default = [name for name in collected if "@" not in name]
    assert on_default == [
        "test_named[16-mixed]",
        *[f"test_unnamed[{mode}]" for mode in MODES],
        *[f"test_ambient[{mode}]" for mode in MODES],
        "test_plain",
    ]


def test_it_is_a_flag_before_a_path(run):
    run("def test_it(precision_ctx): pass", "--precision-matrix", "test_suite.py").assert_outcomes(passed=len(MODES))


@pytest.mark.parametrize(
    "source",
    [
        "def test_plain(): pass",
        "@pytest.mark.skip(reason='not now')\ndef test_it(precision_ctx): pass",
        "",
    ],
    ids=["none", "all skipped", "no tests"],
)
def test_a_matrix_that_ran_nothing_fails_and_says_so(run, source):
    result = run(source, "--precision-matrix")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*--precision-matrix ran no test in any lane*"])
    assert run(source).ret != pytest.ExitCode.TESTS_FAILED


def test_collect_only_owes_nothing(run):
    assert run("def test_plain(): pass", "--precision-matrix", "--collect-only").ret == 0


# The rest is arithmetic, on machines that this one is not.


class Gpu(Machine):
    def found(self):
        return ("cuda", "cpu")


def lanes(marked: Marked, *, matrix: bool = False, spec: str | None = None, accelerators=()) -> list[str]:
    problems = Problems()
    only = None if spec is None else parse_selection(spec, "--precision-lanes", problems)
    assert not problems
    settings = Settings(matrix, only, None, ("16-mixed",), tuple(accelerators), 2.0, False)
    return [lane.id for lane in Matrix(settings, Gpu()).lanes(marked)]


MIXED = ["16-mixed", "bf16-mixed"]
TWO = Marked(modes=("16-mixed", "64-true"))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ["16-mixed"]),
        ({"matrix": True}, [f"{mode}{at}" for mode in MODES for at in ("", "@cpu")]),
        ({"matrix": True, "accelerators": ["cpu"]}, [f"{mode}@cpu" for mode in MODES]),
        ({"marked": TWO}, ["16-mixed", "64-true"]),
        ({"marked": TWO, "matrix": True}, ["16-mixed", "16-mixed@cpu", "64-true", "64-true@cpu"]),
        ({"spec": "mixed"}, MIXED),
        ({"spec": "mixed", "marked": TWO}, ["16-mixed"]),
        ({"spec": "mixed", "matrix": True}, ["16-mixed", "16-mixed@cpu", "bf16-mixed", "bf16-mixed@cpu"]),
        ({"spec": "mixed@cpu"}, ["16-mixed@cpu", "bf16-mixed@cpu"]),
        ({"spec": "mixed@cpu,16"}, ["16-mixed@cpu", "16-mixed", "bf16-mixed@cpu"]),
        ({"spec": "16-mixed@cuda"}, ["16-mixed"]),
        ({"spec": "!half"}, [mode for mode in MODES if mode not in GROUPS["half"]]),
        ({"spec": "!half", "marked": TWO}, ["64-true"]),
        ({"spec": "mixed,!bf16-mixed@cpu", "matrix": True}, ["16-mixed", "16-mixed@cpu", "bf16-mixed"]),
        ({"spec": "true", "marked": TWO}, []),
        ({"marked": Marked(accelerators=("xpu", "cuda"))}, ["16-mixed@xpu", "16-mixed"]),
        ({"marked": Marked(accelerators=("xpu",)), "matrix": True, "spec": "16@cpu"}, []),
    ],
)
def test_lanes(given, expected):
    marked = given.pop("marked", Marked())
    assert lanes(marked, **given) == expected


def test_without_accelerators_in_play_the_machine_is_not_asked():
    class Blind(Machine):
        def found(self):
            raise AssertionError

    settings = Settings(False, None, None, ("16-mixed",), (), 2.0, False)
    assert Matrix(settings, Blind()).lanes(Marked()) == [Lane("16-mixed", "auto", asked=False)]


NORM = """
import torch

{marker}
def test_norm(precision_ctx):
    precision_ctx.check(torch.nn.LayerNorm(16), precision_ctx.randn(4, 16))
"""


def test_a_mode_that_only_the_matrix_tries_is_skipped_where_it_has_nothing_to_swap(run):
    result = run(NORM.format(marker=""), "--precision-matrix", "--precision-lanes=nf4,bf16-true", "-rs")
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["*nf4 on cpu: nf4 puts quantised layers in place of nn.Linear*"])


def test_a_mode_that_the_test_names_must_apply(run):
    marker = '@__import__("pytest").mark.precision("nf4", "bf16-true")'
    result = run(NORM.format(marker=marker), "--precision-matrix")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*NothingToSwapError: nf4 puts quantised layers*"])
