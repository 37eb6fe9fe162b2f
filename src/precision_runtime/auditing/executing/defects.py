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

from precision_runtime.casting import HALF

# A kernel within this factor of one rounding of its result is healthy; beyond it the listed defect has struck. It is
# below the limit of the audit, 4 in the same unit, for the tail of what is let through has its own limit.
_HEALTHY = 3.0
# Where fewer windows of a convolution overlap, adding them in the low dtype costs less than that.
_OVERLAPS = 16

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
    shape = args[2]
    return _norm_backward(func, args, kwargs, result, 3, lambda x: x.mean(tuple(range(-len(shape), 0)), keepdim=True))


def _group_norm_backward(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
) -> tuple[Any, float] | None:
    rows, groups = args[5], args[8]
    return _norm_backward(func, args, kwargs, result, 2, lambda x: x.reshape(rows, groups, -1).mean(-1))


def _batch_norm_backward(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
) -> tuple[Any, float] | None:
    if not args[7]:  # by running statistics, which are as the user stores them
        return None
    return _norm_backward(func, args, kwargs, result, 5, lambda x: x.transpose(0, 1).flatten(1).mean(1))


def _norm_backward(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, place: int,
    mean: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[Any, float] | None:  # fmt: skip
    """The gradients in FP32, by a mean (argument ``place``) that nobody has rounded.

    The saved 1 / std stays as it is: without the norm's eps no better one can be had, and one rounding does no harm.
    """
    x = args[1]
    if x.device.type != "cpu" or x.dtype not in HALF or args[place] is None:
        return None
    operands = [_single(a) for a in args]
    if args[place].dtype in HALF:
        operands[place] = mean(operands[1]).reshape(args[place].shape)
    wide = func(*operands, **kwargs)
    factor = max(_factor(r, w, x.dtype) for r, w in zip(result, wide, strict=True))
    if factor <= _HEALTHY:
        return None
    return tuple(_as(r, w) for r, w in zip(result, wide, strict=True)), factor


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


def _convolution_backward(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
) -> tuple[Any, float] | None:
    x, weight, stride = args[1], args[2], args[4]
    windows = math.prod(-(-k // s) for k, s in zip(weight.shape[2:], stride, strict=True))
    if x.device.type != "cpu" or x.dtype not in HALF or result[0] is None or windows < _OVERLAPS:
        return None
    wide = func(*(_single(a) for a in args), **kwargs)
    factor = _factor(result[0], wide[0], x.dtype)
    if factor <= _HEALTHY:
        return None
    return (_as(result[0], wide[0]), *result[1:]), factor


KNOWN_DEFECTS = (
    KnownDefect(
        name="layer-norm-weight-gradient",
        op="aten::native_layer_norm_backward",
        device="cpu",
        dtypes=HALF,
        torch_versions="2.13",
        summary="LayerNorm's weight and bias gradients are accumulated in the low dtype on the CPU; the error grows "
        "with the square root of the rows (error over u: 4 at 256 rows, 30 at 16,384); and where the weight is half, "
        "the mean that forward saves for backward is rounded to half (error over u: 7 where the mean is 17 times the "
        "standard deviation, at any number of rows)",
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
        name="group-norm-weight-gradient",
        op="aten::native_group_norm_backward",
        device="cpu",
        dtypes=HALF,
        torch_versions="2.13",
        summary="where GroupNorm's weight is half, the mean that forward saves for backward on the CPU is rounded to "
        "half; the weight's gradient sums that error up (error over u: 9 where the mean is 17 times the standard "
        "deviation)",
        reproduction="""
import torch
x, g = (torch.randn(2, 4, 8, 256, dtype=torch.float64) * 0.6 + torch.tensor([30.0, 0.0]).view(2, 1, 1, 1)).bfloat16()
def run(d):
    w = torch.ones(8, dtype=d, requires_grad=True)
    return torch.autograd.grad(torch.nn.functional.group_norm(x.to(d), 4, w), w, g.to(d))[0].double()
low, true = run(torch.bfloat16), run(torch.float64)
excess = float((low - true).norm() / true.norm()) * 2**8
""",
        correct=_group_norm_backward,
    ),
    KnownDefect(
        name="batch-norm-weight-gradient",
        op="aten::native_batch_norm_backward",
        device="cpu",
        dtypes=HALF,
        torch_versions="2.13",
        summary="where BatchNorm's weight is half, the mean that forward saves for backward on the CPU is rounded to "
        "half; the weight's gradient sums that error up (error over u: 9 where the mean is 17 times the standard "
        "deviation)",
        reproduction="""
import torch
x, g = (torch.randn(2, 4, 8, 256, dtype=torch.float64) * 0.6 + torch.tensor([30.0, 0.0]).view(2, 1, 1, 1)).bfloat16()
def run(d):
    w = torch.ones(8, dtype=d, requires_grad=True)
    y = torch.nn.functional.batch_norm(x.to(d), None, None, w, torch.zeros_like(w), training=True)
    return torch.autograd.grad(y, w, g.to(d))[0].double()
low, true = run(torch.bfloat16), run(torch.float64)
excess = float((low - true).norm() / true.norm()) * 2**8
""",
        correct=_batch_norm_backward,
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
    KnownDefect(
        name="convolution-input-gradient",
        op="aten::convolution_backward",
        device="cpu",
        dtypes=HALF,
        torch_versions="2.13",
        summary="the gradient of a convolution's input is summed over overlapping windows in the low dtype on the CPU "
        "(float16; bfloat16 without oneDNN): with a kernel of 512 and a stride of 4 it is off by 6 times one rounding",
        reproduction="""
import torch
g, w = torch.randn(1, 4, 256).half(), torch.randn(4, 1, 4096).half()
def run(d):
    return torch.nn.grad.conv1d_input((1, 1, 4 * 255 + w.shape[2]), w.to(d), g.to(d), stride=4).double()
low, true = run(torch.float16), run(torch.float64)
excess = float((low - true).norm() / true.norm()) * 2**11
""",
        correct=_convolution_backward,
    ),
)

_BY_OP = {defect.op: defect for defect in KNOWN_DEFECTS}


def _single(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype in HALF:
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
