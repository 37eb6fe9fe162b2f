"""The ini keys."""

from __future__ import annotations

import pytest


def test_bad_values_are_said_together(run):
    result = run(
        "",
        ini="precision_modes = halv 16@cpu\nprecision_accelerators = gpu\n"
        "precision_budget = much\nprecision_require = x",
    )
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        [
            "*'halv' in ini key precision_modes is unknown. Did you mean 'half'?",
            "*'x' in ini key precision_require is unknown*",
            "*'gpu' in ini key precision_accelerators is unknown*",
            "ini key precision_modes takes modes and groups; accelerators go to precision_accelerators",
            "ini key precision_budget is 'much'; it is a number of bits, 0 or more",
        ],
    )


def test_toml_lists_and_numbers_are_taken(pytester):
    pytester.makepyprojecttoml(
        """
[tool.pytest.ini_options]
addopts = ["-p", "no:cacheprovider"]
precision_modes = ["32-true", "16-true"]
precision_budget = 3.5
"""
    )
    pytester.makepyfile("def test_it(precision_ctx): assert precision_ctx.budget == 3.5")
    pytester.runpytest_inprocess("-W", "error").assert_outcomes(passed=2)
