"""A lane named auto runs what the machine's best mode is, and shows which that was."""

from __future__ import annotations

import pytest

from precision_runtime import support
from pytest_precision.report.terminal import tables
from tests.plugin.test_terminal import row

SUITE = """
import pytest
import torch
@pytest.mark.precision("auto", "32-true")
def test_it(precision_ctx):
    model = precision_ctx.setup(torch.nn.Linear(4, 4))
    precision_ctx.check(model, precision_ctx.randn(2, 4))
    print("ran in", precision_ctx.mode)
"""


def test_the_matrix_the_fixture_and_junit_show_what_it_became(pytester: pytest.Pytester) -> None:
    became = support("auto").runs
    pytester.makepyfile(SUITE)
    result = pytester.runpytest_subprocess("-s", "--precision-require=auto", "--junitxml=report.xml")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines([f"*ran in {became}*"])
    assert f"as {became}" in result.stdout.str()
    assert f'name="precision.runs" value="{became}"' in (pytester.path / "report.xml").read_text(encoding="utf-8")


def test_lanes_narrow_to_it_by_name(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SUITE)
    result = pytester.runpytest_subprocess("--precision-lanes=auto", "-v")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*test_it[[]auto[]]*"])


def test_what_a_mode_became_stands_under_its_lane_and_fits() -> None:
    rows = [row("a", "auto", bits=0.5, runs="bf16-mixed"), row("a", "32-true", bits=0.0)]
    (text,) = tables(rows, 100, False, False)
    lines = [line.split() for line in text.splitlines()[:3]]
    assert ["auto"] in lines
    assert ["test", "32-true", "as", "bf16-mixed"] in lines
