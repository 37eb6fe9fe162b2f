"""``audit`` on modules and functions of every shape: healthy twins hold, defective twins fail with the right name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from precision_runtime import PrecisionRuntime, audit
from precision_runtime.auditing import Originals
from precision_runtime.errors import ConfigurationError
from precision_runtime.record import Finding, Report
from pytest_precision.context import PrecisionContext

HALF = ("16-true", "bf16-true", "16-mixed", "bf16-mixed")


@pytest.fixture(autouse=True)
def same_weights() -> None:
    torch.manual_seed(0)


def only(report: Report, kind: str, where: str, module: str) -> Finding:
    """The first finding, which must be of this kind, in this place."""
    assert not report.ok, report
    first = report.findings[0]
    assert (first.kind, first.where, first.module) == (kind, where, module), report
    return first


class Norm(nn.Module):
    """A norm by two passes in float32, or by E[x²] - E[x]² in the dtype that comes in, which cancels."""

    def __init__(self, bad: bool = False) -> None:
        super().__init__()
        self.bad = bad

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = x.dtype
        if self.bad:
            variance = x.square().mean(-1, keepdim=True) - x.mean(-1, keepdim=True).square()
        else:
            x = x.float()
            variance = x.var(-1, keepdim=True, correction=0)
        return ((x - x.mean(-1, keepdim=True)) * torch.rsqrt(variance + 1e-3)).to(dtype)


class Block(nn.Module):
    def __init__(self, bad: bool = False) -> None:
        super().__init__()
        self.lift, self.norm, self.out = nn.Linear(16, 16), Norm(bad), nn.Linear(16, 4)
        nn.init.constant_(self.lift.bias, 10.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(self.lift(x)))


# -- one row, one direction --------------------------------------------------------------------------------------------


class OneRow(nn.Module):
    """Right everywhere but in one row, which is off by 5%: too little of the whole to show in a mean."""

    def __init__(self, bad: bool) -> None:
        super().__init__()
        self.linear, self.bad = nn.Linear(8, 8), bad

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        if self.bad and y.dtype == torch.float16:
            off = torch.ones(y.shape[0], 1, dtype=y.dtype)
            off[3] = 1.05
            y = y * off
        return y


def test_a_module_that_is_wrong_in_one_row_only_fails_and_the_row_is_shown() -> None:
    x = torch.randn(4000, 8)
    assert audit(OneRow(False), x, mode="16-true").ok
    report = audit(OneRow(True), x, mode="16-true")
    finding = only(report, "instability", "forward", "")
    assert finding.worst is not None
    assert finding.worst.index[0] == 3
    assert audit(OneRow(True), x, mode="bf16-true").ok  # it is wrong in one mode alone


def test_the_row_is_seen_by_its_tail_where_the_mean_error_would_let_it_pass() -> None:
    report = audit(OneRow(True), torch.randn(4000, 8), mode="16-true", gradients=False)
    assert "single elements are off by" in report.findings[0].message
    # The same row under the mean alone: 5% of 1/4000 of the squares, against u of the rest.
    share = 0.05 * (1 / 4000) ** 0.5 / (2.0**-11 / 3**0.5)
    assert share < 4


class RootInside(nn.Module):
    """sqrt(x²): the value is right at 0, the gradient there is 0 · inf."""

    def __init__(self, bad: bool) -> None:
        super().__init__()
        self.bad = bad

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # 1e-8 vanishes in float16 and keeps the gradient finite in float64.
        return (x.square().sum(-1) + (1e-8 if self.bad else 1e-3)).sqrt()


class Lengths(nn.Module):
    def __init__(self, bad: bool) -> None:
        super().__init__()
        self.first, self.length = nn.Linear(4, 4), RootInside(bad)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.length(self.first(x) * mask)


@pytest.mark.parametrize("bad", [False, True])
def test_a_nan_in_the_gradient_only_is_a_range_finding_in_backward_and_names_the_module(bad: bool) -> None:
    x, mask = torch.randn(6, 4), torch.ones(6, 1)
    mask[2] = 0.0
    report = audit(Lengths(bad), x, mask, mode="16-true")
    if not bad:
        assert report.ok, report
        return
    only(report, "range", "backward", "length")
    assert all(f.where == "backward" for f in report.findings)
    assert audit(Lengths(bad), x, mask, mode="16-true", gradients=False).lost_bits < 2


# -- randomness and state ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", HALF)
def test_dropout_holds_in_every_mode_for_its_mask_is_the_same(mode: str) -> None:
    net = nn.Sequential(nn.Linear(16, 64), nn.Dropout(0.5), nn.Linear(64, 8))
    assert audit(net, torch.randn(32, 16), mode=mode).ok


def test_a_defect_beside_a_dropout_is_still_found() -> None:
    report = audit(nn.Sequential(nn.Dropout(0.2), Block(True)), torch.randn(8, 16), mode="bf16-true")
    assert report.findings[0].module == "1.norm"


@pytest.mark.parametrize("mode", HALF)
def test_batch_norm_in_train_mode_holds_and_keeps_its_statistics(mode: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert audit(net, torch.randn(4, 3, 9, 9), mode=mode).ok
    assert net[1].num_batches_tracked == 0
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


class HandMadeBatchNorm(nn.Module):
    """Batch norm that uses its running statistics after updating them."""

    def __init__(self, bad: bool) -> None:
        super().__init__()
        self.bad = bad
        self.register_buffer("mean", torch.full((8,), 100.0))
        self.mean: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.bad:
            x = x.float()
        batch = x.mean(0)
        with torch.no_grad():
            self.mean.mul_(0.9).add_(batch.detach(), alpha=0.1)
        square = x.square().mean(0) - batch.square() if self.bad else (x - batch).square().mean(0)
        return ((x - batch) / (square + 1e-3).sqrt()).to(self.mean.dtype)


@pytest.mark.parametrize("bad", [False, True])
def test_a_hand_made_batch_norm_is_judged_by_its_formula_not_by_its_changing_buffer(bad: bool) -> None:
    net = nn.Sequential(nn.Linear(4, 8), HandMadeBatchNorm(bad))
    nn.init.constant_(net[0].bias, 20.0)
    report = audit(net, torch.randn(64, 4), mode="bf16-true")
    if bad:
        assert report.findings[0].module == "1"
    else:
        assert report.ok, report
    assert torch.equal(net[1].mean, torch.full((8,), 100.0))


class Cache:
    """A KV cache that grows, an object of no type that anybody knows."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values = keys, values

    def extend(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys = torch.cat([self.keys, k.to(self.keys.dtype)], 1)
        self.values = torch.cat([self.values, v.to(self.values.dtype)], 1)
        return self.keys.to(k.dtype), self.values.to(v.dtype)


class Attention(nn.Module):
    """Attention over a cache that is passed in; the bad twin adds a large constant to its logits and takes it away."""

    def __init__(self, bad: bool = False) -> None:
        super().__init__()
        self.bad = bad
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if cache is not None:
            k, v = cache.extend(k, v)
        logits = q @ k.transpose(1, 2)
        if self.bad:
            logits = (logits + 100.0) - 100.0
        return logits.softmax(-1) @ v


class TwoSteps(nn.Module):
    """Two tokens one after the other, each appended to the cache."""

    def __init__(self, bad: bool = False) -> None:
        super().__init__()
        self.attention = Attention(bad)

    def forward(self, x: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        return torch.cat([self.attention(x[:, :1], cache), self.attention(x[:, 1:], cache)], 1)


@pytest.mark.parametrize("mode", HALF)
def test_a_cache_in_kwargs_grows_anew_in_each_run_and_comes_back_as_it_was(mode: str) -> None:
    cache = Cache(torch.randn(2, 3, 8), torch.randn(2, 3, 8))
    keys, before = cache.keys, cache.keys.clone()
    report = audit(TwoSteps(), torch.randn(2, 2, 8), mode=mode, kwargs={"cache": cache}, gradients=False)
    assert report.ok, report
    assert not report.remarks
    assert cache.keys is keys
    assert torch.equal(keys, before)


@pytest.mark.parametrize("mode", ["16-true", "bf16-true"])
def test_a_gradient_that_flows_through_a_cache_into_an_earlier_call_is_no_finding(mode: str) -> None:
    cache = Cache(torch.randn(2, 3, 8), torch.randn(2, 3, 8))
    report = audit(TwoSteps(), torch.randn(2, 2, 8), mode=mode, kwargs={"cache": cache})
    assert report.ok, report


def test_a_defect_in_a_module_with_a_cache_is_found_there() -> None:
    cache = Cache(torch.randn(2, 3, 8), torch.randn(2, 3, 8))
    report = audit(TwoSteps(True), torch.randn(2, 2, 8), mode="bf16-true", kwargs={"cache": cache}, gradients=False)
    assert report.findings[0].module == "attention"


class CachesItself(nn.Module):
    """Keeps its past in an attribute, as streaming models do."""

    def __init__(self, bad: bool = False) -> None:
        super().__init__()
        self.inner, self.past, self.bad = nn.Linear(8, 8), [], bad

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.past.append(self.inner(x))
        y = torch.stack(self.past).sum(0)
        return torch.log(1 + y.abs() * 1e-2) if self.bad else torch.log1p(y.abs() * 1e-2)


@pytest.mark.parametrize("bad", [False, True])
def test_a_module_that_keeps_its_past_in_an_attribute_is_judged_call_by_call(bad: bool) -> None:
    cell = CachesItself(bad)

    def unrolled(x: torch.Tensor) -> torch.Tensor:
        return cell(x) + cell(x) + cell(x)

    report = audit(unrolled, torch.randn(4, 8), mode="16-true")
    assert report.ok is not bad, report
    if bad:
        assert report.findings[0].module == "cell"
    assert cell.past == []


class ChangesItsInput(nn.Module):
    def __init__(self, bad: bool = False) -> None:
        super().__init__()
        self.inner, self.bad = nn.Linear(8, 8), bad

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x += 1.0
        x.mul_(2.0)
        if self.bad:
            x.add_(500.0).sub_(500.0)
        return F.relu(self.inner(x), inplace=True)


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_a_module_that_changes_its_input_is_judged_on_what_it_was_given(bad: bool, nested: bool) -> None:
    x = torch.randn(4, 8)
    before = x.clone()
    inner = ChangesItsInput(bad)
    report = audit(nn.Sequential(nn.Linear(8, 8), inner) if nested else inner, x, mode="16-true")
    assert report.ok is not bad, report
    if bad:
        assert report.findings[0].module == ("1" if nested else "")
    assert torch.equal(x, before)


# -- what may be judged ------------------------------------------------------------------------------------------------


def softplus_by_hand(x: torch.Tensor) -> torch.Tensor:
    return torch.log(1 + torch.exp(x))


def test_a_function_without_any_module_is_judged_as_a_whole() -> None:
    x = torch.tensor([-1.0, 0.5, 20.0, 3.0])
    assert audit(F.softplus, x, mode="16-true").ok
    finding = only(audit(softplus_by_hand, x, mode="16-true"), "range", "forward", "")
    assert finding.worst is not None
    assert finding.worst.index == (2,)
    assert finding.worst.reference == pytest.approx(20.0, abs=1e-3)  # numpy.logaddexp(0, 20)


@pytest.mark.parametrize("mode", ["bf16-true", "16-mixed"])
@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("shape", ["lambda", "bound method", "partial", "object", "module"])
def test_a_module_is_found_behind_whatever_is_called(mode: str, bad: bool, shape: str) -> None:
    net = Block(bad)

    class Owner:
        def __init__(self) -> None:
            self.net = net

        def run(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

    functions: dict[str, tuple[Callable[..., Any], str]] = {
        "lambda": (lambda x: net(x).tanh(), "net.norm"),
        "bound method": (net.forward, "norm"),
        "partial": (functools.partial(net), "norm"),
        "object": (Owner().run, "net.norm"),
        "module": (net, "norm"),
    }
    function, name = functions[shape]
    report = audit(function, torch.randn(8, 16), mode=mode)
    if not bad:
        assert report.ok, report
    else:
        assert report.findings[0].module == name
        assert report.findings[0].module_type == "Norm"
        assert report.findings[0].where == "forward"


# -- weights that were cast, and weights that were trained since -------------------------------------------------------


class Rotary(nn.Module):
    """Angles from a table of frequencies, as rotary embeddings compute them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 10000.0 ** -(torch.arange(0, 64, 2) / 64), persistent=False)
        self.inv_freq: torch.Tensor

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        angle = positions.float()[:, None] * self.inv_freq.float()
        return torch.cat([angle.cos(), angle.sin()], -1)


def test_a_cast_buffer_is_found_with_kind_cast_and_the_figure_without_the_cast() -> None:
    rotary = Rotary()
    report = audit(lambda p: rotary(p) * 2.0, torch.arange(500), mode="bf16-true")
    finding = only(report, "cast", "forward", "rotary")
    assert "`inv_freq`" in finding.message
    assert finding.suggestion is not None
    assert finding.suggestion.startswith("with `inv_freq` kept in fp32 the loss falls from ")
    assert finding.suggestion.endswith("to 0.0 bits")
    assert audit(Rotary(), torch.arange(500), mode="bf16-mixed").ok  # nothing is cast there


def test_a_cast_buffer_of_the_judged_module_itself_is_a_cast_too() -> None:
    only(audit(Rotary(), torch.arange(500), mode="bf16-true"), "cast", "forward", "")


def test_a_buffer_whose_cast_costs_nothing_is_no_finding() -> None:
    rotary = Rotary()
    rotary.inv_freq.copy_(rotary.inv_freq.bfloat16())
    assert audit(rotary, torch.arange(500), mode="bf16-true").ok


@pytest.mark.parametrize("remembered", [True, False])
def test_the_originals_tell_a_cast_that_happened_before_the_audit(remembered: bool) -> None:
    rotary, originals = Rotary(), Originals()
    if remembered:
        originals.remember(rotary)
    PrecisionRuntime("bf16-true", "cpu").setup(rotary)
    originals.settle(rotary)
    assert audit(rotary, torch.arange(500), mode="bf16-true", originals=originals).ok is not remembered


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("mode", HALF)
def test_a_module_trained_between_setup_and_check_is_judged_with_its_present_weights(mode: str, bad: bool) -> None:
    net, originals = Block(bad), Originals()
    originals.remember(net)
    runtime = PrecisionRuntime(mode, "cpu")
    optimizer = torch.optim.SGD(net.out.parameters(), lr=0.05)  # what the norm gets stays as it was
    runtime.setup(net, optimizer)
    originals.settle(net)
    x = torch.randn(32, 16)
    before = net.out.weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        runtime.backward(net(x).float().square().mean())
        runtime.step(optimizer)
    assert not torch.equal(net.out.weight, before) or bad  # a bad norm may have made the scaler skip
    report = audit(net, x, mode=mode, originals=originals)
    if bad:
        assert report.findings[0].module == "norm"
    else:
        assert report.ok, report
    assert net.out.weight.dtype == (torch.float32 if "mixed" in mode else getattr(torch, _dtype(mode)))


@pytest.mark.parametrize("mode", HALF)
def test_a_module_trained_through_the_plugins_context_is_judged_with_its_present_weights(mode: str) -> None:
    context = PrecisionContext(mode, "cpu")
    net = Block()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, eps=1e-4)
    context.setup(net, optimizer)
    x = context.randn(32, 16)
    for _ in range(3):
        optimizer.zero_grad()
        context.backward(net(x.to(context.dtype)).float().square().mean())
        context.step(optimizer)
    assert context.check(net, x).ok


@pytest.mark.parametrize("train", [False, True])
def test_the_plugins_context_tells_an_untrained_weight_from_a_trained_one(train: bool) -> None:
    context = PrecisionContext("bf16-true", "cpu")
    rotary = context.setup(Rotary())
    if train:  # as good as training: another value, whatever it was before, is now the truth
        rotary.inv_freq.mul_(0.5)
        assert context.check(rotary, torch.arange(500)).ok
    else:
        with pytest.raises(AssertionError, match="Rotary fails in bf16-true on cpu: "):
            context.check(rotary, torch.arange(500))


def _dtype(mode: str) -> str:
    return "float16" if mode.startswith("16") else "bfloat16"


def test_without_originals_a_weight_far_from_any_half_value_is_taken_as_it_is_now() -> None:
    net = nn.Linear(8, 8)
    originals = Originals()
    originals.remember(net)
    originals.settle(net)
    with torch.no_grad():
        net.weight.mul_(2.0)
    assert audit(net, torch.randn(3, 8), mode="16-true", originals=originals).ok
    # The same with an original that claims to be current: off by a factor of two, which must show.
    stale = Originals()
    stale.remember(net)
    with torch.no_grad():
        net.weight.mul_(2.0)
    assert not audit(net, torch.randn(3, 8), mode="16-true", originals=stale).ok


# -- repeated, shared and tied -----------------------------------------------------------------------------------------


class Repeats(nn.Module):
    def __init__(self, bad: bool) -> None:
        super().__init__()
        self.lift, self.norm = nn.Linear(16, 16), Norm(bad)
        nn.init.constant_(self.lift.bias, 10.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = x + self.norm(self.lift(x))
        return x


@pytest.mark.parametrize("bad", [False, True])
def test_a_module_called_three_times_is_judged_three_times_and_named_once(bad: bool) -> None:
    report = audit(Repeats(bad), torch.randn(8, 16), mode="bf16-true")
    assert report.calls == 7
    assert report.ok is not bad
    if bad:
        forward = [f for f in report.findings if f.where == "forward"]
        assert [f.module for f in forward].count("norm") == 1
        assert forward[0].module == "norm"


@pytest.mark.parametrize("bad", [False, True])
def test_a_shared_module_is_named_by_its_first_path(bad: bool) -> None:
    norm = Norm(bad)
    lift = nn.Linear(16, 16)
    nn.init.constant_(lift.bias, 10.0)
    report = audit(nn.Sequential(lift, norm, lift, norm), torch.randn(8, 16), mode="bf16-true")
    assert report.ok is not bad, report
    if bad:
        assert report.findings[0].module == "1"
        assert {f.module for f in report.findings} <= {"1", ""}


class Tied(nn.Module):
    """Embedding and head share one weight, whose gradient is the sum over both uses."""

    def __init__(self, bad: bool = False) -> None:
        super().__init__()
        self.wte, self.mix, self.norm = nn.Embedding(50, 16), nn.Linear(16, 16), Norm(bad)
        nn.init.constant_(self.mix.bias, 10.0)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.mix(self.wte(ids))))


@pytest.mark.parametrize("mode", HALF)
def test_tied_weights_are_no_finding(mode: str) -> None:
    net = Tied()
    report = audit(net, torch.randint(0, 50, (4, 6)), mode=mode)
    assert report.ok, report
    assert net.head.weight is net.wte.weight


def test_a_defect_beside_tied_weights_is_named() -> None:
    assert audit(Tied(True), torch.randint(0, 50, (4, 6)), mode="bf16-true").findings[0].module == "norm"


class InChunks(nn.Module):
    """One weight used in many places; its gradient, where summed by hand in the low dtype, loses bits."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = F.linear(x, self.weight)
        return self.inner(F.linear(a.tanh(), self.weight)) + F.linear(x, self.inner.weight)


@pytest.mark.parametrize("mode", HALF)
def test_a_weight_used_in_several_places_is_no_finding(mode: str) -> None:
    assert audit(InChunks(), torch.randn(16, 8), mode=mode).ok


# -- what goes in and comes out ----------------------------------------------------------------------------------------


@dataclass
class Result:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...]
    note: str = "kept"


class OutputLike(dict):  # type: ignore[type-arg]
    """A mapping with attributes, as Hugging Face outputs are."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Returns(nn.Module):
    def __init__(self, shape: str, bad: bool) -> None:
        super().__init__()
        self.shape, self.block = shape, Block(bad)

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor, options: dict[str, Any]) -> Any:
        y = self.block(x) * scale + options["shift"]
        count = torch.tensor(x.shape[0])
        return {
            "dataclass": lambda: Result(y, (x * 2,)),
            "object": lambda: OutputLike(logits=y, hidden=[x * 2], count=count),
            "dict": lambda: {"logits": y, "none": None, "deep": {"x": (x * 2, 3, "text")}},
        }[self.shape]()


class Reads(nn.Module):
    """Calls a module by keyword arguments and reads its object."""

    def __init__(self, shape: str, bad: bool) -> None:
        super().__init__()
        self.inner = Returns(shape, bad)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        out = self.inner(x=x, scale=scale, options={"shift": 0.5})
        return out["logits"] if isinstance(out, dict) else out.logits


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("shape", ["dataclass", "object", "dict"])
@pytest.mark.parametrize("nested", [False, True])
def test_objects_come_out_and_keywords_go_in(shape: str, bad: bool, nested: bool) -> None:
    kwargs: dict[str, Any] = {"scale": torch.tensor(1.5)}
    net: nn.Module = Reads(shape, bad) if nested else Returns(shape, bad)
    if not nested:
        kwargs["options"] = {"shift": torch.tensor(0.5)}
    report = audit(net, torch.randn(8, 16), mode="bf16-true", kwargs=kwargs)
    assert report.ok is not bad, report
    assert not report.remarks
    if bad:
        assert report.findings[0].module == ("inner.block.norm" if nested else "block.norm")


# -- backward ----------------------------------------------------------------------------------------------------------


class BadBackward(torch.autograd.Function):
    """y = 3x, whose gradient is computed right, or with a tenth of itself lost."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bad: bool) -> torch.Tensor:
        ctx.bad = bad
        return x * 3

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        low = grad.dtype in (torch.float16, torch.bfloat16)
        return grad * (2.7 if ctx.bad and low else 3.0), None


class Custom(nn.Module):
    def __init__(self, bad: bool) -> None:
        super().__init__()
        self.bad = bad

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return BadBackward.apply(x, self.bad)  # type: ignore[no-any-return, no-untyped-call]


@pytest.mark.parametrize("mode", ["16-true", "bf16-mixed"])
@pytest.mark.parametrize("bad", [False, True])
def test_a_custom_autograd_function_is_judged_in_backward(mode: str, bad: bool) -> None:
    net = nn.Sequential(nn.Linear(8, 8), Custom(bad), nn.Linear(8, 8))
    report = audit(net, torch.randn(16, 8), mode=mode)
    if bad:
        finding = only(report, "instability", "backward", "1")
        assert finding.worst is not None
        assert finding.worst.tensor == "grad of input[0]"
    else:
        assert report.ok, report


def test_a_gradient_is_judged_with_the_gradient_that_really_came_in() -> None:
    # The last module's gradient is wrong; all modules before it hand on what they got, rightly, and are not blamed.
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Sequential(Custom(True)))
    report = audit(net, torch.randn(16, 8), mode="bf16-true")
    assert {f.module for f in report.findings} == {"3", ""} or {f.module for f in report.findings} == {"3.0", ""}


class Checkpointed(nn.Module):
    def __init__(self, bad: bool, reentrant: bool) -> None:
        super().__init__()
        self.first, self.block, self.reentrant = nn.Linear(16, 16), Block(bad), reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.block, self.first(x), use_reentrant=self.reentrant)  # type: ignore[no-any-return]


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("mode", ["bf16-true", "16-mixed"])
def test_a_recomputed_segment_is_judged_like_any_other(bad: bool, mode: str) -> None:
    report = audit(Checkpointed(bad, False), torch.randn(8, 16), mode=mode)
    if not bad:
        assert report.ok, report
    else:
        assert report.findings[0].module == "block.norm"


