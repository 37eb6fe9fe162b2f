"""``precision_ctx.headroom`` in the run's reports, and held by baselines."""

from __future__ import annotations

import html
import json
import xml.etree.ElementTree as ET

import pytest

from precision_runtime import Headroom
from pytest_precision.baseline import Baseline, has_less, has_more
from pytest_precision.headroom import Left, left_of

# A square overflows float16 where its operand is 256: 16 may be doubled 3 times, 2^-k times 16 k times more often.
SUITE = """
import json, pathlib

def square(x):
    return x.square()

@pytest.mark.precision("16-true", "32-true", xfail={"32-true": "known"})
@pytest.mark.parametrize("name", ["a", "b"])
def test_it(precision_ctx, name):
    power = json.loads(pathlib.Path("powers.json").read_text()).get(f"{name}-{precision_ctx.mode}")
    if power is None:
        pytest.skip("no figure")
    x = torch.full((4,), 16.0 * 2.0**-power)
    precision_ctx.check(square, x, gradients=False)
    precision_ctx.headroom(square, x, gradients=False, limit=6)
    precision_ctx.headroom(nn.functional.relu, x, gradients=False, limit=4) if name == "b" else None
    assert precision_ctx.mode == "16-true"
"""
A, B = "test_suite.py::test_it[a]", "test_suite.py::test_it[b]"
FIRST = {"a-16-true": 1, "b-16-true": 0}
FILES = ("--precision-json=p.json", "--precision-html=p.html", "--precision-summary=p.md", "--junitxml=p.xml")


@pytest.fixture
def go(run, pytester):
    def go(powers: dict[str, float], *arguments: str, ini: str = "precision_baseline = base.json", source=SUITE):
        (pytester.path / "powers.json").write_text(json.dumps(powers), "utf-8")
        return run(source, *arguments, ini=ini)

    return go


def stored(pytester):
    return json.loads((pytester.path / "base.json").read_text("utf-8"))


@pytest.mark.parametrize("workers", [(), ("-n2",)], ids=["one process", "workers"])
def test_the_bits_are_in_every_report(go, pytester, workers):
    if workers:
        pytest.importorskip("xdist")
    result = go({**FIRST, "a-32-true": 0}, *FILES, *workers, ini="")
    result.assert_outcomes(passed=2, xfailed=1, skipped=1)
    result.stdout.fnmatch_lines(
        ["2 tests x 2 lanes: *(figures: lost bits; left: bits of headroom)", "  test_it?a? * (6+ left) *0.0 (4 left)",
         "  test_it?b? *skip *0.0 (3 left)"]
    )  # fmt: skip
    facts = json.loads((pytester.path / "p.json").read_text("utf-8"))
    rows = {(row["case"], row["lane"]): row for row in facts["rows"]}
    assert {key: row["headroom"] for key, row in rows.items()} == {
        (A, "16-true"): 4, (A, "32-true"): 6, (B, "16-true"): 3, (B, "32-true"): None,
    }  # fmt: skip
    both = [Headroom.from_dict(each) for each in rows[B, "16-true"]["headrooms"]]
    assert [(found.subject, found.bits) for found in both] == [("square", 3), ("relu", 4)]
    page = html.unescape((pytester.path / "p.html").read_text("utf-8"))
    for found in both:
        assert str(found) in page
    assert "0.0 (3 left)" in page
    assert "0.0 (4 left)" in (pytester.path / "p.md").read_text("utf-8")
    properties = {
        case.get("name"): {p.get("name"): p.get("value") for p in case.iter("property")}
        for case in ET.parse(pytester.path / "p.xml").iter("testcase")
    }
    assert properties["test_it[b-16-true]"]["precision.headroom"] == "3"
    assert "precision.headroom" not in properties["test_it[b-32-true]"]


def test_a_lane_with_one_bit_less_fails_with_both_figures_and_what_comes_then(go, pytester):
    result = go({**FIRST, "a-32-true": 0}, "--precision-update-baseline")
    assert result.ret == 0
    assert stored(pytester)["headroom"] == {A: {"16-true": 4, "32-true": 6}, B: {"16-true": 3}}
    before = (pytester.path / "base.json").read_bytes()
    assert go({**FIRST, "a-32-true": 0}).ret == 0
    result = go({"a-16-true": 0, "b-16-true": 1, "a-32-true": 0}, *FILES)
    result.assert_outcomes(passed=1, failed=1, xfailed=1, skipped=1)
    result.stdout.fnmatch_lines(
        [
            "*test_it?a? in 16-true has 3 bits of headroom; 4 bits of headroom in the baseline *base.json, and none "
            "fewer are allowed (square in 16-true on cpu: 3 bits of headroom; then range in *). Where that is *",
            "  test_it?a? *FAIL 0.0 (3 left)",
            "baseline base.json: 3 compared, 1 worse",
            "  1 worse:",
            "    *test_it?a? in 16-true: 3 bits of headroom, 4 bits of headroom before",
            "  1 better; --precision-update-baseline takes that in:",
            "    *test_it?b? in 16-true: 4 bits of headroom, 3 bits of headroom before",
        ]
    )
    row = {row["lane"]: row for row in json.loads((pytester.path / "p.json").read_text("utf-8"))["rows"]}["16-true"]
    assert (row["headroom"], row["headroom_before"], row["worse"], row["before"]) == (4, 3, False, 0.0)
    assert "4 bits of headroom before" in (pytester.path / "p.html").read_text("utf-8")
    assert go({**FIRST, "a-32-true": 0}, "--precision-update-baseline").ret == 0
    assert (pytester.path / "base.json").read_bytes() == before


