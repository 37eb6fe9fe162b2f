"""Several markers on one test: which count, and that none is dropped without a word."""

from __future__ import annotations

import pytest

PARAMETERS = """
@pytest.mark.parametrize("p", [pytest.param(1, marks=pytest.mark.precision("bf16-true", budget=7)), 2])
"""
CTX = "def test_it(precision_ctx, p):\n    assert (precision_ctx.budget == 7) == (p == 1)\n"


def test_a_parameter_sets_marker_is_the_nearest(ids, run):
    assert ids(PARAMETERS + CTX) == ["test_it[1-bf16-true]", "test_it[2-16-mixed]", "test_it[2-bf16-mixed]"]
    marked = '@pytest.mark.precision("32-true")' + PARAMETERS + CTX
    assert ids(marked) == ["test_it[1-bf16-true]", "test_it[2-32-true]"]
    run(marked).assert_outcomes(passed=2)


def test_a_parameter_set_may_ask_for_lanes_where_its_test_does_not(run):
    result = run(
        PARAMETERS
        + """
def test_it(p):
    assert torch.get_default_dtype() == (torch.bfloat16 if p == 1 else torch.float32)

@pytest.mark.parametrize("p", [2, pytest.param(1, marks=pytest.mark.precision("bf16-true"))])
def test_turned(p):
    assert torch.get_default_dtype() == (torch.bfloat16 if p == 1 else torch.float32)
""",
        "-v",
    )
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(["*::test_it?1-bf16-true? PASSED*", "*::test_it?2? PASSED*", "*::test_turned?2? *"])


def test_a_parameter_of_a_fixture_may_have_a_marker(ids):
    assert ids(
        """
@pytest.fixture(params=[pytest.param("a", marks=pytest.mark.precision("16-true", xfail={"16-true": "r"})), "b"])
def which(request): return request.param

@pytest.mark.precision("32-true")
def test_it(precision_ctx, which): pass
"""
    ) == ["test_it[a-16-true]", "test_it[b-32-true]"]


def test_the_options_narrow_a_parameter_sets_lanes(run):
    run(PARAMETERS + CTX, "--precision-lanes=bf16-mixed").assert_outcomes(passed=1, deselected=1)


def test_markers_of_one_level_each_name_lanes(ids, run):
    stacked = """
@pytest.mark.precision("16-mixed", budget=3)
@pytest.mark.precision("bf16-true", xfail={"bf16-true": "known"})
def test_it(precision_ctx):
    assert precision_ctx.budget == 3
"""
    assert sorted(ids(stacked)) == ["test_it[16-mixed]", "test_it[bf16-true]"]
    run(stacked).assert_outcomes(passed=1, xfailed=1)


def test_a_lane_that_two_markers_name_is_a_mistake(run):
    result = run(
        """
@pytest.mark.precision("16-mixed", budget=3)
@pytest.mark.precision("mixed")
def test_it(precision_ctx): pass
"""
    )
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*test_suite.py:5, test_it:", "*two markers precision name 16-mixed: *"])


def test_a_subclass_wins_over_its_base(ids):
    assert ids(
        """
@pytest.mark.precision("32-true")
class Base:
    def test_it(self, precision_ctx): pass

class TestNear(Base):
    pytestmark = pytest.mark.precision("16-true")

class TestFar(Base): pass
"""
    ) == ["TestNear::test_it[16-true]", "TestFar::test_it[32-true]"]


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ('["16-mixed", "bf16-mixed"]', "takes modes one by one: precision('16-mixed', 'bf16-mixed'), not *"),
        ('{"16-mixed"}', "takes modes one by one: precision('16-mixed'), not *"),
        ("{}", "precision mode {} in the marker precision is unknown*"),
    ],
)
def test_a_mistake_names_test_and_line(run, mistake, said):
    result = run(f"\nclass TestIt:\n    @pytest.mark.precision({mistake})\n    def test_it(self, precision_ctx): pass")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["test_suite.py:6, TestIt::test_it:", f"*{said}"])
    result.stdout.no_fnmatch_line("*Traceback*")


HOOK = """
import pytest

def pytest_collection_modifyitems(items):
    for item in items:
        if "it" in item.name:
            item.add_marker(pytest.mark.precision({}))
"""
TWO = """
@pytest.mark.precision("16-mixed", "bf16-true", runtime={"islands": "auto"})
def test_it(precision_ctx):
    assert precision_ctx.mode == "bf16-true" and precision_ctx.budget == 7
    assert precision_ctx.runtime.strategy.options.auto_islands

def test_other(): pass
"""


@pytest.mark.parametrize("workers", [(), ("-n2",)], ids=["plain", "xdist"])
def test_a_hooks_marker_leaves_lanes_out_and_its_arguments_count(run, pytester, workers):
    if workers:
        pytest.importorskip("xdist")
    pytester.makeconftest(HOOK.format('"bf16-true", budget=7'))
    run(TWO, *workers).assert_outcomes(passed=2, deselected=0 if workers else 1)


def test_a_hooks_marker_without_modes_speaks_of_all_lanes(run, pytester):
    pytester.makeconftest(HOOK.format('budget=7, xfail={"16-mixed": "known"}'))
    run(TWO).assert_outcomes(passed=2, xfailed=1)
    pytester.makeconftest(HOOK.format("budget=6"))
    run(TWO).assert_outcomes(passed=1, failed=2)


@pytest.mark.parametrize("arguments", [(), ("--collect-only",)])
def test_a_hooks_marker_cannot_make_lanes(run, pytester, arguments):
    pytester.makeconftest(HOOK.format('"half", budget=7'))
    result = run(TWO, *arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        ["*test_suite.py:5, test_it?16-mixed?:", "*names 16-true, bf16-mixed*only the lanes 16-mixed, bf16-true: *"]
    )


def test_a_hooks_marker_that_is_wrong_is_said(run, pytester):
    pytester.makeconftest(HOOK.format('"halv", budgt=7'))
    result = run(TWO)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*'halv' in the marker precision is unknown. Did you mean 'half'?"])


def test_a_hooks_marker_on_a_test_without_lanes_is_said(run, pytester):
    pytester.makeconftest(HOOK.format('"half"'))
    result = run("def test_it(): pass\ndef test_other(): pass", "-W", "default")
    result.assert_outcomes(passed=2, warnings=1)
    result.stdout.fnmatch_lines(
        ["*1 test(s) of test_suite.py are marked *because a hook marked them after *: test_it.*"]
    )


def test_a_hook_that_comes_before_lanes_are_made_may_mark_anything(ids, pytester):
    pytester.makeconftest(
        """
import pytest

def pytest_generate_tests(metafunc):
    metafunc.definition.add_marker(pytest.mark.precision("bf16-true"))
"""
    )
    assert ids("def test_it(): pass") == ["test_it[bf16-true]"]


def test_switched_off_markers_of_parameters_do_nothing(run):
    source = PARAMETERS + "def test_it(p):\n    assert torch.get_default_dtype() == torch.float32\n"
    ini = "markers = precision: of a plugin that is off"
    run(source, "-p", "no:precision", ini=ini).assert_outcomes(passed=2)
