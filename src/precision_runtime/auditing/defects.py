"""Known defects of torch's own kernels: true findings, but not the user's code, so a lane remarks on them.

Each entry knows when its op is affected, computes the right result from the same operands, and carries a short
reproduction that a test runs: an entry whose reproduction no longer shows the defect must be deleted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_HALF = (torch.float16, torch.bfloat16)
# A kernel within this factor of one rounding of its result is healthy; beyond it the listed defect has struck.
_HEALTHY = 4.0

# (func, args, kwargs, result) -> (right result, error over one rounding) or None where the op is not affected
Correct = Callable[[Any, Sequence[Any], Mapping[str, Any], Any], "tuple[Any, float] | None"]


@dataclass(frozen=True)
class KnownDefect:
    """One listed defect of a backend kernel."""

    name: str
    op: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    torch_versions: str  # where it was seen
    summary: str
    reproduction: str
    correct: Correct


def defect_of(op: str) -> KnownDefect | None:
    """The listed defect of an op ('aten::…'), if any."""
    return _BY_OP.get(op)


def _layer_norm_backward(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
) -> tuple[Any, float] | None:
    _grad, x = args[0], args[1]
    if x.device.type != "cpu" or x.dtype not in _HALF or (result[1] is None and result[2] is None):
        return None
    wide = func(*(_single(a) for a in args), **kwargs)
    factor = max(_factor(result[i], wide[i], x.dtype) for i in (1, 2))
    if factor <= _HEALTHY:
        return None
    return (result[0], *(_as(result[i], wide[i]) for i in (1, 2))), factor


def _channels_last_convolution(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
) -> tuple[Any, float] | None:
    x, weight = args[0], args[1]
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or x.dim() != 4:
        return None
    if not _is_channels_last(x) and not _is_channels_last(weight):
        return None
    wide = func(*(_single(a) for a in args), **kwargs)
    factor = _factor(result, wide, x.dtype)
    if factor <= _HEALTHY:
        return None
    return _as(result, wide), factor


KNOWN_DEFECTS = (
    KnownDefect(
        name="layer-norm-weight-gradient",
        op="aten::native_layer_norm_backward",
        device="cpu",
        dtypes=_HALF,
        torch_versions="2.13",
        summary="LayerNorm's weight and bias gradients are accumulated in the low dtype on the CPU; the error grows "
        "with the square root of the rows (error over u: 4 at 256 rows, 30 at 16,384)",
        reproduction="""
import torch
x, g = torch.randn(2, 4096, 8, dtype=torch.float64).bfloat16().unbind(0)
def run(d):
    w = torch.ones(8, dtype=d, requires_grad=True)
    return torch.autograd.grad(torch.nn.functional.layer_norm(x.to(d), (8,), w), w, g.to(d))[0].double()
low, true = run(torch.bfloat16), run(torch.float64)
excess = float((low - true).norm() / true.norm()) * 2**8
""",
        correct=_layer_norm_backward,
    ),
    KnownDefect(
        name="channels-last-convolution",
        op="aten::convolution",
        device="cpu",
        dtypes=(torch.bfloat16,),
        torch_versions="2.13",
        summary="oneDNN's bf16 convolution of a channels-last input as large as its kernel and stride (8 by 8, 8 or 16 "
        "channels) is more than 100% wrong; contiguous inputs and other channel counts are right",
        reproduction="""
import torch
x = torch.randn(2, 16, 8, 8).bfloat16().to(memory_format=torch.channels_last)
w = torch.randn(16, 16, 8, 8).bfloat16()
true = torch.nn.functional.conv2d(x.double(), w.double(), stride=8)
low = torch.nn.functional.conv2d(x, w, stride=8).double()
excess = float((low - true).norm() / true.norm()) * 2**8
""",
        correct=_channels_last_convolution,
    ),
)

_BY_OP = {defect.op: defect for defect in KNOWN_DEFECTS}


def _single(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype in _HALF:
        return value.to(torch.float32, memory_format=torch.contiguous_format)
    return value


def _as(like: torch.Tensor | None, value: torch.Tensor | None) -> torch.Tensor | None:
    return None if like is None or value is None else value.to(like.dtype)


def _factor(low: torch.Tensor | None, wide: torch.Tensor | None, dtype: torch.dtype) -> float:
    """Error of ``low`` over one rounding to ``dtype`` of a result of that size (u / sqrt(3) of its rms)."""
    if low is None or wide is None or low.numel() == 0:
        return 0.0
    scale = float(wide.norm())
    u = torch.finfo(dtype).eps / 2
    error = float((low.to(wide.dtype) - wide).norm())
    return error / (u / 3**0.5 * scale) if scale > 0 and not math.isnan(error) else 0.0


def _is_channels_last(t: torch.Tensor) -> bool:
    return not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)
