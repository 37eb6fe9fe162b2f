"""Products with quantised weights, and their gradients. No dequantised weight is kept for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from precision_runtime.layers.packing import unpack8

Dequantize = Callable[[torch.dtype], torch.Tensor]


class DequantizedProduct(torch.autograd.Function):
    """``x @ w.T + bias`` with ``w`` dequantised to the dtype of ``x`` for each pass.

    ``weight`` is the tensor that ``w`` was rounded from, where that is trained: its gradient is that of ``w``, as if
    nothing had been rounded. It is None where the weight is frozen.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, dequantize: Dequantize
    ) -> torch.Tensor:
        """See the class."""
        _keep(ctx, x, weight, bias, dequantize)
        return functional.linear(x, dequantize(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Gradients for ``x``, ``weight`` and ``bias``."""
        return *_gradients(ctx, gradients[0]), None


class Int8Product(torch.autograd.Function):
    """``x @ w.T + bias`` with the rows of ``x`` rounded to 8 bits as well, and whole-number arithmetic.

    Columns of ``x`` that reach ``threshold`` anywhere are multiplied in their own dtype. Gradients are those of the
    dequantised product. bitsandbytes needs, for a trained weight, a second rounding of ``x`` by columns, which has no
    kernel on a CPU; only its weight gradient uses it, so that here the forward pass is the same without.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, codes: torch.Tensor,
        scales: torch.Tensor, threshold: float,
    ) -> torch.Tensor:  # fmt: skip
        """See the class."""
        _keep(ctx, x, weight, bias, lambda dtype: unpack8(codes, scales, dtype))
        codes_x, scales_x, outliers = _coded(x, threshold)
        multiply = torch.ops.bitsandbytes.int8_mixed_scaled_mm.default
        product: torch.Tensor = multiply(x, codes_x, codes, scales_x, scales, outliers, bias)[0]
        return product

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Gradients for ``x``, ``weight`` and ``bias``."""
        return *_gradients(ctx, gradients[0]), None, None, None


def rounded_rows(x: torch.Tensor, threshold: float) -> torch.Tensor:
    """The values that ``Int8Product`` multiplies in place of ``x``: its columns of outliers are not rounded."""
    codes, scales, outliers = _coded(x.detach(), threshold)
    rows = unpack8(codes, scales, torch.float32)
    if outliers is not None and outliers.numel():
        rows[:, outliers.long()] = x.detach()[:, outliers.long()].float()
    return rows


def _coded(x: torch.Tensor, threshold: float) -> Any:
    # Always a copy, for bitsandbytes sets outliers to 0 in it for a moment. Its CUDA kernel takes float16 only.
    rows = x.to(torch.float32 if x.device.type == "cpu" else torch.float16, copy=True)
    return torch.ops.bitsandbytes.int8_vectorwise_quant.default(rows, threshold)


def _keep(
    ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, dequantize: Dequantize
) -> None:
    ctx.dequantize = dequantize
    ctx.dtypes = [None if t is None else t.dtype for t in (weight, bias)]
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)


def _gradients(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    needed = ctx.needs_input_grad
    to_x = g @ ctx.dequantize(g.dtype) if needed[0] else None
    to_weight = (g.T @ x).to(ctx.dtypes[0]) if needed[1] else None
    to_bias = g.sum(0, dtype=ctx.dtypes[1]) if needed[2] else None
    return to_x, to_weight, to_bias
