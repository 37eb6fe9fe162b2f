"""The option ``--precision-shrink``."""

from __future__ import annotations

import html
import json
import re
import textwrap
import xml.etree.ElementTree as ET

import pytest
import torch

from precision_runtime.pasting import source_of_check
from precision_runtime.record import Report
from pytest_precision.lanes import Lane
from pytest_precision.lend import _marker

BLOCK = """
class BadNorm(nn.Module):
    def forward(self, x):
        mean = x.mean(-1, keepdim=True)
        return (x - mean) * ((x.square().mean(-1, keepdim=True) - mean.square()).clamp_min(0) + 1e-5).rsqrt()

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(32, 32), BadNorm(), nn.Linear(32, 8)
        nn.init.constant_(self.first.bias, 30.0)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))

def variance(x):
    return x.square().mean(-1) - x.mean(-1).square()
"""
MODEL = (
    BLOCK
    + """
@pytest.mark.precision({mode})
def test_it(precision_ctx):
    net = {make}
    precision_ctx.check(net, precision_ctx.randn(4, 32), gradients=False)
"""
)
FUNCTION = (
    BLOCK
    + """
@pytest.mark.precision({mode})
def test_it(precision_ctx):
    precision_ctx.check({function}, 10 + precision_ctx.randn(4, 24), gradients=False)
"""
)
SET_UP = "precision_ctx.setup(Net())"
SAID = re.compile(r"smallest input that fails in the same way: (\d+) of (\d+) elements \((\d+) audits\); as a test:")


def source_in(result: pytest.RunResult) -> str:
    """The test that a failure shows, as it is when it is copied out of the terminal."""
    lines = iter(result.outlines)
    assert any(SAID.search(line) for line in lines), result.stdout.str()
    shown = []
    for line in lines:
        if not line.startswith("E"):
            break
        shown.append(line[1:])
    return textwrap.dedent("\n".join(shown))


def blamed(result: pytest.RunResult) -> str:
    """The first finding's title, without the figure."""
    return next(line.partition("to blame: ")[2] for line in result.outlines if "to blame: " in line).rpartition(",")[0]


def without_op(title: str) -> str:
    """Module, kind and direction, which have to stay the same."""
    return re.sub(r", aten::\w+", "", title)


@pytest.mark.parametrize(
    ("mode", "make"),
    [("'16-true'", "Net()"), ("'16-true'", SET_UP), ("'fp4', runtime={'compute_dtype': 'float16'}", SET_UP)],
    ids=["plain", "set up", "fp4"],
)
def test_a_failed_check_prints_a_smaller_test_that_fails_as_it_does(run, make, mode):
    result = run(MODEL.format(mode=mode, make=make), "--precision-shrink")
    result.assert_outcomes(failed=1)
    after, before, audits = map(int, SAID.search(result.stdout.str()).groups())
    assert (after, before) == (32, 128)  # one row; the Linear fixes its length
    assert audits <= 60
    source = source_in(result)
    assert "    # `subject` is what test_suite.py::test_it checks (Net): make it here as it is made there\n" in source
    made = re.sub(r"( +)(args = )", rf"\1subject = {make}\n\1\2", source)
    again = run(BLOCK + made)
    again.assert_outcomes(failed=1)
    assert f"    # {blamed(again)}, " in source
    assert without_op(blamed(again)) == without_op(blamed(result)) == "norm (BadNorm): instability in forward"
    repaired = BLOCK.replace("BadNorm()", "nn.LayerNorm(32)")
    run(repaired + made).assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("function", "scale"), [("variance", 1), ("torch.exp", 20), ("torch.nn.functional.relu", 8000), ("GLOBAL", 1)]
)
def test_what_has_a_name_is_called_by_it_and_the_text_runs_as_it_is(run, function, scale):
    named = BLOCK + "GLOBAL = lambda x: variance(x)\n"
    result = run(
        named
        + f"""
@pytest.mark.precision("16-true", budget=0.0)
def test_it(precision_ctx):
    precision_ctx.check({function}, {scale} * (10 + precision_ctx.randn(4, 24)), gradients=False)
""",
        "--precision-shrink",
    )
    result.assert_outcomes(failed=1)
    source = source_in(result)
    assert f"precision_ctx.check({function}, *args, gradients=False, budget=0.0)" in source
    assert "subject" not in source
    again = run(named + source)
    again.assert_outcomes(failed=1)
    assert without_op(blamed(again)) == without_op(blamed(result))


