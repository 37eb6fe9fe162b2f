"""The option ``--precision-lanes``."""

from __future__ import annotations

import pytest

TESTS = """
@pytest.mark.precision("16-mixed", "16-true")
def test_named(precision_ctx): pass

def test_unnamed(precision_ctx): pass

def test_plain(): pass
"""


@pytest.mark.parametrize("flag", [(), ("--precision-matrix",)])
def test_it_narrows_named_modes_and_is_the_list_for_the_others(ids, flag):
    assert ids(TESTS, *flag, "--precision-lanes=mixed") == [
        "test_named[16-mixed]",
        "test_unnamed[16-mixed]",
        "test_unnamed[bf16-mixed]",
        "test_plain",
    ]


def test_a_test_that_is_left_no_lane_is_deselected(run):
    result = run(TESTS, "--precision-lanes=64", "-v")
    result.assert_outcomes(passed=2, deselected=1)
    result.stdout.fnmatch_lines(["*test_unnamed?64-true? PASSED*"])


def test_a_lane_on_the_default_accelerator_has_no_accelerator_in_its_id(ids):
    from precision_runtime.accelerators import machine

    assert ids(TESTS, f"--precision-lanes=bf16@{machine().auto()}") == ["test_unnamed[bf16-mixed]", "test_plain"]


def test_every_unknown_name_is_said_at_once_before_anything_is_collected(run):
    result = run(TESTS, "--precision-lanes=16-mix,!halv,mixed@cud,half@sim:cuda,16@", "--precision-require=b16")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        [
            "ERROR: precision mode '16-mix' in --precision-lanes is unknown. Did you mean '16-mixed'?",
            "precision mode 'halv' in --precision-lanes is unknown. Did you mean 'half'?",
            "precision mode 'b16' in --precision-require is unknown.*",
            "accelerator 'cud' in --precision-lanes is unknown. Did you mean 'cuda'?",
            "accelerator 'sim:cuda' in --precision-lanes: simulated ones are not available in this version",
            "accelerator missing in --precision-lanes",
            "Known precision modes: *",
            "Known accelerators: cpu, *",
        ]
    )


def test_an_empty_selection_is_a_mistake(run):
    result = run(TESTS, "--precision-lanes=")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --precision-lanes names no lane"])
