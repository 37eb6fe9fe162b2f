"""Which functions Apex's O1 runs in half, in float32, or in the widest dtype of their operands.

The lists are those of apex/amp/lists (NVIDIA, 2018 to 2023), which wrapped functions of ``torch``,
``torch.nn.functional`` and ``torch.Tensor``. torch's autocast grew out of them and differs in some: on a CPU, softmax,
norms, exponentials and sums run in half under autocast, and on every device interpolation, ``std`` and ``var`` do. Here
Apex's rules stand above autocast, which casts the operands of matrix products and convolutions by both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from precision_runtime.errors import PrecisionError

# Products and convolutions that are not here are on both lists: autocast casts them, and keeps its casts of weights.
_HALF = ("addmv", "addr", "mv", "prelu", "conv_tbc")

_SINGLE_FUNCTIONAL = (
    "interpolate", "softplus", "softmin", "log_softmax", "softmax", "layer_norm", "group_norm", "local_response_norm",
    "normalize", "cosine_similarity", "poisson_nll_loss", "cosine_embedding_loss", "cross_entropy",
    "hinge_embedding_loss", "kl_div", "l1_loss", "mse_loss", "margin_ranking_loss", "multilabel_margin_loss",
    "multilabel_soft_margin_loss", "multi_margin_loss", "nll_loss", "binary_cross_entropy_with_logits",
    "smooth_l1_loss", "soft_margin_loss", "triplet_margin_loss",
)  # fmt: skip
_SINGLE = (
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "reciprocal", "rsqrt", "sinh", "tan",
    "pow", "cumprod", "cumsum", "dist", "norm", "prod", "std", "sum", "var", "renorm",
)  # fmt: skip
_SINGLE_METHODS = ("__pow__", "__rpow__", "__ipow__", "cpu")
# What Apex did not know of, or reached through a function of its list; both run in float32 under CUDA's autocast.
_SINGLE_SINCE = ("softmax", "log_softmax", "rms_norm")

_WIDEST = (
    "addcdiv", "addcmul", "atan2", "cross", "bilinear", "dot", "add", "div", "mul", "sub", "true_divide", "eq",
    "equal", "ge", "gt", "le", "lt", "ne", "cat", "stack",
)  # fmt: skip
_WIDEST_SINCE = ("vdot", "inner")  # like dot they take no two dtypes, and spectral_norm's product is in half
_WIDEST_METHODS = (
    "__add__", "__eq__", "__ge__", "__gt__", "__le__", "__lt__", "__mul__", "__ne__", "__radd__", "__rdiv__",
    "__rmul__", "__rsub__", "__rtruediv__", "__sub__", "__truediv__",
)  # fmt: skip
_WIDEST_IN_PLACE = ("__iadd__", "__idiv__", "__imul__", "__isub__", "__itruediv__")

Rule = Callable[["ApexFunctions", Any, Sequence[Any], Mapping[str, Any]], Any]


class ApexFunctions(TorchFunctionMode):
    """Inside, the functions of Apex's lists cast their operands as O1 does; ``half`` is the dtype that it calls half.

    Where autocast is off on ``device``, as in an FP32 island, they cast nothing either. Functions written in Python
    (``multi_head_attention_forward``) are seen as one: what they call is left to autocast.
    """

    def __init__(self, half: torch.dtype, device: str) -> None:
        super().__init__()
        self.half, self.device = half, device

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        rule = _RULES.get(func)
        if rule is None or not torch.is_autocast_enabled(self.device):
            return func(*args, **(kwargs or {}))
        return rule(self, func, args, kwargs or {})


class ApexBackward(ApexFunctions):
    """The same for a backward pass, where autocast is on only while a checkpointed part of forward is run again.

    Checkpointing brings autocast back for that, and no mode like this one: without it the second run would have other
    dtypes than the first.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        by_edges = _BY_EDGES.get(func)
        call = None if by_edges is None else by_edges(*args, **(kwargs or {}))
        if call is None:
            return super().__torch_function__(func, types, args, kwargs)
        with self:
            return call()