def test_a_function_of_another_module_is_imported(run, pytester):
    pytester.makepyfile(helper="class Box:\n    @staticmethod\n    def rough(x):\n"
                               "        return x.square().mean(-1) - x.mean(-1).square()\n")  # fmt: skip
    head = "import sys; sys.path.insert(0, '.')\nimport helper\n"
    result = run(head + FUNCTION.format(mode="'bf16-true'", function="helper.Box.rough"), "--precision-shrink")
    result.assert_outcomes(failed=1)
    source = source_in(result)
    assert "\nfrom helper import Box\n" in source
    run(head + source).assert_outcomes(failed=1)


def test_what_has_no_name_is_said_to_have_none(run):
    result = run(FUNCTION.format(mode="'bf16-true'", function="lambda x: variance(x)"), "--precision-shrink")
    source = source_in(result)
    assert "`subject` is what test_suite.py::test_it checks (test_it.<locals>.<lambda>)" in source or (
        "`subject` is what test_suite.py::test_it checks (<lambda>)" in source
    )
    assert "precision_ctx.check(subject, *args, gradients=False)" in source
    run(BLOCK + "subject = variance\n" + source).assert_outcomes(failed=1)


def test_the_lane_s_accelerator_and_options_are_the_pasted_test_s(run):
    mode = "'bf16-true', budget=0.5, runtime={'islands': {'nothing': '32'}, 'bf16-true': {'scaler': None}}"
    result = run(FUNCTION.format(mode=mode, function="variance"), "--precision-shrink")
    source = source_in(result)
    assert '@pytest.mark.precision("bf16-true", runtime={' in source
    assert "'islands': {'nothing': '32'}" in source
    assert "budget=0.5" in source
    # The ini's budget holds for the pasted test, too: the same figure is not said again.
    result = run(FUNCTION.format(mode="'bf16-true'", function="variance"), "--precision-shrink",
                 ini="precision_budget = 0.5")  # fmt: skip
    assert "budget" not in source_in(result)


def test_a_lane_beside_the_default_one_is_named():
    there = _marker(Lane("16-true", "cuda", default=False), "cuda", {"islands": ("norm",)})
    args = (torch.tensor([1.5]),)
    source = source_of_check("f", "16-true", args, {}, {}, Report("f", "16-true", "cuda", "", 2, 8, 8), {}, there)
    assert source.splitlines()[4:] == [
        "@pytest.mark.precision(\"16-true\", accelerators='cuda', runtime={'islands': ('norm',)})",
        "def test_f_holds_in_16_true(precision_ctx):",
        "    args = (torch.tensor([1.5], dtype=torch.float32),)",
        "    precision_ctx.check(f, *args)",
    ]
    assert _marker(Lane("16-true", "auto"), "cuda", {}) == {}


def test_inputs_that_no_text_can_make_are_said_to_be_so(run):
    result = run(
        BLOCK
        + """
class Box:
    pass

@pytest.mark.precision("bf16-true")
def test_it(precision_ctx):
    precision_ctx.check(lambda x, box: variance(x), 10 + precision_ctx.randn(4, 24), Box(), gradients=False)
""",
        "--precision-shrink",
    )
    result.assert_outcomes(failed=1)
    assert source_in(result).startswith("# a test cannot be written for an input of type Box")
    result.stdout.fnmatch_lines(["E  *to blame: *"])


