"""Sparse gradients, nested inputs, and code that differentiates by itself: right ones hold, wrong ones are found."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from precision_runtime import audit


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
