"""Apex's levels on torch alone: O0 float32, O1 casts function by function, O2 half with float32 masters, O3 half.

NVIDIA's package is not used: its ``amp`` is gone, and it ran on CUDA only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from precision_runtime.casting import CAST, FLOATING, HALF_TO_SINGLE, TO, CastTable, cast_call
from precision_runtime.modes import Mode
from precision_runtime.options import Options
from precision_runtime.setup.building import Building
from precision_runtime.setup.forwarding import is_suspended
from precision_runtime.stepping.master import attach, keeping
from precision_runtime.strategies.apex_functions import ApexBackward, ApexFunctions
from precision_runtime.strategies.base import Strategy
from precision_runtime.strategies.half import HalfStrategy
from precision_runtime.strategies.mixed import MixedStrategy


class SingleStrategy(Strategy):
    """O0: parameters, buffers, inputs and outputs in float32."""

    default_outputs = True

    def tables(self, dtype: torch.dtype) -> tuple[CastTable, CastTable]:
        """Every floating dtype to float32."""
        return TO[dtype], TO[dtype]


class FunctionStrategy(MixedStrategy):
    """O1: float32 parameters; products in half by autocast, everything else by the lists of ``apex_functions``."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast with Apex's rules above it; null inside ``forwarding.suspended()``."""
        return contextlib.nullcontext() if is_suspended() else self._casts()

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See ``Strategy.call``."""
        args, kwargs = cast_call(args, kwargs, self.input_table)
        with torch.autocast(self.device.type, dtype=self.compute), ApexFunctions(self.compute, self.device.type):
            result = function(*args, **kwargs)
        return self.cast_outputs(result)

    def backward(self) -> AbstractContextManager[Any]:
        """Apex's rules for what a checkpoint runs again."""
        return ApexBackward(self.compute, self.device.type)

    @contextlib.contextmanager
    def _casts(self) -> Iterator[None]:
        with torch.autocast(self.device.type, dtype=self.compute), ApexFunctions(self.compute, self.device.type):
            yield


class MasterStrategy(HalfStrategy):
    """O2: a half model with float32 batch norms, also those without parameters (they have running statistics).

    Batch norms are those that Apex counts: every ``_BatchNorm``, SyncBatchNorm among them. torch's kernels take half
    inputs with float32 statistics and answer in half.
    """

    def convert(self, module: nn.Module) -> nn.Module:
        """See ``Strategy.convert``."""
        norms = [(part, _floating(part)) for part in module.modules() if isinstance(part, _BatchNorm)]
        super().convert(module)
        for part, tensors in norms:
            _put_back(part, tensors)
        return module

    def init_context(self) -> AbstractContextManager[None]:
        """See ``Strategy.init_context``; checkpoints of what is made inside are float32 at once."""
        return _Building(self)


class _Building(Building):
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        roots = self._roots() if kind is None else []
        with keeping(roots):
            super().__exit__(kind, error, trace)
        for root in roots:
            attach(root)


def _floating(norm: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """The values and gradients of a norm's own tensors as they are now, in float32."""
    single = CAST[torch.float32]
    return {
        name: (single(t.detach()), None if t.grad is None else single(t.grad.detach()))
        for name, t in (*norm._parameters.items(), *norm._buffers.items())
        if t is not None and t.dtype in FLOATING
    }


def _put_back(norm: nn.Module, tensors: dict[str, tuple[torch.Tensor, torch.Tensor | None]]) -> None:
    """Give a norm its tensors back, but for those that an island keeps wide already."""
    for name, (value, gradient) in tensors.items():
        parameter = norm._parameters.get(name)
        now = norm._buffers[name] if parameter is None else parameter
        if now is None or now.dtype not in HALF_TO_SINGLE:
            continue
        if parameter is None:
            norm._buffers[name] = value
        else:
            parameter.grad = None
            parameter.data = value
            parameter.grad = gradient


def apex(mode: Mode, device: torch.device, options: Options) -> Strategy:
    """The strategy of one level, told from the mode's fields: XLA's bfloat16 leaves them as they are."""
    if mode.masters:
        return MasterStrategy(mode, device, options)
    if mode.autocast:
        return FunctionStrategy(mode, device, options)
    return (HalfStrategy if mode.low else SingleStrategy)(mode, device, options)
