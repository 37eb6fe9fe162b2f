"""Baselines: lanes that lose more than they did fail."""

from __future__ import annotations

import json

import pytest

from pytest_precision.baseline import MARGIN, Baseline, is_worse
from pytest_precision.report.row import Row

# The excess is what the test says: check() is left out of the picture, its report is what counts here.
SUITE = """
import json, pathlib
from precision_runtime.record import Report

@pytest.mark.precision("16-true", "bf16-true", xfail={"bf16-true": "known"})
@pytest.mark.parametrize("name", ["a", "b"])
def test_it(precision_ctx, name):
    lost = json.loads(pathlib.Path("lost.json").read_text()).get(f"{name}-{precision_ctx.mode}")
    if lost is None:
        pytest.skip("no figure")
    precision_ctx._judge(Report("f", precision_ctx.mode, "cpu", "native", 2.0, 2.0**lost, 1.0))
    assert precision_ctx.mode == "16-true"
"""


@pytest.fixture
def go(run, pytester):
    def go(lost: dict[str, float], *arguments: str, ini: str = "precision_baseline = sub/base.json", source=SUITE):
        (pytester.path / "lost.json").write_text(json.dumps(lost), "utf-8")
        return run(source, *arguments, ini=ini)

    return go


def stored(pytester):
    return json.loads((pytester.path / "sub/base.json").read_text("utf-8"))["lost_bits"]


FIRST = {"a-16-true": 1.0, "b-16-true": 0.25, "a-bf16-true": 1.5}
A, B = "test_suite.py::test_it[a]", "test_suite.py::test_it[b]"


def test_a_lane_that_became_worse_fails_with_both_figures(go, pytester):
    result = go(FIRST, "--precision-update-baseline")
    result.assert_outcomes(passed=2, xfailed=1, skipped=1)
    assert result.ret == 0
    assert stored(pytester) == {A: {"16-true": 1.0, "bf16-true": 1.5}, B: {"16-true": 0.25}}
    assert go(FIRST).ret == 0
    assert go({**FIRST, "a-16-true": 1.0 + MARGIN}).ret == 0
    result = go({**FIRST, "a-16-true": 1.1 + MARGIN, "a-bf16-true": 3.0})
    result.assert_outcomes(passed=1, failed=2, skipped=1)
    result.stdout.fnmatch_lines(
        [
            "*test_it?a? in 16-true loses 1.6 bits beyond what the mode must lose; 1.0 bit in the baseline *base.json*",
            "*test_it?a? in bf16-true loses 3.0 bits *; 1.5 bits in the baseline *(it is known to fail: known)*",
            "  test_it?a? *FAIL 1.6 *FAIL 3.0",
            "baseline base.json: 3 compared, 2 worse",
            "    *test_it?a? in 16-true: 1.6 bits, 1.0 bit before",
        ]
    )
    assert stored(pytester)[A]["16-true"] == 1.0


def test_new_better_and_vanished_lanes_are_said_and_fail_nobody(go, pytester):
    go(FIRST, "--precision-update-baseline")
    result = go({"b-16-true": 0.0, "a-16-true": 0.0, "b-bf16-true": 1.0})
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        [
            "baseline base.json: 2 compared, 0 worse",
            "  1 better; --precision-update-baseline takes that in:",
            "    *test_it?a? in 16-true: 0.0 bits, 1.0 bit before",
            "  1 new, not in the baseline:",
            "    *test_it?b? in bf16-true: 1.0 bit",
            "  1 of the baseline did not run:",
            "    *test_it?a? in bf16-true",
        ]
    )


def test_an_update_takes_in_what_ran_and_keeps_the_rest(go, pytester):
    go(FIRST, "--precision-update-baseline")
    result = go({"a-16-true": 3.0, "b-bf16-true": float("inf")}, "--precision-update-baseline")
    assert result.ret == 0
    assert stored(pytester) == {
        A: {"16-true": 3.0, "bf16-true": 1.5},
        B: {"16-true": 0.25, "bf16-true": "inf"},
    }
    result.stdout.fnmatch_lines(
        ["baseline base.json: written, 1 were known, 1 are new", "  2 of the baseline did not run and were kept:"]
    )
    assert go({"b-bf16-true": float("inf")}).ret == 0


def test_the_option_counts_more_than_the_ini(go, pytester):
    go(FIRST, "--precision-update-baseline")
    result = go({**FIRST, "a-16-true": 4.0}, "--precision-update-baseline", "--precision-baseline=other.json")
    assert result.ret == 0
    assert stored(pytester)[A]["16-true"] == 1.0
    assert json.loads((pytester.path / "other.json").read_text("utf-8"))["lost_bits"][A]["16-true"] == 4.0


def test_workers_compare_too(go, pytester):
    pytest.importorskip("xdist")
    assert go(FIRST, "--precision-update-baseline", "-n2").ret == 0
    result = go({**FIRST, "b-16-true": 1.9}, "-n2")
    result.assert_outcomes(passed=1, failed=1, xfailed=1, skipped=1)
    result.stdout.fnmatch_lines(
        ["*loses 1.9 bits*0.2 bits in the baseline*", "baseline base.json: 3 compared, 1 worse"]
    )


def test_a_test_that_failed_before_its_last_check_is_not_taken_in(go, pytester):
    broken = SUITE + "    raise ValueError('later')\n"
    go(FIRST, "--precision-update-baseline", source=broken.replace('xfail={"bf16-true": "known"}', ""))
    assert stored(pytester) == {}


@pytest.mark.parametrize(
    ("content", "arguments", "said"),
    [
        (None, (), "the baseline *base.json does not exist; --precision-update-baseline makes it"),
        ("{}", (), "*base.json is no baseline (KeyError*"),
        ("nonsense", (), "*base.json is no baseline (JSONDecodeError*"),
        ('{"version": 99, "lost_bits": {}}', (), "*base.json is no baseline (ValueError: its version is 99*"),
        ('{"version": 1, "lost_bits": {"a": {"16-true": "x"}}}', (), "*base.json is no baseline (ValueError*"),
    ],
)
def test_a_file_that_is_no_baseline_stops_the_run(go, pytester, content, arguments, said):
    (pytester.path / "sub").mkdir()
    if content is not None:
        (pytester.path / "sub/base.json").write_text(content, "utf-8")
    result = go(FIRST, *arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*{said}*"])


def test_an_update_needs_to_know_which(go):
    result = go(FIRST, "--precision-update-baseline", ini="")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--precision-update-baseline needs to know which*"])


@pytest.mark.parametrize(
    ("lost", "before", "worse"),
    [(1.5, 1.0, False), (1.51, 1.0, True), (0.0, 3.0, False), (9.0, float("inf"), False), (float("inf"), 9.0, True),
     (float("inf"), float("inf"), False)],
)  # fmt: skip
def test_the_margin(lost, before, worse):
    assert is_worse(lost, before) is worse


def test_what_is_written_is_read_again(tmp_path):
    figures = {("a", "16-true"): 0.12, ("a", "nf4"): float("inf"), ("ü[1]", "tf32@cuda"): 3.0}
    Baseline(figures).write(tmp_path / "new/base.json")
    assert Baseline.read(tmp_path / "new/base.json").figures == figures
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["base.json"]


def test_rows_that_were_never_checked_have_no_figure():
    row = Row("a")
    row.data, row.verdict = {"case": "a", "lane": "16-true", "checks": []}, "pass"
    assert Baseline().updated([row]).figures == {}
