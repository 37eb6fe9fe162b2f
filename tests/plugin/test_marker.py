"""The marker ``precision``."""

from __future__ import annotations

import pytest


def test_the_lane_ends_the_id_and_lanes_of_a_case_are_neighbours(ids):
    assert ids(
        """
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.precision("16-mixed", "bf16-true")
def test_it(n, precision_ctx): pass
"""
    ) == ["test_it[1-16-mixed]", "test_it[1-bf16-true]", "test_it[2-16-mixed]", "test_it[2-bf16-true]"]


def test_function_wins_over_class_and_class_over_module(ids):
    assert ids(
        """
pytestmark = pytest.mark.precision("32-true")

def test_module(precision_ctx): pass

@pytest.mark.precision("16-true")
class TestIt:
    def test_class(self, precision_ctx): pass

    @pytest.mark.precision("bf16-true")
    def test_function(self, precision_ctx): pass
"""
    ) == ["test_module[32-true]", "TestIt::test_class[16-true]", "TestIt::test_function[bf16-true]"]


def test_groups_old_names_and_numbers_are_modes_and_duplicates_run_once(ids):
    assert ids(
        """
@pytest.mark.precision(16, "bf16", "mixed", "16-mixed", 64)
def test_it(precision_ctx): pass
"""
    ) == ["test_it[16-mixed]", "test_it[bf16-mixed]", "test_it[64-true]"]


def test_a_marker_without_modes_takes_those_of_the_ini(ids):
    source = """
@pytest.mark.precision(budget=3)
def test_it(precision_ctx): pass
"""
    assert ids(source) == ["test_it[16-mixed]", "test_it[bf16-mixed]"]
    assert ids(source, ini="precision_modes = bf16-true") == ["test_it[bf16-true]"]


def test_an_accelerator_that_is_not_the_default_one_is_in_the_id_and_skipped_with_the_reason(run):
    result = run(
        """
@pytest.mark.precision("16-mixed", accelerators=["cpu", "cuda"])
def test_it(precision_ctx): pass
""",
        "-v",
        "-rs",
    )
    if result.parseoutcomes() == {"passed": 2}:
        pytest.skip("this machine has a GPU")
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(
        ["*test_it?16-mixed? PASSED*", "*test_it?16-mixed@cuda? SKIPPED*", "SKIPPED*16-mixed on cuda: torch *"]
    )


def test_everything_that_is_wrong_is_said_at_once(run):
    result = run(
        """
@pytest.mark.precision(
    "16-mix", "bf17", True, accelerators=("cud", "tpu", "sim:cuda"), budgt=3, budget=-1, gradients="no",
    xfail={"half-true": "r", "16-true": ""}, reference="32-true",
)
def test_it(precision_ctx): pass
"""
    )
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        [
            "*precision mode '16-mix' in the marker precision is unknown. Did you mean '16-mixed'?",
            "*precision mode 'bf17' in the marker precision is unknown. Did you mean 'bf16'?",
            "*precision mode True in the marker precision is unknown.",
            "*precision mode 'half-true' in the marker precision, xfail is unknown.*",
            "*accelerator 'cud' in the marker precision, accelerators is unknown. Did you mean 'cuda'?",
            "*accelerator 'tpu' in the marker precision, accelerators is unknown. Did you mean 'xla'?",
            "*the marker precision takes no argument 'budgt'. Did you mean 'budget'? It takes *",
            "*budget is -1; it is a number of bits, 0 or more",
            "*gradients is 'no'; it is True or False",
            "*reference is '32-true'; the reference is always '64-true'",
            "*'sim:cuda'*simulated ones are not available in this version",
            "*xfail: '16-true' has the reason ''; it needs a text*",
        ],
        consecutive=False,
    )
    result.stdout.no_fnmatch_line("*Traceback*")


def test_xfail_of_a_mode_that_the_marker_does_not_run_is_a_mistake(run):
    result = run(
        """
@pytest.mark.precision("16-mixed", xfail={"16-true": "known"})
def test_it(precision_ctx): pass
"""
    )
    result.stdout.fnmatch_lines(["*xfail: '16-true' is none of the modes that the marker names: 16-mixed*"])


XFAIL = """
@pytest.mark.precision("16-mixed", "bf16-true", xfail={"true": "the table is cast"})
def test_it(precision_ctx):
    assert precision_ctx.mode == WORKS
"""


def test_xfail_is_for_its_modes_only(run):
    result = run("WORKS = '16-mixed'\n" + XFAIL, "-rx")
    result.assert_outcomes(passed=1, xfailed=1)
    result.stdout.fnmatch_lines(["XFAIL *bf16-true* - the table is cast*"])


