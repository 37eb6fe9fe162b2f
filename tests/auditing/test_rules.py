"""The rules of the method, each by one module that is right and one that breaks it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from precision_runtime import audit
from precision_runtime.auditing.executing.noise import Noise
from precision_runtime.formats import FORMATS

HALF = ("16-true", "bf16-true", "16-mixed", "bf16-mixed")


@pytest.fixture(autouse=True)
def same_weights() -> None:
    torch.manual_seed(0)


# -- what is disturbed -------------------------------------------------------------------------------------------------


class Table(nn.Module):
    """Scales by a table and takes the sine, which a rounded table turns far; as a parameter its rounding is allowed."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        table = torch.linspace(100.03, 300.07, 32)
        if kind == "parameter":
            self.table = nn.Parameter(table)
        else:
            self.register_buffer("table", table)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.table.float() * x.float()).sin()


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_parameters_are_disturbed_and_buffers_are_not(kind: str) -> None:
    table = Table(kind)
    report = audit(lambda x: table(x) * 2.0, torch.ones(4, 32), mode="bf16-true", gradients=False)
    assert report.ok is (kind == "parameter"), report
    if kind == "buffer":
        assert report.findings[0].kind == "cast"


class Angle(nn.Module):
    def forward(self, position: torch.Tensor) -> torch.Tensor:
        return (position.float() * 0.37).sin()


def test_whole_numbers_beyond_the_exact_range_are_not_disturbed_so_their_cast_shows() -> None:
    positions = torch.arange(1000.0)
    # The second witness: bfloat16 holds whole numbers up to 2^8 only.
    assert float(torch.tensor(999.0).bfloat16()) == 1000.0
    report = audit(Angle(), positions, mode="bf16-true", gradients=False)
    assert not report.ok
    assert audit(Angle(), torch.arange(257.0), mode="bf16-true", gradients=False).ok
    assert audit(Angle(), positions, mode="16-true", gradients=False).ok  # 2^11 there
    assert audit(Angle(), positions + 0.3, mode="bf16-true", gradients=False).ok  # no count: its rounding is allowed


def test_inputs_that_the_mode_holds_exactly_are_not_disturbed() -> None:
    # x² - 1 near 1: with x disturbed by u anything goes, with x exact only its own roundings are allowed.
    def steep(x: torch.Tensor) -> torch.Tensor:
        return x * x - 1

    exact = 1 + torch.arange(1, 40) * 2.0**-7
    report = audit(steep, exact, mode="bf16-true", gradients=False)
    inexact = audit(steep, exact + 1e-3, mode="bf16-true", gradients=False)
    assert inexact.ok, inexact
    assert report.excess > 2 * inexact.excess


# -- range by logic ----------------------------------------------------------------------------------------------------


def test_an_overflow_inside_is_told_from_a_result_out_of_range() -> None:
    inside = audit(lambda x: (x * x).sum(-1).sqrt(), torch.full((2, 64), 100.0), mode="16-true", gradients=False)
    (finding,) = inside.findings
    assert finding.kind == "range"
    assert "an intermediate value left the range of the dtype" in finding.message
    assert finding.worst is not None
    assert finding.worst.reference == pytest.approx(800.0)  # sqrt(64 · 100²)
    outside = audit(lambda x: x * x, torch.full((2, 4), 300.0), mode="16-true", gradients=False)
    (finding,) = outside.findings
    assert finding.kind == "range"
    assert "the true value reaches 9e+04, beyond the largest value of this dtype, 65504" in finding.message
    assert audit(lambda x: x * x, torch.full((2, 4), 300.0), mode="bf16-true", gradients=False).ok


@pytest.mark.parametrize(("reach", "healthy"), [(2.0**3, True), (2.0**14, False)])
def test_a_gradient_of_a_sum_that_only_a_loss_scale_below_one_keeps_is_no_finding(reach: float, healthy: bool) -> None:
    model, x = nn.Linear(8, 1), torch.full((2**16, 8), reach)
    gradient = 2**16 * reach  # of the sum over all rows with respect to each weight; the audit's is within a fourth
    assert gradient > FORMATS["float16"].max
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=10**6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    while True:  # the other witness: where torch's own scaler settles
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(x).float().sum()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() == before:
            break
    assert gradient * before <= FORMATS["float16"].max < gradient * before * 2
    assert (before >= 2.0**-12) == healthy  # the smallest that is tried
    report = audit(model, x, mode="16-mixed")
    assert report.ok == healthy, report
    assert healthy or report.findings[0].kind == "range"