def test_a_lane_that_is_known_to_fail_is_held_to_its_headroom_too(go):
    powers = {"a-32-true": -121}  # 2^125: its square is inf in FP32 as in FP64, and it fails
    source = SUITE.replace("x.square()", "x / 2").replace("precision_ctx.check(square, x, gradients=False)", "pass")
    go({"a-32-true": -118}, "--precision-update-baseline", source=source)
    result = go(powers, source=source)
    result.assert_outcomes(failed=1, skipped=3)
    result.stdout.fnmatch_lines(
        ["*a? in 32-true has 2 bits of headroom; 5 bits of headroom *(it is known to fail: known)*"]
    )


def test_files_from_before_headroom_was_held_are_read_and_keep_their_form(go, pytester):
    plain = SUITE.replace("    precision_ctx.headroom", "    # precision_ctx.headroom")
    go(FIRST, "--precision-update-baseline", source=plain)
    assert stored(pytester) == {"version": 1, "lost_bits": {A: {"16-true": 0.0}, B: {"16-true": 0.0}}}
    result = go(FIRST)
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        ["baseline base.json: 2 compared, 0 worse", "  2 new, not in the baseline:",
         "    *test_it?a? in 16-true: 4 bits of headroom", "    *test_it?b? in 16-true: 3 bits of headroom"]
    )  # fmt: skip


def test_what_did_not_run_is_said_and_kept(go, pytester):
    go(FIRST, "--precision-update-baseline")
    result = go({"a-16-true": 3}, "--precision-update-baseline")
    result.stdout.fnmatch_lines(
        ["baseline base.json: written, 1 were known, 0 are new", "  1 better:", "  1 of the baseline did not run and*",
         "    *test_it?b? in 16-true"]
    )  # fmt: skip
    assert stored(pytester)["headroom"] == {A: {"16-true": 6}, B: {"16-true": 3}}


def test_both_kinds_of_loss_are_told_at_once(go, pytester):
    go(FIRST, "--precision-update-baseline")
    data = stored(pytester)
    data["headroom"][A]["16-true"], data["lost_bits"][A]["16-true"] = 9, -1.0
    (pytester.path / "base.json").write_text(json.dumps(data), "utf-8")
    result = go(FIRST)
    result.assert_outcomes(passed=1, failed=1, skipped=2)
    result.stdout.fnmatch_lines(["*a? in 16-true loses 0.0 bits *", "*a? in 16-true has 4 bits of headroom; 9 bits *"])
    result.stdout.fnmatch_lines(["baseline base.json: 2 compared, 2 worse"])


def test_a_headroom_that_is_too_small_is_noted_and_not_taken_in(go, pytester):
    asked = SUITE.replace("limit=6", "limit=6, at_least=6")
    result = go(FIRST, "--precision-update-baseline", *FILES, source=asked)
    result.assert_outcomes(failed=2, skipped=2)
    assert stored(pytester) == {"version": 1, "lost_bits": {}}
    result.stdout.fnmatch_lines(["  test_it?a? *FAIL (4 left)"])


@pytest.mark.parametrize("bad", ['{"a": {"16-true": "x"}}', '{"a": 3}', "[]"])
def test_a_file_whose_headroom_cannot_be_read_stops_the_run(go, pytester, bad):
    (pytester.path / "base.json").write_text(f'{{"version": 1, "lost_bits": {{}}, "headroom": {bad}}}', "utf-8")
    result = go(FIRST)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*base.json is no baseline (*"])


@pytest.mark.parametrize(
    ("left", "before", "less", "more"),
    [(Left(4, True), 4, False, False), (Left(3, True), 4, True, False), (Left(5, True), 4, False, True),
     (Left(3, False), 4, False, False), (Left(5, False), 4, False, True), (Left(-1, True), 0, True, False)],
)  # fmt: skip
def test_one_bit_is_the_step_and_a_limit_is_no_edge(left, before, less, more):
    assert (has_less(left, before), has_more(left, before)) == (less, more)


def test_the_least_of_several_counts_and_a_limit_hides_no_edge():
    assert left_of([]) is None
    assert left_of([{"bits": 6, "reached": True}, {"bits": 4, "reached": True}]) == Left(4, True)
    assert left_of([{"bits": 2, "reached": False}, {"bits": 4, "reached": True}]) == Left(4, True)
    assert left_of([{"bits": 8, "reached": False}, {"bits": 6, "reached": False}]) == Left(6, False)
    assert [str(left) for left in (Left(4, True), Left(4, False), Left(0, True), Left(-1, True))] == [
        "4 left", "4+ left", "0 left", "no room",
    ]  # fmt: skip


def test_what_is_written_is_read_again(tmp_path):
    baseline = Baseline({("a", "nf4"): float("inf")}, {("b", "16-true"): -1, ("ü[1]", "tf32@cuda"): 12})
    baseline.write(tmp_path / "base.json")
    assert Baseline.read(tmp_path / "base.json") == baseline
