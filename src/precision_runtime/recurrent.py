"""nn.LSTM under float16 autocast on a CPU.

torch's autocast sends it to oneDNN's LSTM, which has no float16 primitive and raises; without oneDNN the same module
runs on torch's own kernels (torch 2.13). The switch is process-wide, so it is thrown around LSTM calls only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from precision_runtime.forwarding import PatchedForward, patch_of


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


def protect(module: nn.Module) -> None:
    """Patch every nn.LSTM in ``module`` once. ``forwarding.restore`` takes the patch away."""
    for part in module.modules():
        if isinstance(part, nn.LSTM) and patch_of(part, LSTMForward) is None:
            LSTMForward(part)
