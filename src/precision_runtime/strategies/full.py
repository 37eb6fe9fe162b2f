"""32-true and 64-true: nothing is lost."""

from __future__ import annotations

import torch

from precision_runtime.casting import NOTHING, TO_DOUBLE, CastTable
from precision_runtime.strategies.base import Strategy


class FullStrategy(Strategy):
    """32-true leaves everything as it is; 64-true makes parameters, buffers and inputs float64 and complex128.

    Outputs stay what they are: rounding a float64 result to the default dtype would throw away what was asked for.
    """

    def tables(self, dtype: torch.dtype) -> tuple[CastTable, CastTable]:
        """Everything to double, or nothing."""
        return (TO_DOUBLE, TO_DOUBLE) if dtype is torch.float64 else (NOTHING, NOTHING)
