"""tf32: everything in float32, matrix products and convolutions in TF32."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from precision_runtime.accelerators import machine
from precision_runtime.setup.forwarding import is_suspended
from precision_runtime.setup.recurrent import unfuse
from precision_runtime.strategies.base import Strategy
from precision_runtime.tf32 import products


@dataclass(frozen=True)
class Tf32Strategy(Strategy):
    """Casts nothing. Forward and backward run with torch's TF32 switches on, or with emulated products.

    The switches are on for the calls of set-up modules, inside ``autocast()`` and inside the runtime's ``backward``,
    nowhere else.
    """

    emulated: bool = field(init=False, compare=False, default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "emulated", machine().emulation(self.device.type, "tf32") is not None)

    def convert(self, module: nn.Module) -> nn.Module:
        """See ``Strategy.convert``; where TF32 is emulated, recurrent layers run on kernels that it can reach."""
        if self.emulated:
            unfuse(module)
        return super().convert(module)

    def autocast(self) -> AbstractContextManager[Any]:
        """Products in TF32; null inside ``forwarding.suspended()``."""
        return contextlib.nullcontext() if is_suspended() else products(self.device.type, self.emulated)

    def backward(self) -> AbstractContextManager[Any]:
        """The products of the backward pass in TF32, too."""
        return self.autocast()

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See ``Strategy.call``."""
        with products(self.device.type, self.emulated):
            return self.cast_outputs(function(*args, **kwargs))