class Reversed(torch.autograd.Function):
    """y1 = x1 + f(x2), y2 = x2 + g(y1); backward rebuilds the inputs from the outputs."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, f: nn.Module, g: nn.Module, *weights: torch.Tensor) -> torch.Tensor:
        ctx.f, ctx.g = f, g
        x1, x2 = x.chunk(2, -1)
        with torch.no_grad():
            y1 = x1 + f(x2)
            y2 = x2 + g(y1)
        out = torch.cat([y1, y2], -1)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        y1, y2 = (t.detach().requires_grad_() for t in ctx.saved_tensors[0].chunk(2, -1))
        d1, d2 = grad.chunk(2, -1)
        gw, fw = list(ctx.g.parameters()), list(ctx.f.parameters())
        with torch.enable_grad():
            gy = ctx.g(y1)
        into_y1, *for_g = torch.autograd.grad(gy, [y1, *gw], d2)
        d1 = d1 + into_y1
        x2 = (y2 - gy).detach().requires_grad_()
        with torch.enable_grad():
            fx = ctx.f(x2)
        into_x2, *for_f = torch.autograd.grad(fx, [x2, *fw], d1)
        return torch.cat([d1, d2 + into_x2], -1), None, None, *for_f, *for_g


class Reversible(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = [*self.f.parameters(), *self.g.parameters()]
        return Reversed.apply(x, self.f, self.g, *weights)  # type: ignore[no-any-return, no-untyped-call]


@pytest.mark.parametrize("mode", ["16-true", "bf16-true"])
def test_a_reversible_block_holds(mode: str) -> None:
    report = audit(nn.Sequential(nn.Linear(16, 16), Reversible()), torch.randn(32, 16), mode=mode)
    assert report.ok, report


class SmallLoss(nn.Module):
    """A right output whose gradient, unscaled, is below everything that float16 holds."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x).float() * 1e-9


