"""16-mixed and bf16-mixed: float32 parameters, and torch's autocast chooses op by op."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import (
    autocast_decrement_nesting,
    autocast_increment_nesting,
    clear_autocast_cache,
    get_autocast_dtype,
    is_autocast_enabled,
    nn,
    set_autocast_dtype,
    set_autocast_enabled,
)

from precision_runtime.casting import HALF_TO_SINGLE, TO, CastTable, cast_call
from precision_runtime.setup.fastpath import leave_fast_path
from precision_runtime.setup.forwarding import is_suspended
from precision_runtime.setup.recurrent import protect
from precision_runtime.strategies.base import Strategy


class MixedStrategy(Strategy):
    """Half parameters and buffers become float32, which loses nothing; inputs become float32, never half.

    Autocast casts what its ops need. Casting inputs to half beforehand, as others do, destroys targets and large or
    small values that no op in half ever sees: 1e5 becomes inf, 1e-9 becomes 0.
    """

    default_outputs = True

    def tables(self, dtype: torch.dtype) -> tuple[CastTable, CastTable]:
        """Half parameters, and every floating input, to float32."""
        return HALF_TO_SINGLE, TO[dtype]

    def convert(self, module: nn.Module) -> nn.Module:
        """See ``Strategy.convert``.

        On the CPU float16 LSTMs get the forward that works there, and transformer encoders leave their fast path: torch
        does so where autocast is on, but asks about CUDA's only, and evaluates in float32, or fails under a mask.
        """
        super().convert(module)
        if self.device.type == "cpu":
            leave_fast_path(module)
            if self.compute is torch.float16:
                protect(module)
        return module

    def autocast(self) -> AbstractContextManager[Any]:
        """The autocast of torch, or null inside ``forwarding.suspended()``."""
        if is_suspended():
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute)

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See ``Strategy.call``."""
        args, kwargs = cast_call(args, kwargs, self.input_table)
        if torch.compiler.is_compiling() or torch._C._is_torch_function_mode_enabled():
            # Compilers and exporters look for torch's own context manager and record it in their graph.
            with torch.autocast(self.device.type, dtype=self.compute):
                result = function(*args, **kwargs)
        else:
            # The same steps as torch.autocast's, without making the object.
            device = self.device.type
            enabled, dtype = is_autocast_enabled(device), get_autocast_dtype(device)
            set_autocast_enabled(device, True)
            set_autocast_dtype(device, self.compute)
            autocast_increment_nesting()
            try:
                result = function(*args, **kwargs)
            finally:
                if autocast_decrement_nesting() == 0:  # casts of weights are shared up to the outermost region
                    clear_autocast_cache()
                set_autocast_enabled(device, enabled)
                set_autocast_dtype(device, dtype)
        return self.cast_outputs(result)