def test_what_is_lost_below_the_exponent_is_found_and_one_subnormal_step_is_not() -> None:
    def through(scale: float):  # type: ignore[no-untyped-def]
        return lambda x: x * scale

    x = torch.rand(64) + 0.5
    assert FORMATS["float16"].smallest_subnormal == 2.0**-24
    assert audit(through(1e-8), x, mode="16-true", gradients=False).ok  # within one step
    lost = audit(lambda x: (x * 1e-8) * 1e8, x, mode="16-true", gradients=False)
    assert not lost.ok
    assert lost.findings[0].worst is not None
    assert lost.findings[0].worst.value == 0.0
    assert audit(lambda x: (x * 1e-8) * 1e8, x, mode="bf16-true", gradients=False).ok


@pytest.mark.parametrize("mode", HALF)
@pytest.mark.parametrize("mask", ["finfo", "-inf", "-inf in place"])
def test_masks_are_no_finding(mode: str, mask: str) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = self.q(x) @ x.transpose(-1, -2)
            future = torch.ones(5, 5, dtype=torch.bool).triu(1)
            if mask == "finfo":
                logits = logits.masked_fill(future, torch.finfo(logits.dtype).min)
            elif mask == "-inf":
                logits = torch.where(future, -torch.inf, logits)
            else:
                logits.masked_fill_(future, -torch.inf)
            return torch.cat([logits, logits.softmax(-1)])

    report = audit(Masked(), torch.randn(5, 8), mode=mode, gradients=False)
    assert report.ok, report


class Router(nn.Module):
    """Shares that add up to 1: over one choice twice they are a half each, whatever the scores are."""

    def __init__(self, choices: tuple[int, int], narrow: bool = False) -> None:
        super().__init__()
        self.gate, self.choices, self.narrow = nn.Linear(16, 4, bias=False), list(choices), narrow

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = nn.functional.softplus(self.gate(x))[:, self.choices]
        if self.narrow:  # a share that is found by a long way round
            scores = (scores + 30.0) - 30.0
        return scores / scores.sum(-1, keepdim=True)


def test_a_gradient_that_is_exactly_zero_has_no_digits_to_lose() -> None:
    x = torch.randn(40, 16)
    same = Router((1, 1))
    shares = same(x)
    cotangent = torch.rand_like(shares) + 0.5
    (gradient,) = torch.autograd.grad(shares, same.gate.weight, cotangent)
    # The other witness: in FP32 it is nothing beside what one of its terms gives.
    (term,) = torch.autograd.grad(nn.functional.softplus(same.gate(x))[:, 1].log().sum(), same.gate.weight)
    assert float(gradient.abs().max()) < 1e-6 * float(term.abs().max())
    for mode in HALF:
        assert audit(same, x, mode=mode).ok, mode
        assert audit(Router((1, 2)), x, mode=mode).ok, mode
    for mode in ("16-true", "bf16-true"):
        assert not audit(Router((1, 2), narrow=True), x, mode=mode).ok, mode


# -- the mode itself ---------------------------------------------------------------------------------------------------


class LocalAttention(nn.Module):
    """Attention to the last four places, by hand: a place that is padding, too, is masked twice."""

    def __init__(self, constant: float | None = None) -> None:
        super().__init__()
        self.project, self.constant = nn.Linear(16, 48), constant

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x).chunk(3, -1)
        places = torch.arange(x.shape[1])
        near = (places[:, None] >= places) & (places[:, None] < places + 4)
        scores = q.float() @ k.float().mT
        scores = scores.masked_fill(~near, torch.finfo(scores.dtype).min)
        constant = torch.finfo(v.dtype).min if self.constant is None else self.constant
        scores = scores + (padding * torch.tensor(constant, dtype=v.dtype))[:, None, :]
        return scores.softmax(-1).to(v.dtype) @ v


@pytest.mark.parametrize("mode", HALF)
def test_rows_of_a_softmax_that_are_masked_entirely_have_no_right_result(mode: str) -> None:
    model, x, padding = LocalAttention(), torch.randn(2, 12, 16), torch.zeros(2, 12)
    padding[1, -4:] = 1.0  # the last row sees nothing else
    with torch.no_grad():
        half = LocalAttention().half()
        half.load_state_dict(model.state_dict())
        single, low = model(x, padding), half(x.half(), padding.half()).float()
    assert torch.allclose(single[:, :-1], low[:, :-1], atol=2e-2)  # the other witness: all rows but
    assert not torch.allclose(single[1, -1], low[1, -1], atol=1e-1)  # the one that is masked entirely
    assert audit(model, x, padding, mode=mode).ok