def _in_half(mode: ApexFunctions, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return func(*_cast(args, torch.float32, mode.half), **_cast_named(kwargs, torch.float32, mode.half))


def _in_single(mode: ApexFunctions, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return func(*_cast(args, mode.half, torch.float32), **_cast_named(kwargs, mode.half, torch.float32))


def _in_widest(mode: ApexFunctions, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Where half meets float32, also a float32 scalar tensor, which torch's own promotion would not count."""
    if _has(args, kwargs, mode.half) and _has(args, kwargs, torch.float32):
        return _in_single(mode, func, args, kwargs)
    return func(*args, **kwargs)


def _as_first(mode: ApexFunctions, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """In place: the others follow the tensor that is written to."""
    target = args[0].dtype
    if target is mode.half or target is torch.float32:
        source = torch.float32 if target is mode.half else mode.half
        args, kwargs = (args[0], *_cast(args[1:], source, target)), _cast_named(kwargs, source, target)
    return func(*args, **kwargs)


def _never_in_place(mode: ApexFunctions, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if _has(args, kwargs, mode.half):
        name = func.__name__
        raise PrecisionError(
            f"apex-O1 runs {name.rstrip('_')} in float32, and {name} would write its result into a {mode.half} tensor. "
            f"Use {name.rstrip('_')}, or convert the tensor with .float() beforehand."
        )
    return func(*args, **kwargs)


def _banned(mode: ApexFunctions, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if _has(args, kwargs, mode.half):
        raise PrecisionError(
            f"apex-O1 refuses {func.__name__} of {mode.half} tensors: probabilities near 0 and 1 do not survive there. "
            "Use binary_cross_entropy_with_logits (BCEWithLogitsLoss) without the sigmoid before it, or .float()."
        )
    return func(*args, **kwargs)


# Tensors stand in these functions' arguments by themselves or in one list (cat). No general walk over trees: the
# compiler must see through this.


def _has(args: Sequence[Any], kwargs: Mapping[str, Any], dtype: torch.dtype) -> bool:
    for value in (*args, *kwargs.values()):
        for each in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(each, torch.Tensor) and each.dtype is dtype:
                return True
    return False


def _cast(values: Sequence[Any], source: torch.dtype, target: torch.dtype) -> list[Any]:
    return [_one(value, source, target) for value in values]


def _cast_named(values: Mapping[str, Any], source: torch.dtype, target: torch.dtype) -> dict[str, Any]:
    return {name: _one(value, source, target) for name, value in values.items()}


def _one(value: Any, source: torch.dtype, target: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(target) if value.dtype is source else value
    if isinstance(value, (list, tuple)) and any(isinstance(each, torch.Tensor) for each in value):
        return [_one(each, source, target) for each in value]
    return value


# A backward pass begins with functions of torch, for which it takes the mode away that handles them. The same call on
# edges of the graph in place of tensors is none that a mode handles, so the mode stays. None: it takes tensors.


def _tensor_backward(
    tensor: torch.Tensor, gradient: Any = None, retain_graph: Any = None, create_graph: bool = False, inputs: Any = None
) -> Callable[[], Any] | None:
    return _backward((tensor,), gradient, retain_graph, create_graph, inputs=inputs)


def _backward(
    tensors: Any, grad_tensors: Any = None, retain_graph: Any = None, create_graph: bool = False, **others: Any
) -> Callable[[], Any] | None:
    ends = _edges(tensors)
    if ends is None or any(value is not None for value in others.values()):
        return None
    return partial(torch.autograd.backward, ends, grad_tensors, retain_graph, create_graph)


def _grad(outputs: Any, inputs: Any, grad_outputs: Any = None, **others: Any) -> Callable[[], Any] | None:
    ends, starts = _edges(outputs), _edges(inputs)
    if ends is None or starts is None or others.get("materialize_grads"):
        return None
    return partial(torch.autograd.grad, ends, starts, grad_outputs, **others)


def _edges(tensors: Any) -> tuple[GradientEdge, ...] | None:
    given = (tensors,) if isinstance(tensors, torch.Tensor) else tensors
    plain = isinstance(given, (tuple, list)) and all(type(t) in _PLAIN and t.requires_grad for t in given)
    return tuple(map(get_gradient_edge, given)) if plain else None


_PLAIN = (torch.Tensor, torch.nn.Parameter)
_BY_EDGES: dict[Any, Callable[..., Callable[[], Any] | None]] = {
    torch.Tensor.backward: _tensor_backward,
    torch.autograd.backward: _backward,
    torch.autograd.grad: _grad,
}


def _found(names: Iterable[str], *owners: Any) -> Iterator[Any]:
    for name in names:
        for owner in owners:
            if hasattr(owner, name):
                yield getattr(owner, name)


def _in_place(names: Iterable[str]) -> list[str]:
    return [f"{name}_" for name in names]


def _rules() -> dict[Any, Rule]:
    both = (torch, torch.Tensor)
    table: tuple[tuple[Rule, Iterator[Any]], ...] = (
        (_in_half, _found(_HALF, *both, functional)),
        (_in_single, _found(_SINGLE_FUNCTIONAL, functional)),
        (_in_single, _found((*_SINGLE, *_SINGLE_SINCE), *both, functional)),
        (_in_single, _found(_SINGLE_METHODS, torch.Tensor)),
        (_in_widest, _found((*_WIDEST, *_WIDEST_SINCE), *both)),
        (_in_widest, _found(_WIDEST_METHODS, torch.Tensor)),
        (_as_first, _found(_in_place((*_WIDEST, "addmv", "addr")), torch.Tensor)),
        (_as_first, _found(_WIDEST_IN_PLACE, torch.Tensor)),
        (_never_in_place, _found(_in_place(_SINGLE), *both)),
        (_banned, _found(["binary_cross_entropy"], functional)),
    )
    return {func: rule for rule, funcs in table for func in funcs}


_RULES: dict[Any, Rule] = _rules()  # a plain dict: the compiler looks into no other with keys like these
