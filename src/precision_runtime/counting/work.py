"""How much work an op is, and in which dtype it runs: matrix products and convolutions in floating-point operations,
reductions in elements read.

The operations of products are torch's own count (``torch.utils.flop_counter``), which counts a multiplication and an
addition as two; only what torch has no formula for is counted here, in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

Kind = Literal["product", "reduction"]
Count = Callable[..., float]


@dataclass(frozen=True)
class Work:
    """What is known about an op: its kind, its amount of work by arguments and result, and where its operands are."""

    kind: Kind
    amount: Count
    operand: int = 0  # the first argument that is multiplied; what is added to a product is none

    def dtype(self, args: Any, result: Any) -> torch.dtype | None:
        """The dtype that a product's operands have, or that a reduction's result was rounded to; None if not floating.

        int8 operands count as such: a product of whole numbers stands for one of quantised values.
        """
        if self.kind == "product":
            operand = _first(args[self.operand])
            return operand.dtype if operand is not None else None
        first = _first(result)
        return first.dtype if first is not None and (first.is_floating_point() or first.is_complex()) else None


def work_of(func: Any) -> Work | None:
    """The work of an op as a dispatch mode is given it; None for everything else (casts, elementwise ops, views)."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return None
    name = schema.name.removesuffix("_") if schema.name.startswith("aten::") else schema.name
    if name in _COUNTS:
        return Work("product", _COUNTS[name], _OPERAND.get(name, 0))
    registered = flop_registry.get(_SAME_AS.get(name, func.overloadpacket))
    if registered is not None:
        return Work("product", _by_registry(registered), _OPERAND.get(name, 0))
    return Work("reduction", _elements) if name in REDUCTIONS else None


def _by_registry(formula: Callable[..., float]) -> Count:
    """A count by torch's formula. Most take shapes, inside a wrapper that takes tensors, slowly: left aside here."""
    of_shapes = getattr(formula, "__wrapped__", None)

    def count(args: Any, kwargs: Any, result: Any) -> float:
        if of_shapes is None:
            return float(formula(*args, **kwargs, out_val=result))
        named = {key: _shape(value) for key, value in kwargs.items()}
        return float(of_shapes(*map(_shape, args), **named, out_shape=_shape(result)))

    return count


def _shape(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.shape
    return type(value)(map(_shape, value)) if type(value) in (tuple, list) else value


def _elements(args: Any, kwargs: Any, result: Any) -> float:
    return float(max((t.numel() for t in args if isinstance(t, torch.Tensor)), default=0))


def _first(value: Any) -> torch.Tensor | None:
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, (tuple, list)):
        return next((t for t in value if isinstance(t, torch.Tensor)), None)
    return None


# Ops that are another one for the purpose of counting.
_SAME_AS: Mapping[str, Any] = MappingProxyType(
    {
        "aten::addmm": aten.addmm,
        "aten::baddbmm": aten.baddbmm,
        "aten::_addmm_activation": aten.addmm,
        "aten::_int_mm": aten.mm,
        "aten::_scaled_dot_product_flash_attention_for_cpu": aten._scaled_dot_product_flash_attention,
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward": aten._scaled_dot_product_flash_attention_backward,
        "aten::_scaled_dot_product_fused_attention_overrideable": aten._scaled_dot_product_flash_attention,
        "aten::_scaled_dot_product_fused_attention_overrideable_backward": (
            aten._scaled_dot_product_flash_attention_backward
        ),
    }
)
# Where the first operand of the product is not the first argument.
_OPERAND: Mapping[str, int] = MappingProxyType(
    {
        "aten::addmm": 1, "aten::baddbmm": 1, "aten::_addmm_activation": 1, "aten::addmv": 1, "aten::addbmm": 1,
        "bitsandbytes::int8_mixed_scaled_mm": 1,  # the codes; columns with outliers, few, are multiplied unrounded
    }
)  # fmt: skip