def test_a_masked_row_that_becomes_nan_is_found() -> None:
    x, padding = torch.randn(2, 12, 16), torch.zeros(2, 12)
    padding[1, -2:] = 1.0
    report = audit(LocalAttention(-1e10), x, padding, mode="16-true")  # -1e10 is -inf there, and 0 * -inf is NaN
    assert not report.ok
    assert report.findings[0].kind == "range"
    assert audit(LocalAttention(-1e10), x, padding, mode="bf16-true").ok


def test_a_row_whose_scores_float32_swallows_has_no_right_result() -> None:
    x, padding = torch.randn(2, 12, 16), torch.zeros(2, 12)
    padding[1, -4:] = 1.0  # the last row sees nothing else
    model = LocalAttention(-1e10)
    single, double = model(x, padding), copy.deepcopy(model).double()(x.double(), padding.double())
    # The other witness: what FP64 still tells apart in that row, float32 does not; every other row is the same.
    assert torch.allclose(single[:, :-1].double(), double[:, :-1], atol=1e-5)
    assert not torch.allclose(single[1, -1].double(), double[1, -1], atol=1e-2)
    assert audit(model, x, padding, mode="bf16-true").ok


class Additive(nn.Module):
    """Attention by hand with a mask that is added to the scores in their own dtype, or set in its place."""

    def __init__(self, adds: bool) -> None:
        super().__init__()
        self.project, self.adds = nn.Linear(16, 48), adds
        nn.init.normal_(self.project.weight)

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x).chunk(3, -1)
        scores, least = q @ k.mT, torch.finfo(v.dtype).min
        places = torch.arange(x.shape[1])
        blocked = (places[:, None] < places) | ~keep[:, None, :]
        if self.adds:
            scores = scores + torch.zeros_like(scores).masked_fill(blocked, least)
        else:
            scores = scores.masked_fill(blocked, least)
        return scores.softmax(-1).to(v.dtype) @ v


def test_a_score_that_its_mask_makes_infinite_is_found_though_its_row_is_masked_entirely() -> None:
    x, keep = torch.randn(2, 12, 16), torch.ones(2, 12, dtype=torch.bool)
    keep[1, :4] = False  # the first rows see nothing at all
    with torch.no_grad():
        scores = torch.stack([q @ k.mT for q, k, _ in [Additive(True).project(x).chunk(3, -1)]])
        assert float(scores.min()) < -32.0  # float16 has steps of 32 there: -65504 - 32 is -inf
    model = Additive(adds=True)
    for mode in ("16-true", "16-mixed"):
        assert not audit(model, x, keep, mode=mode, gradients=False).ok, mode
        assert audit(Additive(adds=False), x, keep, mode=mode, gradients=False).ok, mode
    for mode in ("bf16-true", "bf16-mixed"):
        assert audit(model, x, keep, mode=mode, gradients=False).ok, mode


class Heads(nn.Module):
    """Attention by hand; the mask is the result of another module, and what comes from there is disturbed."""

    def __init__(self, cancels: bool = False) -> None:
        super().__init__()
        self.project, self.mask, self.cancels = nn.Linear(16, 48), nn.Identity(), cancels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x).chunk(3, -1)
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        mask = self.mask(torch.zeros_like(future, dtype=x.dtype).masked_fill(future, torch.finfo(x.dtype).min))
        if self.cancels:
            v = (v + 100.0) - 100.0
        return nn.functional.scaled_dot_product_attention(q, k, v, mask)


def test_nothing_becomes_infinite_by_being_disturbed() -> None:
    largest = torch.finfo(torch.float64).max
    mask = torch.tensor([0.0, -largest, 1.5, -math.inf, largest], dtype=torch.float64)
    seen = [Noise(2.0**-8, 0, number)(mask.repeat(50)).view(50, 5) for number in range(3)]
    for values in seen:
        assert torch.equal(values.isfinite(), mask.isfinite().expand(50, 5))
        assert values[:, 2].unique().numel() == 50
    assert (mask[1] * (1 + 2.0**-8)).isinf()  # what a rounding of that size would make of it


