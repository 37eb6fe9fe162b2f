"""Sparse gradients, nested inputs, and code that differentiates by itself: right ones hold, wrong ones are found."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from precision_runtime import PrecisionRuntime, audit
from precision_runtime.errors import ConfigurationError


class Coarse(torch.autograd.Function):
    """Does nothing forward; backward keeps two bits of the gradient, as a step that compresses gradients may."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        if grad.dtype == torch.float64:  # the reference's: a formula that is right and was rounded on the way
            return grad
        mantissa, exponent = torch.frexp(grad.float())
        return torch.ldexp((mantissa * 4.0).round() / 4.0, exponent).to(grad.dtype)


class Looks(nn.Module):
    """A table of embeddings whose gradient is sparse."""

    def __init__(self, bad: bool) -> None:
        super().__init__()
        self.table, self.head, self.bad = nn.Embedding(40, 16, sparse=True), nn.Linear(16, 4), bad

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        found = self.table(tokens)
        return self.head(Coarse.apply(found) if self.bad else found)


@pytest.mark.parametrize("mode", ["16-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("bad", [False, True])
def test_sparse_gradients_are_judged(mode: str, bad: bool) -> None:
    torch.manual_seed(0)
    module = Looks(bad)
    report = audit(module, torch.randint(40, (3, 9)), mode=mode)
    assert report.ok is not bad, report
    assert module.table.weight.grad is None
    if bad:
        assert {f.where for f in report.findings} == {"backward"}, report


class Rows(nn.Module):
    """A network over sequences of different lengths, kept as one nested tensor."""

    def __init__(self, bad: bool) -> None:
        super().__init__()
        self.linear, self.bad = nn.Linear(8, 8), bad

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        packed = torch.nested.as_nested_tensor([first, second], layout=torch.jagged)
        values = self.linear(packed).values()
        return (values + 100.0) - 100.0 if self.bad else values


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("bad", [False, True])
def test_nested_tensors_inside_are_judged(bad: bool, gradients: bool) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its nested tensors a prototype
        report = audit(Rows(bad), torch.randn(3, 8), torch.randn(5, 8), mode="bf16-true", gradients=gradients)
    assert report.ok is not bad, report


class Force(nn.Module):
    """The negative gradient of an energy; the bad one measures it from far away."""

    def __init__(self, bad: bool) -> None:
        super().__init__()
        self.linear, self.bad = nn.Linear(6, 16), bad

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_() if x.is_leaf else x
        stretch = (x + 50.0) - 50.0 if self.bad else x
        energy = torch.tanh(self.linear(stretch)).square().sum() + stretch.square().sum()
        return -torch.autograd.grad(energy, x, create_graph=True)[0]


@pytest.mark.parametrize("mode", ["16-true", "bf16-true"])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("bad", [False, True])
def test_second_order_gradients_are_judged(mode: str, bad: bool, gradients: bool) -> None:
    torch.manual_seed(0)
    report = audit(Force(bad), torch.randn(12, 6), mode=mode, gradients=gradients)
    assert report.ok is not bad, report


class Penalty(nn.Module):
    """The penalty on a critic's gradient: its own gradient is of second order."""

    def __init__(self, bad: bool) -> None:
        super().__init__()
        self.critic, self.bad = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)), bad

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_() if x.is_leaf else x
        (grad,) = torch.autograd.grad(self.critic(x).sum(), x, create_graph=True)
        grad = grad * 1e-3  # as inputs in small units have it
        norm = grad.square().sum(-1).sqrt() if self.bad else grad.float().norm(dim=-1)
        return ((norm * 1e3 - 1.0).square()).to(x.dtype)


@pytest.mark.parametrize("bad", [False, True])
def test_a_gradient_penalty_that_squares_small_numbers_is_found(bad: bool) -> None:
    torch.manual_seed(0)
    report = audit(Penalty(bad), torch.randn(12, 6), mode="16-true")
    assert report.ok is not bad, report


class Stopped(torch.autograd.Function):
    """Does nothing forward, and gives no gradient at all backward, as quantized layers of torch do."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> None:
        return None


@pytest.mark.parametrize("mode", ["bf16-true", "16-mixed"])
def test_a_gradient_that_a_backward_pass_does_not_give_is_none_to_judge(mode: str) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(8, 8), nn.LSTM(8, 8, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Stopped.apply(self.one(x)) + Stopped.apply(self.other(x)[0]) + x

    torch.manual_seed(0)
    report = audit(Half(), torch.randn(4, 6, 8), mode=mode)
    assert report.ok, report


@pytest.mark.parametrize("mode", ["16-true", "bf16-mixed", "16-mixed", "32-true"])
@pytest.mark.parametrize("bad", [False, True])
def test_a_reentrant_checkpoint_is_judged_as_one_that_is_not(mode: str, bad: bool) -> None:
    first, last = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.GELU())

    def moments(y: torch.Tensor) -> torch.Tensor:
        y = last(y) + 30.0
        return (y * y).mean(-1) - y.mean(-1) ** 2 if bad else y.var(-1, correction=0)

    def code(x: torch.Tensor, reentrant: bool) -> Any:
        return checkpoint(moments, first(x), use_reentrant=reentrant)

    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    new, old = (audit(lambda x, r=r: code(x, r), x, mode=mode) for r in (False, True))
    assert new.ok is old.ok
    if bad:
        assert not old.ok, old
        assert [(f.module, f.where) for f in new.findings] == [(f.module, f.where) for f in old.findings]
    assert all(p.grad is None for p in (*first.parameters(), *last.parameters()))


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.parametrize("mode", ["16-true", "bf16-mixed", "32-true"])
def test_nested_tensors_go_in_and_come_out(mode: str, layout: torch.layout) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its nested tensors a prototype
        x = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)], layout=layout)
        assert audit(nn.Linear(8, 8), x, mode=mode).ok
        report = audit(lambda x: torch.sin(x * 1000.0 - x * 999.0), x, mode="16-true", gradients=False)
    assert not report.ok, report


def test_eight_bit_floats_go_in() -> None:
    x = torch.randn(4, 8).to(torch.float8_e4m3fn)
    assert audit(lambda x: x.float() * 2.0, x, mode="bf16-true").ok


def test_a_lazy_module_is_told_to_be_run_first() -> None:
    with pytest.raises(ConfigurationError, match=r"'the model itself' \(LazyLinear\) is a lazy layer"):
        audit(nn.LazyLinear(4), torch.randn(4, 8), mode="bf16-true")


def test_a_model_that_is_set_up_in_another_mode_is_refused() -> None:
    model = PrecisionRuntime("bf16-mixed").setup(nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8)))
    assert audit(model, torch.randn(4, 8), mode="bf16-mixed").ok
    with pytest.raises(ConfigurationError, match="is set up in bf16-mixed already"):
        audit(model, torch.randn(4, 8), mode="32-true")


def test_a_model_without_a_layer_for_eight_bits_is_said_to_have_none() -> None:
    report = audit(nn.Linear(7, 9), torch.randn(4, 7), mode="transformer-engine")
    assert report.ok
    assert [r.kind for r in report.remarks] == ["not-applied"]
