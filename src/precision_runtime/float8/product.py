"""y = x w^T + b in 8 or 4 bits, with gradients: sums in float32, results in the dtype of the weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from precision_runtime.errors import UnsupportedError
from precision_runtime.float8.quantizing import Operand
from precision_runtime.float8.wide import without_autocast

if TYPE_CHECKING:
    from precision_runtime.float8.layers import Float8Linear


class Product(torch.autograd.Function):
    """The layer's three products. ``x`` is a matrix; the input's gradient has its dtype, the weight's its own."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, layer: Float8Linear
    ) -> torch.Tensor:
        """Y."""
        (left, right), saved = layer.scheme.forward(layer, x, weight)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*saved)
            ctx.layer, ctx.dtypes = layer, (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        result = multiplied(left, right.values.t(), right.factor)
        if bias is not None:
            result.add_(bias)
        return result.to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """dx, dw, db. The bias's gradient is summed from the gradient as it came, which is not rounded for it.

        Raises ``UnsupportedError`` under ``create_graph``: a second derivative would silently lack these layers' share.
        """
        if torch.is_grad_enabled():
            raise UnsupportedError(
                "FP8 layers have no second derivative, and backward was called with create_graph=True. Layers whose "
                "gradients are differentiated again have to stay out of FP8: ignore_modules=(...), or islands={...}"
            )
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        dx = dw = db = None
        if needs_x or needs_weight:
            first, second = ctx.layer.scheme.backward(ctx.layer, gradient, ctx.saved_tensors, needs_x, needs_weight)
            dx = None if first is None else multiplied(first[0], first[1].values, first[1].factor).to(x_dtype)
            dw = None if second is None else multiplied(second[0], second[1].values, second[1].factor).to(weight_dtype)
        if needs_bias:
            db = gradient.sum(0, dtype=torch.float32).to(bias_dtype)
        return dx, dw, db, None


def multiplied(left: Operand, right: torch.Tensor, right_factor: torch.Tensor | None) -> torch.Tensor:
    """The float32 product of two matrices with their factors, which follow the sums as in a GPU's epilogue."""
    with without_autocast(right.device.type):
        result = left.values @ right
    factors = [f for f in (left.factor, right_factor) if f is not None]
    if factors:
        result.mul_(factors[0] if len(factors) == 1 else factors[0] * factors[1])
    return result
