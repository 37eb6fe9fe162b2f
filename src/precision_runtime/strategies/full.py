"""32-true and 64-true: nothing is lost."""

from __future__ import annotations

from functools import cached_property

import torch

from precision_runtime.casting import NOTHING, TO_DOUBLE, CastTable
from precision_runtime.strategies.base import Strategy


class FullStrategy(Strategy):
    """32-true leaves everything as it is; 64-true makes parameters, buffers and inputs float64 and complex128.

    Outputs stay what they are: rounding a float64 result to the default dtype would throw away what was asked for.
    """

    @cached_property
    def module_table(self) -> CastTable:
        """Everything to double, or nothing."""
        return TO_DOUBLE if self.dtype is torch.float64 else NOTHING

    @cached_property
    def input_table(self) -> CastTable:
        """As parameters."""
        return self.module_table