def _twice(position: int) -> Count:
    """Two operations for each element of an argument, which is met once."""

    def count(args: Any, kwargs: Any, result: Any) -> float:
        return float(2 * args[position].numel())

    return count


def _rows_by(columns: Callable[[Any], int]) -> Count:
    """A product whose left operand is the first argument."""

    def count(args: Any, kwargs: Any, result: Any) -> float:
        return float(2 * args[0].numel() * columns(args))

    return count


def _addbmm(args: Any, kwargs: Any, result: Any) -> float:
    return float(2 * args[1].numel() * args[2].shape[-1])


def _grouped(args: Any, kwargs: Any, result: Any) -> float:
    """Rows, columns or the inner axis are divided among the groups; each row meets the columns of its own group."""
    a, b = args[0], args[1]
    return float(2 * a.numel() * b.shape[-1] // (a.shape[0] if a.dim() == 3 and b.dim() == 2 else 1))


def _onednn_rnn(args: Any, kwargs: Any, result: Any) -> float:
    rows = math.prod(args[0].shape[:-1])
    return float(2 * rows * (args[1].numel() + args[2].numel()))


def _cudnn_rnn(args: Any, kwargs: Any, result: Any) -> float:
    rows = math.prod(args[0].shape[:-1])
    return float(2 * rows * sum(w.numel() for w in args[1] if w.dim() == 2))


def _doubled(count: Count) -> Count:
    """A backward pass has a product for the input's gradient and one for the weight's."""

    def both(args: Any, kwargs: Any, result: Any) -> float:
        return 2.0 * count(args, kwargs, result)

    return both


_COUNTS: Mapping[str, Count] = MappingProxyType(
    {
        "aten::mv": _twice(0),
        "aten::addmv": _twice(1),
        "aten::dot": _twice(0),
        "aten::vdot": _twice(0),
        "aten::linear": _rows_by(lambda args: args[1].shape[0]),
        "aten::addbmm": _addbmm,
        "aten::_grouped_mm": _grouped,
        "aten::_scaled_grouped_mm": _grouped,
        "aten::_scaled_mm_v2": _rows_by(lambda args: args[1].shape[-1]),
        "aten::mkldnn_rnn_layer": _onednn_rnn,
        "aten::mkldnn_rnn_layer_backward": _doubled(_onednn_rnn),
        "aten::_cudnn_rnn": _cudnn_rnn,
        "aten::_cudnn_rnn_backward": _doubled(_cudnn_rnn),
        "bitsandbytes::gemm_4bit": _rows_by(lambda args: args[2][0]),
        "bitsandbytes::gemv_4bit": _rows_by(lambda args: args[2][0]),
        "bitsandbytes::int8_linear_matmul": _rows_by(lambda args: args[1].shape[0]),
        "bitsandbytes::int8_scaled_mm": _rows_by(lambda args: args[1].shape[0]),
        "bitsandbytes::int8_mixed_scaled_mm": _rows_by(lambda args: args[2].shape[0]),
    }
)

REDUCTIONS = frozenset(
    f"aten::{name}"
    for name in (
        "sum", "nansum", "mean", "nanmean", "prod", "var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm",
        "logsumexp", "cumsum", "cumprod", "logcumsumexp", "trace", "dist", "_cdist_forward", "_cdist_backward",
        "_softmax", "_log_softmax", "_softmax_backward_data", "_log_softmax_backward_data",
        "native_layer_norm", "native_layer_norm_backward", "native_group_norm", "native_group_norm_backward",
        "_fused_rms_norm", "_fused_rms_norm_backward", "native_batch_norm", "native_batch_norm_backward",
        "_native_batch_norm_legit", "_batch_norm_with_update", "batch_norm_backward", "cudnn_batch_norm",
        "cudnn_batch_norm_backward", "miopen_batch_norm", "miopen_batch_norm_backward",
        "nll_loss_forward", "nll_loss2d_forward", "mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy",
        "embedding_dense_backward", "index_add", "scatter_add", "_embedding_bag", "avg_pool1d", "avg_pool2d",
        "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d",
    )
)  # fmt: skip