def test_the_loss_is_scaled_in_16_mixed_as_a_scaler_would() -> None:
    net, x = SmallLoss(), torch.randn(16, 64)
    scaled = audit(net, x, mode="16-mixed")
    assert scaled.ok, scaled
    assert scaled.figures["loss_scale"] == 2.0**16
    bfloat = audit(net, x, mode="bf16-mixed")
    assert bfloat.ok, bfloat
    assert "loss_scale" not in bfloat.figures


def test_without_a_scaler_a_gradient_that_is_flushed_to_zero_is_an_underflow() -> None:
    report = audit(SmallLoss(), torch.randn(16, 64), mode="16-true")
    assert report.findings, report
    assert {(f.kind, f.where) for f in report.findings} == {("underflow", "backward")}
    # The second witness: 1e-9 is under half the smallest subnormal of binary16, 2^-24.
    assert 1.25e-9 < 2.0**-25


def test_a_scale_that_overflows_is_halved_until_gradients_are_finite() -> None:
    net = nn.Linear(16, 16)
    report = audit(lambda x: net(x) * 300.0, torch.randn(8, 16), mode="16-mixed")
    assert report.ok, report
    assert report.figures["loss_scale"] < 2.0**16


# -- what the call refuses ---------------------------------------------------------------------------------------------


def test_something_that_cannot_be_called_is_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigurationError, match=r"audit\(\) got Tensor as the function to judge; pass a module"):
        audit(torch.ones(2), torch.ones(2), mode="16-true")  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", [-1.0, float("nan")])
def test_a_budget_below_zero_is_refused(budget: float) -> None:
    with pytest.raises(ConfigurationError, match="the bits that may be lost are a number from 0 up"):
        audit(nn.Linear(2, 2), torch.ones(1, 2), mode="16-true", budget=budget)


def test_a_larger_budget_lets_more_pass() -> None:
    net, x = Block(True), torch.randn(8, 16)
    report = audit(net, x, mode="16-true")
    assert 2.0 < report.lost_bits < 10.0
    assert audit(net, x, mode="16-true", budget=10.0).ok
    assert not audit(net, x, mode="16-true", budget=report.lost_bits - 1).ok