@pytest.mark.parametrize(
    ("error", "said"),
    [("ValueError('only once')", "ValueError: only once"), ("pytest.fail('no more')", "Failed: no more"),
     ("pytest.skip('no more')", "Skipped: no more")],
)  # fmt: skip
@pytest.mark.parametrize("option", ["--precision-shrink", "--precision-bisect"])
def test_what_is_raised_in_the_search_hides_no_finding(run, error, said, option):
    raised = f"raise {error}" if error.startswith("Value") else error
    result = run(
        BLOCK
        + f"""
class Once(Net):
    over = False

    def forward(self, x):
        if self.over:
            {raised}
        return super().forward(x)

@pytest.mark.precision("16-true")
def test_it(precision_ctx):
    net, record = Once(), precision_ctx._record
    import precision_runtime.auditing as auditing
    whole = auditing.audit
    def audit(*args, **options):
        report = whole(*args, **options)
        net.over = True
        return report
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auditing, "audit", audit)
        precision_ctx.check(net, precision_ctx.randn(4, 32), gradients=False)
""",
        option,
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E  *to blame: norm (BadNorm)*"])
    what = "smallest input that fails in the same way: not found" if "shrink" in option else "repair: none found"
    assert re.search(rf"E .*{what}.*{re.escape(said)}", result.stdout.str()), result.stdout.str()


def test_several_models_are_shrunk_together_and_with_their_values_from_before_the_set_up(run):
    result = run(
        BLOCK
        + """
@pytest.mark.precision("16-true")
def test_it(precision_ctx):
    one, two = precision_ctx.setup(nn.Linear(16, 32)), precision_ctx.setup(Net())
    with precision_ctx.init_module():
        three = nn.Linear(8, 8)
    before = [p.detach().clone() for m in (one, two, three) for p in m.parameters()]
    x = precision_ctx.randn(8, 16)
    kept = x.clone()
    with pytest.raises(AssertionError, match="smallest input that fails in the same way: 16 of 128 elements"):
        precision_ctx.check(lambda t: three(two(one(t))), x, gradients=False)
    after = [p for m in (one, two, three) for p in m.parameters()]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(before, after, strict=True))
    assert torch.equal(x, kept)
""",
        "--precision-shrink",
    )
    result.assert_outcomes(passed=1)


def test_it_stops_after_as_many_audits_as_are_allowed(run, monkeypatch):
    monkeypatch.setattr("pytest_precision.shrinking.AUDITS", 3)
    result = run(MODEL.format(mode="'16-true'", make=SET_UP), "--precision-shrink")
    after, before, audits = map(int, SAID.search(result.stdout.str()).groups())
    assert audits <= 3
    assert 32 <= after <= before == 128


def test_off_it_costs_and_prints_nothing(run, monkeypatch):
    monkeypatch.setattr("pytest_precision.shrinking.shrunk", None)
    monkeypatch.setattr("pytest_precision.shrinking.shrink", None)
    result = run(MODEL.format(mode="'16-true'", make=SET_UP))
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E  *to blame: norm (BadNorm)*"])
    result.stdout.no_fnmatch_line("*smallest input*")


def test_a_check_that_holds_is_not_shrunk(run, monkeypatch):
    monkeypatch.setattr("pytest_precision.shrinking.shrunk", None)
    run(MODEL.format(mode="'64-true'", make=SET_UP), "--precision-shrink").assert_outcomes(passed=1)


FILES = ("--precision-json=p.json", "--precision-html=p.html", "--precision-summary=p.md", "--junitxml=p.xml")


@pytest.mark.parametrize("workers", [(), ("-n2",)], ids=["one process", "workers"])
def test_with_a_repair_and_in_every_file(run, pytester, workers):
    if workers:
        pytest.importorskip("xdist")
    result = run(MODEL.format(mode="'16-true', '64-true'", make=SET_UP), "--precision-shrink", "--precision-bisect",
                 *FILES, *workers)  # fmt: skip
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(["E  *repair: with islands=?'norm': '32'? the mode holds*", "E  *smallest input that*"])
    source = source_in(result)
    rows = {row["lane"]: row for row in json.loads((pytester.path / "p.json").read_text("utf-8"))["rows"]}
    report = Report.from_dict(rows["16-true"]["checks"][0])
    assert report.repair is not None
    assert report.smallest is not None
    assert report.smallest.source.strip() == source.strip()
    assert rows["64-true"]["checks"][0]["smallest"] is None
    page = html.unescape((pytester.path / "p.html").read_text("utf-8"))
    junit = " ".join(f.text for f in ET.parse(pytester.path / "p.xml").iter("failure"))
    for line in filter(None, source.splitlines()):
        assert line in page
        assert line in junit


def test_collect_only_runs_nothing(run):
    result = run(MODEL.format(mode="'16-true'", make=SET_UP), "--precision-shrink", "--collect-only")
    assert result.ret == 0
    result.stdout.no_fnmatch_line("*smallest input*")


def test_disabled_it_is_unknown(run):
    result = run("def test_it(): pass", "-p", "no:precision", "--precision-shrink")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
