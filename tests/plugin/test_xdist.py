"""Everything under ``-n 2``."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

pytest.importorskip("xdist")


def test_lanes_run_in_workers_and_the_controller_prints_one_matrix(run, pytester):
    result = run(
        """
@pytest.mark.precision("bf16-true", "32-true", accelerators=["cpu", "xla"], xfail={"32-true": "known"})
@pytest.mark.parametrize("n", [1, 2])
def test_it(precision_ctx, n):
    precision_ctx.check(torch.exp, precision_ctx.randn(8))
    assert precision_ctx.mode != "32-true"

@pytest.mark.precision("bf16-true")
def test_ambient():
    assert torch.ones(1).dtype == torch.bfloat16
    raise ValueError

def test_plain(): pass
""",
        "-n2",
        "--precision-require=bf16-true,64-true",
        "--junitxml=out.xml",
    )
    result.assert_outcomes(passed=3, failed=1, xfailed=2, skipped=4)
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        [
            "*== precision ==*",
            "3 tests x 4 lanes: 2 hold, 1 fail, 2 known to fail, 4 skipped*",
            "test *32-true * bf16-true *",
            "  test_ambient * FAIL*",
            "  test_it?1? * xfail 0.* 0.*",
            "  test_it?2? * xfail 0.* 0.*",
            "skipped 2 tests, bf16-true on xla: *",
            "precision: required lane 64-true ran in no test (--precision-require)",
        ]
    )
    assert result.stdout.str().count("== precision ==") == 1
    names = [p.get("name") for p in ET.parse(pytester.path / "out.xml").iter("property")]
    assert names.count("precision.mode") == 9
    assert names.count("precision.lost_bits") == 4


def test_a_killed_worker_leaves_its_lane_behind(run):
    result = run(
        """
import os

@pytest.mark.precision("16-mixed", "bf16-mixed", "32-true")
def test_it(precision_ctx):
    if precision_ctx.mode == "bf16-mixed":
        os._exit(1)
""",
        "-n2",
        "--precision-matrix",
        subprocess=True,
    )
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["*1 test x 3 lanes: 2 hold, 1 crashed*", "  test_it * pass * pass * crash*"])


def test_a_matrix_that_ran_nothing_fails(run):
    result = run("def test_plain(): pass", "-n1", "--precision-matrix")
    result.assert_outcomes(passed=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED


HOOK = """
import pytest

def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.precision("bf16-true"))
"""


def test_a_mistake_that_workers_find_is_said(run, pytester):
    pytester.makeconftest(HOOK)
    result = run("def test_it(precision_ctx): pass", "-n1")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(
        ["*a hook's marker precision names bf16-true, and the test has only the lanes 16-mixed*"]
    )
    result.stdout.no_fnmatch_line("*INTERNALERROR*")


def test_a_usage_error_is_said_once(run):
    result = run("def test_plain(): pass", "-n2", "--precision-lanes=nonsense")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert result.stderr.str().count("'nonsense' in --precision-lanes is unknown") == 1