@pytest.mark.parametrize("mode", HALF)
def test_masks_that_a_module_returns_are_no_finding(mode: str) -> None:
    x = torch.randn(2, 12, 16)
    assert audit(Heads(), x, mode=mode).ok
    assert not audit(Heads(cancels=True), x, mode=mode).ok


class Indexer(nn.Module):
    """The four earlier places whose keys fit best; the first rows have fewer, and take some that are masked."""

    def __init__(self, coarse: bool = False) -> None:
        super().__init__()
        self.project, self.coarse = nn.Linear(16, 32), coarse

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k = self.project(x).chunk(2, -1)
        scores = q @ k.mT
        if self.coarse:
            scores = scores + 1000.0  # swallows most of a score's digits
        return (scores + mask).topk(4).indices


class Indexed(nn.Module):
    def __init__(self, coarse: bool = False) -> None:
        super().__init__()
        self.indexer = Indexer(coarse)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return self.indexer(x, future * torch.tensor(torch.finfo(x.dtype).min, dtype=x.dtype))


@pytest.mark.parametrize("mode", HALF)
def test_a_choice_among_masked_places_is_no_decision(mode: str) -> None:
    model, x = Indexed(), torch.randn(4, 12, 16)
    assert audit(model, x, mode=mode, gradients=False).ok
    if mode != "bf16-true":  # where rounding the products tips a tenth as many, about as much as is granted
        assert not audit(Indexed(coarse=True), x, mode=mode, gradients=False).ok


def test_float16_and_float64_choose_other_masked_places() -> None:  # the other witness for the test above
    scores, seen = torch.randn(200, 12).half(), 2
    mask = torch.zeros(12, dtype=torch.float16)
    mask[seen:] = torch.finfo(torch.float16).min
    low, wide = (scores + mask).topk(4).indices, (scores.double() + mask.double()).topk(4).indices
    assert torch.equal(low[:, :seen].sort(-1).values, wide[:, :seen].sort(-1).values)
    assert not torch.equal(low[:, seen:], wide[:, seen:])


class KeepsItsWeights(nn.Module):
    """Holds its weights where no cast reaches them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.float() @ torch.eye(8)) * self.scale


class FromIndices(KeepsItsWeights):
    """The same, with nothing floating going in."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (torch.nn.functional.one_hot(x, 8).float() @ torch.eye(8)) * self.scale


@pytest.mark.parametrize("floating", [False, True])
def test_a_mode_that_was_not_applied_is_a_finding(floating: bool) -> None:
    if floating:
        report = audit(KeepsItsWeights(), torch.randn(4, 8), mode="16-true", gradients=False)
    else:
        report = audit(FromIndices(), torch.arange(8), mode="16-true", gradients=False)
    (finding,) = report.findings
    assert finding.kind == "not-applied"
    assert finding.message == "the mode was not applied: no op produced float16, every matrix product ran in float32"


