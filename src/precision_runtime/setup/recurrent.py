"""Recurrent layers where a vendor's fused kernel cannot do what the mode asks.

nn.LSTM under float16 autocast on a CPU: torch's autocast sends it to oneDNN's LSTM, which has no float16 primitive and
raises; without oneDNN the same module runs on torch's own kernels (torch 2.13). And every recurrent layer under
emulated TF32: a fused kernel rounds no operand. The switches are process-wide, so they are thrown around these calls
only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from precision_runtime.setup.forwarding import PatchedForward, patch_of
from precision_runtime.tf32 import is_emulating


class LSTMForward(PatchedForward):
    """The forward of an nn.LSTM that leaves oneDNN aside while float16 autocast is on, and only then."""

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Run the LSTM; the switch is put back also when it raises."""
        forward = self.__wrapped__
        onednn = torch.backends.mkldnn
        if not (
            torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.float16 and onednn.enabled
        ):
            return forward(*args, **kwargs)
        onednn.set_flags(_enabled=False, _fp32_precision=None)
        try:
            return forward(*args, **kwargs)
        finally:
            onednn.set_flags(_enabled=True, _fp32_precision=None)


class UnfusedForward(PatchedForward):
    """The forward of a recurrent layer that leaves oneDNN and cuDNN aside while TF32 is emulated, and only then."""

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Run the layer; the switches are put back also when it raises."""
        if not is_emulating():
            return self.__wrapped__(*args, **kwargs)
        backends: Any = torch.backends
        before = [(b, b.enabled) for b in (backends.mkldnn, backends.cudnn)]
        try:
            for backend, _ in before:
                backend.set_flags(_enabled=False, _fp32_precision=None)
            return self.__wrapped__(*args, **kwargs)
        finally:
            for backend, enabled in before:
                backend.set_flags(_enabled=enabled, _fp32_precision=None)


def unfuse(module: nn.Module) -> None:
    """Patch every recurrent layer in ``module`` once. ``forwarding.restore`` takes the patch away."""
    for part in module.modules():
        if isinstance(part, nn.RNNBase) and patch_of(part, UnfusedForward) is None:
            UnfusedForward(part)


def protect(module: nn.Module) -> None:
    """Patch every nn.LSTM in ``module`` once. ``forwarding.restore`` takes the patch away."""
    for part in module.modules():
        if isinstance(part, nn.LSTM) and patch_of(part, LSTMForward) is None:
            LSTMForward(part)
