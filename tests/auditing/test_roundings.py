"""What autocast does not round is not excused as if it did: float32 data beside products, and before constant ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from precision_runtime import audit
from precision_runtime.auditing.executing.dispatch import LowWatch
from precision_runtime.auditing.executing.roundings import Roundings

MIXED = ["16-mixed", "bf16-mixed"]


def draws(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class LeanCosine(torch.autograd.Function):
    """A cosine that keeps its phase in half for the backward pass, to save memory."""

    @staticmethod
    def forward(ctx: Any, phase: torch.Tensor, lean: bool) -> torch.Tensor:
        ctx.save_for_backward(phase.bfloat16() if lean else phase)
        return torch.cos(phase)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (phase,) = ctx.saved_tensors
        return -grad * torch.sin(phase.to(grad.dtype)), None


class Cosine(nn.Module):
    def __init__(self, lean: bool) -> None:
        super().__init__()
        self.lean = lean

    def forward(self, phase: torch.Tensor) -> torch.Tensor:
        """Radians in, of any shape."""
        return LeanCosine.apply(phase, self.lean and torch.is_autocast_enabled("cpu"))


class Times(nn.Module):
    """Features of points in time, which a linear layer mixes."""

    def __init__(self, lean: bool) -> None:
        super().__init__()
        self.cosine, self.mix = Cosine(lean), nn.Linear(12, 4)
        self.rate = nn.Parameter(torch.logspace(0, -2, 12))

    def forward(self, times: torch.Tensor) -> torch.Tensor:
        """Shape (n,) in seconds, (n, 4) out."""
        return self.mix(self.cosine(times[:, None] * self.rate))


@pytest.mark.parametrize("mode", MIXED)
def test_a_phase_that_only_the_backward_pass_rounds_is_found(mode: str) -> None:
    times = torch.rand(64, generator=torch.Generator().manual_seed(0)) * 600.0
    torch.manual_seed(0)
    report = audit(Times(lean=True), times, mode=mode)
    assert report.findings[0].module == "cosine", str(report)
    assert report.findings[0].where == "backward"
    torch.manual_seed(0)
    assert audit(Times(lean=False), times, mode=mode).ok


class Filter(nn.Module):
    """Pre-emphasis: each sample less 0.97 of the one before, as a convolution with constants."""

    taps: torch.Tensor

    def __init__(self, island: bool) -> None:
        super().__init__()
        self.island = island
        self.register_buffer("taps", torch.tensor([[[-0.97, 1.0]]]))

    def forward(self, sound: torch.Tensor) -> torch.Tensor:
        """Shape (n, t) in, (n, t - 1) out."""
        with torch.autocast("cpu", enabled=torch.is_autocast_enabled("cpu") and not self.island):
            return torch.nn.functional.conv1d(sound[:, None], self.taps.to(sound.dtype))[:, 0]


@pytest.mark.parametrize("mode", MIXED)
def test_data_that_a_constant_filter_rounds_is_no_price_of_autocast(mode: str) -> None:
    sound = torch.sin(torch.arange(1600.0) * 0.04) + 1e-3 * draws(3, 1600)
    report = audit(Filter(island=False), sound, mode=mode)
    assert not report.ok
    assert report.findings[0].op == "aten::convolution", str(report)
    assert audit(Filter(island=True), sound, mode=mode).ok


@pytest.mark.parametrize("mode", MIXED)
@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: torch.softmax(20.0 * a @ b.T, -1),  # activations that a test passes, for all that is known
        lambda a, b: (a @ b.T - 1.0).square(),
    ],
    ids=["softmax", "difference"],
)
def test_a_product_of_data_with_data_may_cost_what_its_rounding_does(mode: str, function: Callable[..., Any]) -> None:
    a, b = (torch.nn.functional.normalize(draws(16, 8) + shift, dim=-1) for shift in (0.0, 0.3))
    assert audit(function, a, b, mode=mode).ok


class Distances(nn.Module):
    """How far points lie from a centre that is learned, far from the origin: subtracted in float32, or in half."""

    def __init__(self, coarse: bool) -> None:
        super().__init__()
        self.coarse, self.centre = coarse, nn.Parameter(torch.full((3,), 100.0))

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        """Shape (n, 3) in, (n,) out."""
        if self.coarse and torch.is_autocast_enabled("cpu"):
            points = points.to(torch.get_autocast_dtype("cpu"))  # nobody asked for that
        return (points - self.centre).square().sum(-1)


@pytest.mark.parametrize("mode", MIXED)
def test_an_explicit_cast_of_float32_data_is_the_codes_own_choice(mode: str) -> None:
    points = 100.0 + draws(50, 3)
    report = audit(Distances(coarse=True), points, mode=mode)
    assert not report.ok
    assert report.findings[0].op == "aten::_to_copy", str(report)
    assert audit(Distances(coarse=False), points, mode=mode).ok


def seen(function: Callable[..., Any], *inputs: torch.Tensor, modules: tuple[nn.Module, ...] = ()) -> frozenset[str]:
    """The names (x, y, ...) of the inputs that autocast leaves in float32."""
    watch = LowWatch(torch.bfloat16)
    watch.roundings = roundings = Roundings(modules)
    numbers = roundings.admit(zip("xyz", inputs, strict=False))
    with watch, torch.autocast("cpu", torch.bfloat16):
        function(*inputs)
    return roundings.spared(numbers, math.inf)


def test_what_is_rounded_is_what_products_are_given_in_half() -> None:
    linear = nn.Linear(8, 8)
    x, y = draws(8, 8), draws(8, 8)
    weights = (linear,)
    assert seen(lambda x: x.sin() + 1, x) == {"x"}
    assert seen(lambda x: linear(x), x, modules=weights) == set()
    assert seen(lambda x: linear((x * 2.0).sin().t().contiguous()), x, modules=weights) == set(), "what is made of it"
    assert seen(lambda x: linear(x.bfloat16()[:4].clone()), x, modules=weights) == set(), "cast by hand for a product"
    assert seen(lambda x: linear(x.bfloat16().sin()), x, modules=weights) == {"x"}, "cast by hand for a sine"
    assert seen(lambda x, y: linear(x) + y, x, y, modules=weights) == {"y"}
    assert seen(lambda x: torch.randn(8, 8) @ x, x) == {"x"}, "a product with constants only"
    assert seen(lambda x, y: x @ y, x, y) == set(), "a product of data"
    assert seen(lambda x, y: x.bfloat16() @ y.bfloat16() @ y, x, y) == set()
    assert seen(lambda x, y: y * x.sum().item(), x, y) == {"y"}, "a number that was read may go anywhere"
    assert seen(lambda x: x, x) == set(), "nothing was done to it"


def test_nothing_is_known_of_what_compiled_code_does() -> None:
    compiled = nn.Linear(8, 8)
    compiled.compile(backend="eager")
    assert seen(lambda x: x.sin(), draws(8, 8), modules=(compiled,)) == set()


def test_rounding_after_a_call_is_not_the_calls() -> None:
    linear, x = nn.Linear(8, 8), draws(8, 8)
    watch = LowWatch(torch.bfloat16)
    watch.roundings = roundings = Roundings((linear,))
    given = roundings.admit([("x", x)])
    with watch, torch.autocast("cpu", torch.bfloat16):
        y = x.sin()
        until, gave = roundings.now, roundings.admit([("y", y)])
        linear(y)
    assert roundings.spared(given, until) == {"x"}
    assert roundings.spared(given, math.inf) == set()
    assert roundings.spared(gave, math.inf) == set()
