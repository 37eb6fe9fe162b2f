"""What disturbed trainings stand for: roundings that are others in each step, constants, and functions' domains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from precision_runtime import audit_training
from precision_runtime.training import sheet

BOTH = pytest.mark.parametrize("bad", [False, True])


# -- growth that roundings set off ------------------------------------------------------------------------------------


def data(seed: int = 5, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(16, 8, generator=g) * 8).to(dtype), (torch.randn(16, 2, generator=g) * 40).to(dtype)


def layer() -> nn.Linear:
    torch.manual_seed(1234)
    return nn.Linear(8, 2)


def squares(model: nn.Module, batch: Any) -> torch.Tensor:
    """A quadratic: near its minimum a step of a fixed length is longer than its curvature allows."""
    return (model(batch[0]).float() - batch[1]).square().sum(1).mean()


def clipped(model: nn.Module, optimizer: Any, loss: torch.Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def judged(mode: str) -> Any:
    return audit_training(
        layer, lambda m: torch.optim.SGD(m.parameters(), lr=0.5), squares, [data()], mode, steps=20, step_fn=clipped
    )


@pytest.mark.parametrize("mode", ["16-mixed", "bf16-mixed"])
def test_growth_that_roundings_set_off_is_no_defect(mode: str) -> None:
    assert judged(mode).ok


def test_what_is_always_the_same_does_not_set_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The training forgets where it began, and comes calmly to where a constant disturbance moves it."""
    monkeypatch.setattr(sheet, "FRESH_SAMPLES", 0)
    assert not judged("16-mixed").ok


def trained(rounding: float, seed: int) -> torch.Tensor:
    """The weights after the same training in plain torch in FP64, each prediction rounded by chance."""
    x, y = data(dtype=torch.float64)
    model, g = layer().double(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        noise = 1.0 + rounding * (2.0 * torch.rand(16, 2, generator=g, dtype=torch.float64) - 1.0)
        (model(x) * noise - y).square().sum(1).mean().backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.weight.detach()


def test_plain_torch_is_as_far_off_when_it_rounds_by_chance() -> None:
    x, y = data()
    model = layer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            prediction = model(x)
        clipped(model, optimizer, (prediction.float() - y).square().sum(1).mean())
    true = trained(0.0, 0)
    error = float((model.weight.detach() - true).norm())
    assert error > 0.05 * float((true - layer().weight.detach()).norm())
    assert max(float((trained(2.0**-8, seed) - true).norm()) for seed in range(4)) > error / 2.0


# -- constants and domains --------------------------------------------------------------------------------------------


class Schedule(nn.Module):
    """How much of a signal is left at each of 1,000 times: close to 1 at the first ones."""

    def __init__(self, bad: bool) -> None:
        super().__init__()
        self.bad = bad

    def forward(self, like: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        dtype = like.dtype if self.bad or like.dtype is torch.float64 else torch.float32
        left = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=dtype)).cumprod(0)[times]
        return left.to(torch.promote_types(dtype, torch.float32))[:, None]


class Denoiser(nn.Module):
    def __init__(self, bad: bool) -> None:
        super().__init__()
        self.schedule, self.scale = Schedule(bad), nn.Parameter(torch.zeros(4))

    def forward(self, x: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """The loss. Signals and noise (N, 4), times (N,)."""
        left = self.schedule(x, times)
        mixed = left.sqrt() * x + (1 - left).sqrt() * noise
        return (self.scale.to(mixed.dtype) * mixed - noise).square().mean()


@BOTH
def test_a_schedule_that_is_made_in_bfloat16_is_found_and_spoils_no_disturbed_training(bad: bool) -> None:
    """Disturbed by a bfloat16 rounding it would be above 1 at the first times, and the root of what is below 0."""
    g = torch.Generator().manual_seed(0)
    x, noise = (torch.randint(-16, 17, (64, 4), generator=g).float() / 8 for _ in range(2))
    report = audit_training(
        lambda: Denoiser(bad), lambda m: torch.optim.SGD(m.parameters(), lr=0.4), lambda m, b: m(*b),
        [(x, noise, torch.arange(64) * 6)], "bf16-true", steps=10,
    )  # fmt: skip
    assert report.ok is not bad, str(report)
    assert not any("not judged" in r.message for r in report.remarks)


class Tops(nn.Module):
    """Values up to 1, which half formats hold."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(max=1.0)


def test_a_training_whose_disturbed_twins_leave_a_function_s_domain_is_not_judged() -> None:
    class Arc(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tops, self.weight = Tops(), nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ((1 - self.tops(x)).sqrt().detach() * self.weight).sum()

    x = torch.linspace(0.9, 1.3, 64).reshape(16, 4)
    report = audit_training(
        Arc, lambda m: torch.optim.SGD(m.parameters(), lr=0.003), lambda m, b: m(b), [x], "bf16-true", steps=20
    )
    assert report.ok
    assert any("every disturbed training has a loss that is not finite" in r.message for r in report.remarks)
