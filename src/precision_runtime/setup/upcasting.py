"""The warning of a mode that keeps weights in float32 and is given some in half: ``setup`` widens them.

Widening loses nothing, so ``strict`` has no objection; but who made them half on purpose (an average kept beside the
model, the frozen base of an adapter) gets other numbers, and twice the memory.
"""

from __future__ import annotations

import warnings
from collections import Counter
from typing import TYPE_CHECKING

from torch import nn

from precision_runtime.errors import PrecisionWarning
from precision_runtime.pointing import users_line

if TYPE_CHECKING:
    from precision_runtime.strategies import Strategy

_SHOWN = 3


def warn_of_upcast(model: nn.Module, strategy: Strategy) -> None:
    """Warn (``PrecisionWarning``) where the cast of a mode with autocast is going to widen tensors of ``model``."""
    if not strategy.mode.autocast:
        return
    tensors = (*model.named_parameters(), *model.named_buffers())
    half = {name: _short(tensor.dtype) for name, tensor in tensors if tensor.dtype in strategy.module_table}
    if not half:
        return
    kinds = " and ".join(f"{number} {dtype}" for dtype, number in Counter(half.values()).items())
    names = ", ".join(repr(name) for name in list(half)[:_SHOWN])
    more = f" and {len(half) - _SHOWN} more" if len(half) > _SHOWN else ""
    warnings.warn(
        f"{strategy.mode} keeps parameters and buffers in {_short(strategy.dtype)}: setup turns {kinds} "
        f"{'tensor' if len(half) == 1 else 'tensors'} of {type(model).__name__} into it ({names}{more}). They take "
        "twice the memory, and what is written to them is no longer rounded to half. If that is meant, say so with "
        ".float() before setup; if they are to stay half, cast them back after it (part.to(dtype)), which loses "
        "nothing, or use a true mode",
        PrecisionWarning,
        stacklevel=users_line(),
    )


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
