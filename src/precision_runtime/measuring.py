"""What a mode costs in memory and in accuracy, measured on layers small enough for any machine."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from precision_runtime.environment import ignored
from precision_runtime.layers.figures import bits_per_parameter
from precision_runtime.modes import Mode
from precision_runtime.runtime import PrecisionRuntime
from precision_runtime.stepping.master import master_of

# Wide enough that what a quantised layer stores beside its codes (scales of blocks and rows) weighs as in real models.
_WIDTH = 1024
_INPUTS, _OUTPUTS, _ROWS = 256, 128, 256


@dataclass(frozen=True)
class Measured:
    """``bits``: stored per parameter of an nn.Linear(1024, 1024); ``error``: that of an nn.Linear(256, 128).

    The error is relative, of all outputs together (L2), against the same layer and inputs in FP64.
    """

    bits: float
    error: float


def measure(mode: Mode, accelerator: str, seed: int = 0) -> Measured:
    """Measure ``mode`` on ``accelerator``. The same seed gives the same figures; the caller's generator is put back.

    Raises ``UnsupportedError`` with the reason where the machine cannot run the mode.
    """
    with ignored():
        rt = PrecisionRuntime(mode, accelerator)
    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.manual_seed(seed)
        layer, x = nn.Linear(_INPUTS, _OUTPUTS), torch.randn(_ROWS, _INPUTS)
        true = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
        low = rt.setup(layer.eval())(x.to(rt.device)).double().cpu()
        wide = rt.setup(nn.Linear(_WIDTH, _WIDTH, bias=False))
    return Measured(_bits(wide), float((low - true).norm() / true.norm()))


def _bits(model: nn.Module) -> float:
    """Bits per parameter, float32 masters included."""
    quantized = bits_per_parameter(model)
    if math.isfinite(quantized):
        return quantized
    kept = [t for p in model.parameters() for t in (p, master_of(p)) if t is not None]
    return 8 * sum(t.nbytes for t in kept) / sum(p.numel() for p in model.parameters())
