"""The option ``--precision-bisect``."""

from __future__ import annotations

import re

import pytest

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
"""
TEST = (
    BLOCK
    + """
@pytest.mark.precision({modes})
def test_it(precision_ctx):
    net = {make}
    precision_ctx.check(net, precision_ctx.randn(4, 32), gradients=False)
"""
)
AS_IT_IS, SET_UP = "Net()", "precision_ctx.setup(Net())"
REPAIR = "E  *repair: with islands={'norm': '32'} the mode holds: the loss falls from * to *"


@pytest.mark.parametrize("make", [AS_IT_IS, SET_UP], ids=["plain", "set up"])
@pytest.mark.parametrize("mode", ["16-true", "transformer-engine-float16", "fp4"])
def test_a_failed_check_prints_its_repair_which_holds(run, make, mode):
    result = run(TEST.format(modes=repr(mode), make=make), "--precision-bisect")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([REPAIR])
    # The second witness: what was printed is given to the runtime, and the test passes.
    marker = f"{mode!r}, runtime={{'islands': {{'norm': '32'}}}}"
    run(TEST.format(modes=marker, make=make)).assert_outcomes(passed=1)


def test_off_it_costs_and_prints_nothing(run, monkeypatch):
    monkeypatch.setattr("pytest_precision.bisect.repaired", None)
    monkeypatch.setattr("pytest_precision.pristine.Picture", None)
    result = run(TEST.format(modes="'16-true'", make=SET_UP))
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E  *to blame: norm (BadNorm)*"])
    result.stdout.no_fnmatch_line("*repair:*")


def test_a_check_that_holds_is_not_searched(run, monkeypatch):
    monkeypatch.setattr("pytest_precision.bisect.repaired", None)
    run(TEST.format(modes="'64-true'", make=SET_UP), "--precision-bisect").assert_outcomes(passed=1)


def test_workers_send_the_repair(run):
    pytest.importorskip("xdist")
    result = run(TEST.format(modes="'16-true', '64-true'", make=SET_UP), "--precision-bisect", "-n2")
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines([REPAIR])


def test_collect_only_runs_nothing(run):
    result = run(TEST.format(modes="'16-true'", make=SET_UP), "--precision-bisect", "--collect-only")
    assert result.ret == 0
    result.stdout.no_fnmatch_line("*repair:*")


def test_disabled_it_is_unknown(run):
    result = run("def test_it(): pass", "-p", "no:precision", "--precision-bisect")
    assert result.ret == pytest.ExitCode.USAGE_ERROR


def test_after_the_search_the_model_is_as_the_set_up_left_it(run):
    run(
        BLOCK
        + """
@pytest.mark.precision("16-true", "nf4", "transformer-engine", "apex-O2")
def test_it(precision_ctx):
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    precision_ctx.setup(net, optimizer)
    x = precision_ctx.randn(4, 32)
    precision_ctx.backward(net(x).float().square().mean())
    def content():
        return [
            (type(part), sorted(vars(part)),
             {n: (id(p), p.dtype) for n, p in part._parameters.items() if p is not None},
             {n: p.detach().clone() for n, p in part._parameters.items() if p is not None},
             {n: p.grad.clone() for n, p in part._parameters.items() if p is not None and p.grad is not None})
            for part in net.modules()
        ]
    before, out = content(), net(x).detach()
    with pytest.raises(AssertionError, match="repair: "):
        precision_ctx.check(net, x, gradients=False)
    for old, new in zip(before, content(), strict=True):
        assert old[:3] == new[:3]
        for a, b in zip(old[3:], new[3:], strict=True):
            assert a.keys() == b.keys() and all(torch.equal(a[n].nan_to_num(), b[n].nan_to_num()) for n in a)
    assert torch.equal(net(x).detach(), out)
    precision_ctx.step(optimizer)
""",
        "--precision-bisect",
    ).assert_outcomes(passed=4)


@pytest.mark.parametrize(
    ("check", "why"),
    [
        ("lambda t: one(t) + two(t)", "a repair is looked for in one model, and this check runs 2"),
        ("made", "the model was not set up by precision_ctx.setup: what it was before is not known"),
    ],
)
def test_where_none_can_be_looked_for_the_finding_stays_and_the_reason_is_said(run, check, why):
    result = run(
        BLOCK
        + f"""
@pytest.mark.precision("16-true")
def test_it(precision_ctx):
    one, two = Net(), Net()
    with precision_ctx.init_module():
        made = Net()
    precision_ctx.setup(made) if False else precision_ctx.runtime.setup(made)
    precision_ctx.check({check}, precision_ctx.randn(4, 32), gradients=False)
""",
        "--precision-bisect",
    )
    result.assert_outcomes(failed=1)
    text = result.stdout.str()
    assert re.search(r"to blame: \S*norm \(BadNorm\)", text), text
    assert f"repair: none found (0 audits): {why}" in text


def test_a_model_that_was_trained_since_its_set_up_is_repaired_with_its_present_weights(run):
    run(
        BLOCK
        + """
@pytest.mark.precision("16-true")
def test_it(precision_ctx):
    net = Net()
    nn.init.zeros_(net.first.bias)  # harmless when it is set up
    precision_ctx.setup(net)
    x = precision_ctx.randn(4, 32)
    precision_ctx.check(net, x, gradients=False)
    with torch.no_grad():
        net.first.bias.fill_(30.0)
    with pytest.raises(AssertionError, match="repair: with islands=.'norm': '32'. the mode holds"):
        precision_ctx.check(net, x, gradients=False)
    assert net.first.bias[0] == 30.0
""",
        "--precision-bisect",
    ).assert_outcomes(passed=1)


def test_a_part_of_a_set_up_model_is_repaired_by_its_own_names(run):
    run(
        BLOCK
        + """
@pytest.mark.precision("16-true")
def test_it(precision_ctx):
    whole = precision_ctx.setup(nn.Sequential(nn.Identity(), Net()))
    with pytest.raises(AssertionError, match="repair: with islands=.'norm': '32'. the mode holds"):
        precision_ctx.check(whole[1], precision_ctx.randn(4, 32), gradients=False)
    assert whole[1].first.weight.dtype == torch.float16
""",
        "--precision-bisect",
    ).assert_outcomes(passed=1)
