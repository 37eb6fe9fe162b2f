"""The option ``--precision-require`` and its ini key."""

from __future__ import annotations

import pytest

SOURCE = """
@pytest.mark.precision("16-mixed", "bf16-mixed")
def test_it(precision_ctx):
    if precision_ctx.mode == "bf16-mixed": pytest.skip("not now")
"""


@pytest.mark.parametrize(
    ("require", "missing"),
    [
        ("16-mixed", []),
        ("16@cpu", []),
        ("mixed", ["bf16-mixed"]),
        ("16@xpu,64", ["16-mixed@xpu", "64-true"]),
    ],
)
def test_a_required_lane_must_really_have_run(run, require, missing):
    result = run(SOURCE, f"--precision-require={require}")
    assert result.ret == (pytest.ExitCode.TESTS_FAILED if missing else pytest.ExitCode.OK)
    for lane in missing:
        result.stdout.fnmatch_lines([f"*required lane {lane} ran in no test*"])


def test_the_ini_requires_too_and_the_command_line_wins(run):
    assert run(SOURCE, ini="precision_require = 64-true").ret == pytest.ExitCode.TESTS_FAILED
    assert run(SOURCE, "--precision-require=16", ini="precision_require = 64-true").ret == pytest.ExitCode.OK


def test_a_failed_test_has_run(run):
    result = run("@pytest.mark.precision(16)\ndef test_it(precision_ctx): assert False", "--precision-require=16")
    result.stdout.no_fnmatch_line("*required lane*")


def test_a_session_without_precision_tests_owes_them(run):
    assert run("def test_it(): pass", "--precision-require=16").ret == pytest.ExitCode.TESTS_FAILED
