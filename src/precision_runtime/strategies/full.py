"""32-true and 64-true: nothing is lost."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from precision_runtime.casting import NOTHING, TO_DOUBLE, CastTable
from precision_runtime.setup.doubles import DoubleBuilding
from precision_runtime.strategies.base import Strategy


class FullStrategy(Strategy):
    """32-true leaves everything as it is; 64-true makes parameters, buffers and inputs float64 and complex128.

    Outputs stay what they are: rounding a float64 result to the default dtype would throw away what was asked for.
    """

    def tables(self, dtype: torch.dtype) -> tuple[CastTable, CastTable]:
        """Everything to double, or nothing."""
        return (TO_DOUBLE, TO_DOUBLE) if dtype is torch.float64 else (NOTHING, NOTHING)

    def init_context(self) -> AbstractContextManager[None]:
        """See ``Strategy.init_context``; in 64-true what is computed inside is float64 and complex128."""
        return DoubleBuilding(self) if self.dtype is torch.float64 else super().init_context()
