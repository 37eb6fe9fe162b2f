"""How much range is left, and which inputs break it: before training in half precision, not after.

    pytest examples/headroom

Two of the four tests fail, as they should: read what they say. ``Attention`` scales its scores after the product, as
the formula has it, and has 4 bits left: with inputs 2^5 times larger the product leaves float16's range, and the first
sign of that in a training would be a loss of NaN. ``ScaledFirst`` scales the queries instead: the same function, with a
product 8 times smaller, so that inputs may be twice as large. ``softplus`` fails for inputs that a search finds.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Scores of one head: q kᵀ / sqrt(width)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.scale = width**-0.5

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.query(x) @ self.key(x).mT * self.scale, -1)


class ScaledFirst(Attention):
    """The same with the scale where it keeps the product small."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax((self.query(x) * self.scale) @ self.key(x).mT, -1)


def softplus(x: Tensor) -> Tensor:
    """log(1 + eˣ), as it is written on paper."""
    return torch.log(1 + torch.exp(x))


@pytest.mark.precision("16-true")
@pytest.mark.parametrize("kind", [Attention, ScaledFirst])
def test_headroom(precision_ctx: Any, kind: type[Attention]) -> None:
    torch.manual_seed(0)
    model = precision_ctx.setup(kind())
    x = 4.0 * precision_ctx.randn(2, 16, 64)
    precision_ctx.headroom(model, x, gradients=False, at_least=5, limit=8)


@pytest.mark.precision("16-true")
@pytest.mark.parametrize("f", [softplus, nn.functional.softplus], ids=["by hand", "torch"])
def test_explore(precision_ctx: Any, f: Any) -> None:
    precision_ctx.explore(f, (4, 8), low=-20.0, high=20.0, gradients=False)
