"""Discrete, steep, recurrent and otherwise awkward code: of each kind one that is right and one that is not."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from precision_runtime import audit
from precision_runtime.auditing.executing.noise import Noise
from precision_runtime.auditing.judging import replicas
from precision_runtime.auditing.judging.sheet import Sheet


@pytest.fixture(autouse=True)
def same_weights() -> None:
    torch.manual_seed(0)


class Does(nn.Module):
    """A module that does what a function says, with a linear layer for it to use."""

    def __init__(self, does: Callable[..., Any], width: int = 16, out: int = 16) -> None:
        super().__init__()
        self.net, self.does = nn.Linear(width, out), does

    def forward(self, *given: Any) -> Any:
        return self.does(self.net, *given)


def variance(x: torch.Tensor) -> torch.Tensor:
    """E[x^2] - E[x]^2: cancels where the mean is large."""
    return (x * x).mean(-1, keepdim=True) - x.mean(-1, keepdim=True) ** 2


def rounded_total(values: torch.Tensor) -> torch.Tensor:
    total = torch.zeros((), dtype=values.dtype)
    for value in values:
        total = total + value
    return total


# -- decisions: how often they fall otherwise is measured on perturbed runs --------------------------------------------

OFFSET = 200.0  # what the broken ones add and take away again: eight bits of each score are gone


def shifted(scores: torch.Tensor) -> torch.Tensor:
    return (scores + OFFSET) - OFFSET


DECISIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "argmax": lambda s: s.argmax(-1),
    "top-k": lambda s: s.topk(3, -1).indices.sort(-1).values,
    "threshold": lambda s: s > 0.2,
    "integers": lambda s: (s * 3).round().long(),
    "bucketize": lambda s: torch.bucketize(s, torch.linspace(-1, 1, 9).to(s.dtype)),
}


@pytest.mark.parametrize("mode", ["16-true", "bf16-true"])
@pytest.mark.parametrize("kind", sorted(DECISIONS))
@pytest.mark.parametrize("bad", [False, True])
def test_decisions_are_judged_by_how_often_perturbed_runs_flip_them(kind: str, mode: str, bad: bool) -> None:
    def decide(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        scores = net(x)
        return DECISIONS[kind](shifted(scores) if bad else scores)

    report = audit(Does(decide), torch.randn(1024, 16), mode=mode, gradients=False)
    assert report.ok is not bad, report


@pytest.mark.parametrize("bad", [False, True])
def test_a_quantiser_is_judged_by_the_codes_that_it_chooses(bad: bool) -> None:
    def quantise(net: nn.Module, x: torch.Tensor) -> Any:
        codes = torch.linspace(-2.0, 2.0, 33)[:, None].to(x.dtype) * torch.ones(8, dtype=x.dtype)
        z = net(x)
        if bad:  # |z|^2 - 2 z c + |c|^2 instead of |z - c|^2
            z = z + OFFSET
            codes = codes + OFFSET
            distance = (z * z).sum(-1, keepdim=True) - 2 * z @ codes.T + (codes * codes).sum(-1)
        else:
            distance = (z[:, None] - codes).square().sum(-1)
        return distance.argmin(-1)

    report = audit(Does(quantise, out=8), torch.randn(128, 16), mode="bf16-true", gradients=False)
    assert report.ok is not bad, report


@pytest.mark.parametrize("bad", [False, True])
def test_samples_are_drawn_alike_and_judged_as_decisions(bad: bool) -> None:
    def sample(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        scores = net(x)
        noise = -torch.log(-torch.log(torch.rand(scores.shape, dtype=torch.float32).clamp(1e-6, 1 - 1e-6)))
        return ((shifted(scores) if bad else scores) + noise.to(scores.dtype)).argmax(-1)

    report = audit(Does(sample), torch.randn(2048, 16), mode="bf16-true", gradients=False)
    assert report.ok is not bad, report


@pytest.mark.parametrize("bad", [False, True])
def test_near_ties_of_a_router_are_no_finding_and_lost_scores_are(bad: bool) -> None:
    def route(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        scores = net(x)
        weight, chosen = (shifted(scores) if bad else scores).softmax(-1).topk(2, -1)
        table = torch.linspace(-1, 1, 16 * 4).view(16, 4).to(x.dtype)
        return (table[chosen] * weight[..., None]).sum(1)

    report = audit(Does(route), torch.randn(64, 16), mode="bf16-true", gradients=False)
    assert report.ok is not bad, report


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_operands_of_ties_lie_on_the_grid_of_the_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(4000, dtype=torch.float64) * torch.logspace(-1, 1, 4000, dtype=torch.float64)
    noise = Noise(torch.finfo(dtype).eps / 2, 0, 0)
    assert torch.equal(noise.on_grid(x), x.to(dtype).double())
    counts = torch.arange(1000.0, dtype=torch.float64)
    assert torch.equal(noise.on_grid(counts), counts)


@pytest.mark.parametrize("mode", ["16-true", "bf16-true"])
@pytest.mark.parametrize("kind", ["mode", "amax"])
def test_ties_that_rounding_makes_are_no_finding(kind: str, mode: str) -> None:
    # The gradient of a maximum goes to all that are equal to it; of many values that occur once the smallest is the
    # most frequent, until rounding makes some of them equal.
    x = torch.randn(3000 if kind == "mode" else (400, 30)) + 4.0
    decide = (lambda x: x.mode().values) if kind == "mode" else (lambda x: x.amax(-1))
    report = audit(decide, x, mode=mode, gradients=kind == "amax")
    assert report.ok, report


def test_without_the_grid_a_tie_would_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Noise, "on_grid", lambda noise, t: t)
    assert not audit(lambda x: x.mode().values, torch.randn(3000) + 4.0, mode="16-true", gradients=False).ok


# -- few numbers -------------------------------------------------------------------------------------------------------


def mean_square(net: nn.Module, x: torch.Tensor) -> Any:
    return net(x).square().mean()


def drifting(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return rounded_total(net(x).square().mean(-1)) / len(x)


def test_a_single_number_is_judged_over_several_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def judged() -> float:
        torch.manual_seed(3)
        return audit(Does(drifting), torch.randn(192, 16), mode="bf16-true", gradients=False).excess

    together = judged()
    monkeypatch.setattr(replicas, "SUSPECT", float("inf"))
    alone = judged()
    assert alone < 4.0 < together  # by chance the judged run is one of the better ones


@pytest.mark.parametrize("seed", range(6))
def test_a_right_mean_holds(seed: int) -> None:
    torch.manual_seed(seed)
    report = audit(Does(mean_square), torch.randn(192, 16), mode="bf16-true")
    assert report.ok, report


class Draws:
    """Replicas whose errors are given, of a result of size 1."""

    def __init__(self, errors: list[float]) -> None:
        self.errors = errors

    def get(self, number: int) -> Any:
        error = self.errors[number]
        made = Sheet()
        made.add_outputs([("", torch.tensor(1.0 + error, dtype=torch.float64))], [("", ONE)], 2.0**-8, 0.0)

        class Made:
            def few(self, call: Any) -> Sheet:
                return made

        return Made()

    def dithered(self, where: str, number: int) -> None:
        """No runs with roundings drawn by chance (``test_dithering.py`` has them)."""


ONE = torch.tensor(1.0, dtype=torch.float64)
LINE = 2.0**-8 / 3**0.5  # where nothing else is disturbed, one rounding of a result of that size


@pytest.mark.parametrize(
    ("own", "others", "used"),
    [
        (1.2, [0.9, 0.8, 1.1], 3),  # healthy: clear after three
        (5.0, [0.7] * 15, 15),  # a draw of chance
        (1.5, [9.0] * 15, 15),  # a draw of luck
        (0.8, [], 0),  # not suspect
        (40.0, [], 0),  # no chance does that
    ],
)
def test_the_error_of_a_single_number_is_the_rms_over_its_replicas(own: float, others: list[float], used: int) -> None:
    sheet = Sheet()
    sheet.add_outputs([("", ONE + own * LINE)], [("", ONE)], 2.0**-8, 0.0)
    (site,) = sheet.pairs
    before = sheet.pairs[site].judge([ONE.reshape(1)])
    assert before.excess == pytest.approx(own)
    draws: Any = Draws([e * LINE for e in others])
    after = replicas.replicated(draws, None, sheet, {site: before}, 4.0)
    if not used:
        assert not after
        return
    expected = math.sqrt(sum(e * e for e in [own, *others[:used]]) / (1 + used))
    assert after[site].excess == pytest.approx(expected)
    assert f"rms of {1 + used} runs" in after[site].note


def test_a_replica_whose_terms_cancel_is_no_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two terms of either sign: of operands a little smaller their difference may be a hundredth of what it was, and the
    # error is what it was.
    sheet, made = Sheet(), Sheet()
    sheet.add_outputs([("", ONE + 1.2 * LINE)], [("", ONE)], 2.0**-8, 0.0)
    made.add_outputs([("", ONE / 100.0 + LINE)], [("", ONE / 100.0)], 2.0**-8, 0.0)
    (site,) = sheet.pairs
    draws: Any = Draws([0.0])
    monkeypatch.setattr(draws, "get", lambda number: type("Made", (), {"few": lambda self, call: made})())
    after = replicas.replicated(draws, None, sheet, {site: sheet.pairs[site].judge([ONE.reshape(1)])}, 4.0)
    assert after[site].excess < 2.0  # and 97 where the error was taken relative to what is left


# -- bias --------------------------------------------------------------------------------------------------------------


class Offset(nn.Module):
    """Multiplies by 1 + w, which the dtype of w rounds: the same error in every row."""

    def __init__(self, bad: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter((torch.randn(96) * 0.02).half().float())
        self.bad = bad

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = 1.0 + (self.weight if self.bad else self.weight.float())
        return (x.float() * scale.float()).to(x.dtype)


class Pooled(nn.Module):
    """How far the mean over 4,096 rows has moved, or the mean itself."""

    def __init__(self, bad: bool, moved: bool) -> None:
        super().__init__()
        self.offset, self.moved = Offset(bad), moved

    def forward(self, x: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        out = self.offset(x).float()
        return (out - before.float()).mean(0) if self.moved else out.mean(0)


@pytest.mark.parametrize("bad", [False, True])
def test_a_bias_that_shows_only_after_pooling_is_found_where_more_than_one_rounding_of_the_result_is_lost(
    bad: bool,
) -> None:
    torch.manual_seed(0)
    x, before = (torch.randn(4096, 96) * 0.6 + 1.1 for _ in range(2))
    moved = Pooled(bad, moved=True)
    # The second witness: what rounding 1 + w takes from a channel is the same in all of its rows.
    weight = moved.offset.weight.detach()
    bias = (1.0 + weight.half()).double() - (1.0 + weight.double())
    assert 0.1 * 2.0**-11 < float(bias.abs().mean()) < 2.0**-11
    report = audit(moved, x, before, mode="16-true", gradients=False)
    assert report.ok is not bad, report
    if bad:  # row by row it is one rounding, as any norm's weight costs: the module itself is right
        assert [f.module for f in report.findings] == [""]
    # The mean of 1.1 is off by less than one rounding of itself, which nobody could have stored better.
    assert audit(Pooled(bad, moved=False), x, before, mode="16-true", gradients=False).ok


# -- steep, long, recurrent --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["16-true", "bf16-true"])
def test_right_code_on_inputs_that_a_true_mode_cannot_resolve_is_remarked_on_and_does_not_fail(mode: str) -> None:
    # One step of bfloat16 at 1000 is 4: nothing is left of values that lie within 1 of it, and no code could help that.
    report = audit(lambda x: x - x.mean(-1, keepdim=True), torch.randn(32, 64) + 1000.0, mode=mode, gradients=False)
    assert report.ok, report
    assert {r.kind for r in report.remarks} == {"ill-conditioned"}


def apart(net: nn.Module, x: torch.Tensor, y: torch.Tensor, bad: bool) -> torch.Tensor:
    """1 - cos of the angle between two directions a few degrees apart."""
    one = net(x)
    two = one + 0.03 * y
    if not bad:
        one, two = one.float(), two.float()
    p, q = one / one.norm(dim=-1, keepdim=True), two / two.norm(dim=-1, keepdim=True)
    return (1 - (p * q).sum(-1) if bad else (p - q).square().sum(-1) / 2).to(x.dtype)


@pytest.mark.parametrize("mode", ["16-true", "bf16-true"])
@pytest.mark.parametrize("bad", [False, True])
def test_the_rounding_of_a_norm_is_granted_and_what_a_formula_makes_of_it_is_not(bad: bool, mode: str) -> None:
    # 1 - cos is known to one rounding of 1, a thousand times more than the inputs' rounding moves it. Half the squared
    # distance of unit vectors in FP32 is as good as the inputs are.
    net, x, y = Does(functools.partial(apart, bad=bad)), torch.randn(200, 16), torch.randn(200, 16)
    true = nn.Linear(16, 16).double()
    a, b = (apart(true, x.double(), y.double(), kind) for kind in (False, True))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)  # one function, one of them through FP32
    report = audit(net, x, y, mode=mode, gradients=False)
    assert report.ok is not bad, report
    if bad:
        (finding,) = report.findings
        assert finding.kind == "instability"
        assert "the rounding of a value inside" in finding.message
        assert "falls from" in str(finding.proof)


@pytest.mark.parametrize("bad", [False, True])
def test_coordinates_under_autocast_want_an_island(bad: bool) -> None:
    def waves(net: nn.Module, t: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=bad and torch.is_autocast_enabled("cpu")):
            return torch.sin(200.0 * net(t))

    report = audit(Does(waves, width=2), torch.rand(64, 2), mode="bf16-mixed", gradients=False)
    assert report.ok is not bad, report
    assert not bad or report.findings[0].kind == "amplification"


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("mode", ["16-true", "bf16-true"])
def test_long_sums_are_right_as_torch_makes_them_and_wrong_term_by_term(mode: str, bad: bool) -> None:
    def total(net: nn.Module, x: torch.Tensor) -> Any:
        y = net(x).abs()
        if not bad:
            return y.mean(0)
        out = torch.zeros(y.shape[1:], dtype=y.dtype)
        for row in y:
            out = out + row
        return out / len(y)

    report = audit(Does(total, width=4, out=64), torch.randn(1500, 4), mode=mode, gradients=False)
    assert report.ok is not bad, report


@pytest.mark.parametrize("bad", [False, True])
def test_label_smoothing_sums_over_many_classes(bad: bool) -> None:
    def loss(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Any:
        scores = net(x)
        if not bad:
            return functional.cross_entropy(scores, y, label_smoothing=0.1, reduction="none")
        logs = scores.log_softmax(-1)
        smooth = torch.zeros(logs.shape[:1], dtype=logs.dtype)
        for column in logs.unbind(-1):  # a total of -7,000 in half: steps of 4, or of 32
            smooth = smooth + column
        return -0.9 * logs.gather(1, y[:, None])[:, 0] - 0.1 * smooth / logs.shape[-1]

    report = audit(
        Does(loss, out=1000), torch.randn(64, 16), torch.randint(1000, (64,)), mode="bf16-true", gradients=False
    )
    assert report.ok is not bad, report


# -- masks, layouts, compilers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [False, True])
def test_a_row_masked_entirely_is_no_finding_unless_it_becomes_nan_in_the_mode_alone(bad: bool) -> None:
    def attend(net: nn.Module, x: torch.Tensor) -> Any:
        scores = net(x) @ net(x).T
        keep = torch.ones_like(scores, dtype=torch.bool)
        keep[3] = False
        hidden = -1e9 if bad else torch.finfo(scores.dtype).min
        return (scores + torch.where(keep, 0.0, hidden).to(scores.dtype)).softmax(-1) @ x

    report = audit(Does(attend), torch.randn(8, 16), mode="16-true", gradients=False)
    assert report.ok is not bad, report


@pytest.mark.parametrize("bad", [False, True])
def test_sparse_tensors_go_in_and_come_out(bad: bool) -> None:
    def spread(net: nn.Module, x: torch.Tensor) -> Any:
        y = net(x)
        if bad:
            y = variance(y + 30.0).expand_as(y)
        return (y * (x[:, :1] > 0)).to_sparse()

    report = audit(Does(spread), torch.randn(16, 16), mode="bf16-true", gradients=False)
    assert report.ok is not bad, report
    given = audit(
        lambda a: torch.sparse.mm(a, torch.ones(6, 2, dtype=a.dtype)), torch.eye(6).to_sparse(), mode="32-true"
    )
    assert given.ok, given


@pytest.mark.parametrize("bad", [False, True])
def test_nested_tensors_come_out(bad: bool) -> None:
    def pack(net: nn.Module, x: torch.Tensor) -> Any:
        y = net(x)
        y = variance(y + 30.0).expand_as(y) if bad else y
        return torch.nested.nested_tensor([y[:2].detach(), y[2:].detach()])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its nested tensors a prototype
        report = audit(Does(pack), torch.randn(7, 16), mode="bf16-true", gradients=False)
    assert report.ok is not bad, report


class Scripted(nn.Module):
    """Code that torch.jit compiles: no closures in it."""

    def __init__(self, bad: bool) -> None:
        super().__init__()
        self.net, self.bad = nn.Linear(16, 16), bad

    def forward(self, x: torch.Tensor) -> Any:
        y = self.net(x)
        if self.bad:
            y = y + 30.0
            return (y * y).mean(-1) - y.mean(-1) ** 2
        return (y - y.mean(-1, keepdim=True)).square().mean(-1)


@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.parametrize("bad", [False, True])
def test_modules_of_jit_are_judged(how: str, bad: bool) -> None:
    module, x = Scripted(bad), torch.randn(64, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        compile_: Any = torch.jit.script if how == "script" else torch.jit.trace
        compiled = compile_(module) if how == "script" else compile_(module, x)
    report = audit(compiled, x, mode="bf16-true", gradients=False)
    assert report.ok is not bad, report


@pytest.mark.parametrize("bad", [False, True])
def test_a_compiled_module_is_judged_as_compiled_and_blamed_in_eager(bad: bool) -> None:
    compiled: Any = torch.compile(Scripted(bad), backend="eager")
    report = audit(compiled, torch.randn(64, 16), mode="bf16-true", gradients=False)
    assert report.ok is not bad, report
    if bad:
        assert report.findings[0].op == "aten::sub", report
