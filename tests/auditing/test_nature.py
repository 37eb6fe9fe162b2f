"""What no code could do better is no defect: full digits in float32, rows all alike, chaos; what it could, is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from precision_runtime import audit


def draws(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def two_pass(x: torch.Tensor) -> torch.Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def one_pass(x: torch.Tensor) -> torch.Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / (x.square().mean(-1, keepdim=True) - mean.square() + 1e-5).abs().sqrt()


@pytest.mark.parametrize("mode", ["32-true", "tf32"])
def test_an_input_of_full_digits_has_been_rounded_to_float32_before(mode: str) -> None:
    x = 1000.0 + draws(4, 16)
    assert audit(lambda x: x - x.mean(-1, keepdim=True), x, mode=mode).ok
    assert audit(two_pass, x, mode=mode).ok
    report = audit(one_pass, x, mode=mode)
    assert not report.ok
    exact = torch.arange(64.0).reshape(4, 16)  # nothing was rounded of these
    assert audit(two_pass, exact, mode=mode).ok


@pytest.mark.parametrize("mode", ["32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true"])
@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.Sequential(nn.Embedding(5, 8), nn.BatchNorm1d(8)), torch.ones(4, dtype=torch.long)),
        (nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), torch.ones(4, 8)),
        (nn.GroupNorm(4, 16), torch.full((2, 16, 4, 4), 0.1)),
        (nn.BatchNorm2d(3), torch.full((2, 3, 8, 8), 0.1)),
        (two_pass, torch.full((2, 16), 1.4)),
    ],
    ids=["embedding", "linear", "groups", "images", "two passes"],
)
def test_rows_that_are_all_alike_leave_nothing_of_a_norm_and_no_finding(mode: str, model: Any, x: torch.Tensor) -> None:
    report = audit(model, x, mode=mode)
    assert report.ok, report


class Field(nn.Module):
    """A small network and its gradient by central differences with a step of 0.004."""

    def __init__(self, island: bool) -> None:
        super().__init__()
        self.island = island
        self.net = nn.Sequential(nn.Linear(3, 48), nn.Softplus(beta=5), nn.Linear(48, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (n, 3) in and out."""
        with torch.autocast("cpu", enabled=torch.is_autocast_enabled("cpu") and not self.island):
            steps = 0.004 * torch.eye(3, dtype=x.dtype)
            return torch.cat([(self.net(x + s) - self.net(x - s)) / 0.008 for s in steps], -1)


@pytest.mark.parametrize("mode", ["16-mixed", "bf16-mixed"])
def test_differences_of_a_network_are_steep_however_many_products_they_have(mode: str) -> None:
    torch.manual_seed(0)
    report = audit(Field(island=False), draws(40, 3), mode=mode, gradients=False)
    assert [(f.kind, f.op) for f in report.findings] == [("amplification", "aten::sub")], str(report)
    torch.manual_seed(0)
    assert audit(Field(island=True), draws(40, 3), mode=mode, gradients=False).ok


@pytest.mark.parametrize("steps", [10, 30, 60])
@pytest.mark.parametrize("mode", ["16-mixed", "bf16-mixed"])
def test_what_float32_cannot_hold_either_is_the_functions_nature(mode: str, steps: int) -> None:
    torch.manual_seed(0)
    mix = nn.Linear(12, 12, bias=False)
    with torch.no_grad():
        mix.weight.copy_(torch.softmax(3.0 * torch.eye(12) + torch.randn(12, 12), -1))

    def chaotic(x: torch.Tensor) -> torch.Tensor:
        for _ in range(steps):
            x = 3.9 * x * (1.0 - x)
            x = 0.9 * x + 0.1 * mix(x)
        return x

    x = torch.rand(16, 12, generator=torch.Generator().manual_seed(0))
    assert audit(chaotic, x, mode=mode, gradients=False).ok


class Shift(nn.Module):
    """Moves coordinates by a large number, in the dtype that they have or in float32."""

    def __init__(self, wide: bool) -> None:
        super().__init__()
        self.wide = wide

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.float() if self.wide and x.dtype in (torch.float16, torch.bfloat16) else x) + 500.0


class Back(nn.Module):
    """Takes what its part has added away again."""

    def __init__(self, wide: bool, layers: int) -> None:
        super().__init__()
        self.shift, self.net = Shift(wide), nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (n, 8) in and out."""
        x = self.net(x)
        return (self.shift(x) - 500.0).to(x.dtype)


@pytest.mark.parametrize("layers", [0, 1, 6])
@pytest.mark.parametrize("mode", ["16-true", "bf16-true"])
def test_what_a_part_loses_and_its_caller_magnifies_is_found(mode: str, layers: int) -> None:
    torch.manual_seed(0)
    report = audit(Back(wide=False, layers=layers), draws(16, 8), mode=mode)
    assert any("the rounding of a value inside" in f.message for f in report.findings), str(report)
    torch.manual_seed(0)
    assert audit(Back(wide=True, layers=layers), draws(16, 8), mode=mode).ok


@pytest.mark.parametrize("mode", ["16-true", "bf16-true"])
def test_a_deep_network_that_is_steep_in_what_goes_in_is_its_own_nature(mode: str) -> None:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(12)]
    with torch.no_grad():
        for layer in layers:
            layer[0].weight *= 4.0  # each layer magnifies
    report = audit(nn.Sequential(*layers), draws(16, 32), mode=mode, gradients=False)
    assert report.ok, report
