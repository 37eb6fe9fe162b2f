"""Random numbers from generators of the code's own are the same in every run; what differs all the same is said."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from torch import nn

from precision_runtime import audit

MODES = ["bf16-mixed", "16-true", "32-true"]


class Shaken(nn.Module):
    """Adds noise from its own generator, which its calls share."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.layer, self.generator = nn.Linear(8, 8), generator

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (n, 8) in and out."""
        for _ in range(2):
            y = self.layer(x)
            x = y + torch.randn(y.shape, generator=self.generator, dtype=y.dtype)
        return x


@pytest.mark.parametrize("mode", MODES)
def test_a_modules_own_generator_draws_alike_and_is_left_as_it_was(mode: str) -> None:
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    model = nn.Sequential(Shaken(generator), nn.ReLU(), Shaken(generator))
    assert audit(model, torch.randn(4, 8), mode=mode).ok
    assert torch.equal(generator.get_state(), before)


def test_generators_that_are_passed_or_closed_over_are_followed_too() -> None:
    first, second, third = np.random.default_rng(3), random.Random(4), torch.Generator().manual_seed(5)

    def shaken(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        return x * float(first.normal()) + second.random() * noise

    assert audit(shaken, torch.randn(4, 8), third, mode="bf16-true").ok
    assert first.normal() == np.random.default_rng(3).normal()
    assert second.random() == random.Random(4).random()
    assert torch.equal(third.get_state(), torch.Generator().manual_seed(5).get_state())


@pytest.mark.parametrize("mode", MODES)
def test_code_that_does_not_do_twice_what_it_did_once_is_called_so(mode: str) -> None:
    counter = itertools.count(1)

    def counted(x: torch.Tensor) -> torch.Tensor:
        return x * float(next(counter))

    report = audit(counted, torch.randn(4, 8), mode=mode)
    assert [f.kind for f in report.findings] == ["nondeterministic"], str(report)
    assert "differs between two runs in FP64" in str(report)