@pytest.mark.parametrize(("strict", "outcome"), [("true", "failed"), ("false", "xpassed")])
def test_an_xfail_that_passes_follows_xfail_strict(run, strict, outcome):
    result = run(XFAIL.replace("== WORKS", ""), ini=f"xfail_strict = {strict}")
    result.assert_outcomes(passed=1, **{outcome: 1})


def test_a_test_without_the_fixture_runs_inside_the_modes_autocast_and_default_dtype(run):
    result = run(
        """
@pytest.fixture
def layer(): return nn.Linear(4, 4)

@pytest.mark.precision("16-true", "bf16-true", "64-true")
def test_true(layer, request):
    expected = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64}
    dtype = expected[request.node.callspec.id]
    assert torch.ones(2).dtype == layer.weight.dtype == dtype
    assert not torch.is_autocast_enabled("cpu")

@pytest.mark.precision("bf16-mixed")
def test_mixed(layer):
    assert layer(torch.ones(4)).dtype == torch.bfloat16 and layer.weight.dtype == torch.float32

@pytest.mark.precision("bf16-true", "bf16-mixed")
def test_raises():
    raise RuntimeError("user code")

def test_after():
    assert torch.get_default_dtype() == torch.float32 and not torch.is_autocast_enabled("cpu")
"""
    )
    result.assert_outcomes(passed=5, failed=2)


def test_budget_and_gradients_of_the_marker_are_those_of_check(run):
    run(
        """
@pytest.mark.precision("32-true", budget=5, gradients=False)
def test_it(precision_ctx):
    assert precision_ctx.budget == 5 and precision_ctx.judges_gradients is False
    assert precision_ctx.check(torch.sin, precision_ctx.randn(8)).budget == 5
    assert precision_ctx.check(torch.sin, precision_ctx.randn(8), budget=0.5).budget == 0.5

@pytest.mark.precision("32-true")
def test_ini(precision_ctx):
    assert precision_ctx.budget == 2.5 and precision_ctx.judges_gradients is True
""",
        ini="precision_budget = 2.5",
    ).assert_outcomes(passed=2)


def test_the_marker_is_listed_with_its_arguments(run):
    result = run("", "--markers")
    result.stdout.fnmatch_lines(["@pytest.mark.precision(*modes, accelerators=None, *xfail={mode: reason}*"])


def test_lanes_can_be_selected_exactly(ids):
    source = """
@pytest.mark.precision("16-mixed", "bf16-mixed")
def test_it(precision_ctx): pass
"""
    assert ids(source, "-m", "precision_case(mode='16-mixed')") == ["test_it[16-mixed]"]
    assert ids(source, "-m", "precision_case and not precision_case(mode='16-mixed')") == ["test_it[bf16-mixed]"]


@pytest.mark.parametrize(
    "own",
    [
        '@pytest.mark.parametrize("precision_ctx", ["bf16-true", "16@cpu"], indirect=True)\n',
        "def pytest_generate_tests(metafunc):\n"
        '    metafunc.parametrize("precision_ctx", ["bf16-true", "16@cpu"], indirect=True)\n',
    ],
    ids=["mark", "hook"],
)
def test_a_users_own_parametrisation_of_the_fixture_is_left_alone(run, own):
    marked = '@pytest.mark.precision("32-true", budget=1)\n'
    test = "def test_it(precision_ctx, request):\n    assert precision_ctx.mode in ('bf16-true', '16-mixed')\n"
    result = run(own + marked + test, "-v")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(
        ["*test_it?bf16-true? PASSED*", "*test_it?16@cpu? PASSED*", "*1 test x 2 lanes: 2 hold*"]
    )


def test_a_users_own_parameter_that_is_no_lane_fails_with_the_reason(run):
    result = run(
        """
@pytest.mark.parametrize("precision_ctx", ["mixd", "mixed"], indirect=True)
def test_it(precision_ctx): pass
"""
    )
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(
        ["*'mixd' in the parametrisation of precision_ctx is unknown*", "*'mixed', which is not one*"]
    )


def test_unittest_methods_are_said_not_to_run_in_any_mode(run):
    source = """
import unittest
pytestmark = pytest.mark.precision("16-mixed", "bf16-mixed")

class TestOld(unittest.TestCase):
    def test_one(self): pass
    def test_two(self): pass

def test_new(): pass
"""
    result = run(source, "-W", "default")
    result.assert_outcomes(passed=4, warnings=1)
    result.stdout.fnmatch_lines(
        ["*2 test(s) of TestOld are marked precision but run in no precision mode, because unittest.TestCase*"]
    )
    result = run(source)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: 2 test(s) of TestOld*"])
