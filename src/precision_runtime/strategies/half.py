"""16-true and bf16-true: the model itself is half."""

from __future__ import annotations

import torch

from precision_runtime.casting import TO, CastTable
from precision_runtime.strategies.base import Strategy


class HalfStrategy(Strategy):
    """Casts floating parameters, buffers and inputs to half, and outputs to the default dtype.

    The default dtype is not touched: with a half default, ``torch.arange(0, 300, 1.0)`` inside forward repeats and
    skips whole numbers from 256 on.
    """

    default_outputs = True

    def tables(self, dtype: torch.dtype) -> tuple[CastTable, CastTable]:
        """Every floating dtype to half."""
        return TO[dtype], TO[dtype]
