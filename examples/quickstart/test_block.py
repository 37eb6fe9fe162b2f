"""A transformer block as people write it, judged in every 16-bit precision.

    pytest --precision-matrix examples/quickstart

The first test fails in 16-true and bf16-true, as it should: read what it says. ``Norm`` takes the variance as
E[x²] - E[x]². In exact arithmetic that is right; in 16 bits, where the mean is large, the two terms agree in all the
digits that they have, and their difference is made of rounding errors. ``RepairedNorm`` subtracts the mean first.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

MODES = ("16-true", "bf16-true", "16-mixed", "bf16-mixed")


class Norm(nn.Module):
    """Layer normalisation by hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = x.square().mean(-1, keepdim=True) - mean.square()
        return (x - mean) * torch.rsqrt(variance + 1e-5) * self.weight + self.bias


class RepairedNorm(Norm):
    """The same by two passes over the values."""

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        return centred * torch.rsqrt(variance + 1e-5) * self.weight + self.bias


class Block(nn.Module):
    """Attention and a feed-forward network, each behind a norm and around a residual connection."""

    def __init__(self, width: int = 64, norm: type[Norm] = Norm) -> None:
        super().__init__()
        self.norm1 = norm(width)
        self.attention = nn.MultiheadAttention(width, num_heads=4, batch_first=True)
        self.norm2 = norm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


@pytest.mark.precision(*MODES)
def test_block(precision_ctx: Any) -> None:
    block = precision_ctx.setup(Block())
    x = 10 + precision_ctx.randn(4, 32, 64)  # like pixels, or activations behind a ReLU: the mean is not zero
    precision_ctx.check(block, x)


@pytest.mark.precision(*MODES)
def test_repaired_block(precision_ctx: Any) -> None:
    block = precision_ctx.setup(Block(norm=RepairedNorm))
    x = 10 + precision_ctx.randn(4, 32, 64)
    precision_ctx.check(block, x)