def test_autocast_switched_off_around_every_product_is_a_remark() -> None:
    linear = nn.Linear(8, 8)

    def island(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return linear(x)

    report = audit(island, torch.randn(4, 8), mode="bf16-mixed")
    assert report.ok, report
    assert [r.kind for r in report.remarks] == ["not-applied"]


class CastsUp(nn.Module):
    """Keeps its weights in half, as the mode says, and computes in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x.float(), self.linear.weight.float(), self.linear.bias.float())


@pytest.mark.parametrize("mode", ["16-true", "bf16-true"])
def test_code_that_casts_up_what_the_mode_has_stored_is_a_remark(mode: str) -> None:
    report = audit(CastsUp(), torch.randn(4, 8), mode=mode, gradients=False)
    assert report.ok, report
    assert [r.kind for r in report.remarks] == ["not-applied"]


def test_an_applied_mode_is_not_called_unapplied() -> None:
    for mode in HALF:
        assert audit(nn.Linear(8, 8), torch.randn(4, 8), mode=mode).ok


class Siren(nn.Module):
    """A sine layer with a frequency of 30 behind a linear layer that autocast runs in half."""

    def __init__(self, island: bool) -> None:
        super().__init__()
        self.linear, self.island = nn.Linear(16, 16), island

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.island:
            with torch.autocast("cpu", enabled=False):
                return torch.sin(300 * nn.functional.linear(x.float(), self.linear.weight))
        return torch.sin(300 * nn.functional.linear(x, self.linear.weight).float())


@pytest.mark.parametrize("mode", ["16-mixed", "bf16-mixed"])
def test_a_steep_function_under_autocast_is_an_amplification_and_an_island_cures_it(mode: str) -> None:
    x = torch.randn(32, 16) * 0.2
    report = audit(nn.Sequential(nn.Identity(), Siren(False)), x, mode=mode, gradients=False)
    assert report.findings[0].kind == "amplification", report
    assert report.findings[0].module == "1"
    assert "wrap it in torch.autocast(enabled=False)" in report.findings[0].message
    cured = audit(nn.Sequential(nn.Identity(), Siren(True)), x, mode=mode, gradients=False)
    assert cured.ok, cured


def test_the_same_steepness_in_a_true_mode_is_a_remark() -> None:
    report = audit(
        nn.Sequential(nn.Identity(), Siren(False)), torch.randn(32, 16) * 0.2, mode="16-true", gradients=False
    )
    assert report.ok, report
    assert "ill-conditioned" in [r.kind for r in report.remarks]


# -- the full modes ----------------------------------------------------------------------------------------------------


class Variance(nn.Module):
    def __init__(self, bad: bool) -> None:
        super().__init__()
        self.bad = bad

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.bad:
            return x.square().mean(-1) - x.mean(-1).square()
        return (x - x.mean(-1, keepdim=True)).square().mean(-1)


@pytest.mark.parametrize("mode", ["32-true", "64-true"])
def test_a_variance_that_cancels_fails_in_32_true_and_holds_in_64_true(mode: str) -> None:
    x = torch.randn(64, 128, dtype=torch.float64) + 1000.0
    healthy = audit(nn.Sequential(Variance(False)), x, mode=mode, gradients=False)
    assert healthy.ok, healthy
    report = audit(nn.Sequential(Variance(True)), x, mode=mode, gradients=False)
    assert report.ok is (mode == "64-true"), report
    if mode == "32-true":
        assert report.findings[0].kind == "instability"
        # The second witness: torch itself, against float64. One rounding of x² is up to 10^6 · 2^-24 = 0.06.
        single = Variance(True)(x.float()).double()
        assert float((single - x.float().double().var(-1, correction=0)).abs().max()) > 0.02


@pytest.mark.parametrize("mode", ["32-true", "64-true"])
@pytest.mark.parametrize("gradients", [True, False])
def test_healthy_modules_hold_in_the_full_modes(mode: str, gradients: bool) -> None:
    net = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8), nn.Softmax(-1))
    report = audit(net, torch.randn(16, 32), mode=mode, gradients=gradients)
    assert report.ok, report


@pytest.mark.parametrize("mode", ["32-true", "64-true"])
def test_a_product_of_4096_terms_holds_in_the_full_modes(mode: str) -> None:
    net = nn.Linear(4096, 16)
    report = audit(net, torch.randn(8, 4096), mode=mode)
    assert report.ok, report
    assert math.isfinite(report.excess)


def test_an_attention_and_a_convolution_hold_in_32_true() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    assert audit(layer, torch.randn(2, 10, 32), mode="32-true").ok
    assert audit(nn.Conv2d(8, 8, 3), torch.randn(2, 8, 12, 12), mode="32-true").ok


def test_a_dtype_that_the_code_itself_narrows_to_in_64_true_is_what_counts() -> None:
    linear = nn.Linear(8, 8)
    report = audit(lambda x: linear(x.to(torch.float32).to(torch.float64)), torch.randn(4, 8), mode="64-true")
    assert report.ok, report


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_the_disturbance_of_a_large_tensor_keeps_nothing_for_the_backward_pass(dtype: torch.dtype) -> None:
    """Its gradient is what the numbers themselves say: t (1 + u xi) / t, times what comes in; and a second one, too."""
    t = (1.0 + torch.rand(2**20 + 100, dtype=torch.float64)).to(dtype).requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: kept.append(s.numel()), lambda _: None):
        disturbed = Noise(2.0**-8, 0, 0)(t)
    assert not kept
    weights = torch.linspace(1.0, 2.0, t.numel(), dtype=torch.float64).to(dtype).requires_grad_()
    (found,) = torch.autograd.grad(disturbed, t, weights, create_graph=True)
    factor = (disturbed / t).detach()
    torch.testing.assert_close(found, weights * factor, rtol=1e-14, atol=0.0)
    assert 0.99 * 2.0**-8 < float((factor - 1.0).abs().max()) <= 2.0**-8 * (1.0 + 1e-12)
    (second,) = torch.autograd.grad(found.real.sum(), weights)
    torch.testing.assert_close(second, factor, rtol=1e-14, atol=0.0)
