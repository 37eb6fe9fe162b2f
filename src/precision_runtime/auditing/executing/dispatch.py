"""The two dispatch modes of an audit: true FP64 for the reference, a watching eye for the low-precision run.

Both sit below autograd and autocast, so that they see casts as ``aten._to_copy`` and the ops of the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._ops import HigherOrderOperator

from precision_runtime.auditing.executing.defects import KnownDefect, defect_of
from precision_runtime.auditing.executing.masking import MASKED, Masking
from precision_runtime.auditing.executing.noise import Noise, Reach, is_count
from precision_runtime.auditing.executing.provenance import Provenance
from precision_runtime.auditing.executing.randomness import Draw, draw_of
from precision_runtime.auditing.executing.roundings import Roundings
from precision_runtime.auditing.executing.snapshots import Snapshots
from precision_runtime.auditing.executing.unseen import made_of_others, traced
from precision_runtime.auditing.executing.writes import Places, places_written
from precision_runtime.dispatching import OwnMode, opened
from precision_runtime.formats import FORMATS
from precision_runtime.setup import forwarding
from precision_runtime.tf32 import rounded_operands

aten = torch.ops.aten

WIDE = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
    torch.complex32: torch.complex128,
}
# Matrix products and convolutions, by the names that reach a dispatch mode.
PRODUCTS = frozenset(
    f"aten::{name}"
    for name in (
        "mm", "bmm", "addmm", "baddbmm", "addmv", "mv", "dot", "convolution", "linear", "_grouped_mm",
        "mkldnn_rnn_layer", "lstm", "gru", "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention", "_scaled_dot_product_flash_attention",
    )
)  # fmt: skip


@contextmanager
def plain_double() -> Iterator[None]:
    """Set-up modules run plainly, autocast is off, and new tensors are FP64."""
    before = torch.get_default_dtype()
    with forwarding.suspended():
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


# Ops that turn values into decisions: a rounded operand that stands near a tie decides otherwise.
_DECISIONS = frozenset(
    f"aten::{name}"
    for name in (
        "topk", "sort", "argsort", "argmax", "argmin", "max", "min", "kthvalue", "median", "mode", "ge", "gt", "le",
        "lt", "floor", "ceil", "round", "trunc", "floor_divide", "bucketize", "searchsorted",
        "grid_sampler_2d", "grid_sampler_3d", "grid_sampler_2d_backward", "grid_sampler_3d_backward",
    )
)  # fmt: skip
# What decides is the first operand, but where these say otherwise: the grid, not the image.
_DECIDING = {
    "aten::grid_sampler_2d": 1, "aten::grid_sampler_3d": 1,
    "aten::grid_sampler_2d_backward": 2, "aten::grid_sampler_3d_backward": 2,
}  # fmt: skip
# Sums in float16, the only half format whose largest number a score of some tens can be added to with an effect.
_SUMS = frozenset(("aten::add", "aten::add_"))
# Of these, and of comparisons for equality, the ones that go otherwise where two values are equal: in a half format
# values that lie close together are. So the operands are rounded to the mode's grid, too.
_TIES = frozenset(
    f"aten::{name}"
    for name in ("topk", "sort", "argsort", "argmax", "argmin", "max", "min", "kthvalue", "median", "mode")
)
_EQUALITIES = frozenset(("aten::eq", "aten::ne"))
# The gradient of a softmax is a difference of terms that cancel (exactly, in the sum over a row), so an exact zero such
# as the gradient of a key's bias stays one however the rest of an FP64 run is disturbed. What rounding costs there goes
# by the size of the terms: the operands are disturbed.
_CANCELLING = frozenset(
    f"aten::{name}"
    for name in (
        "_softmax_backward_data", "_scaled_dot_product_flash_attention_for_cpu_backward",
        "_scaled_dot_product_flash_attention_backward", "_scaled_dot_product_efficient_attention_backward",
        "_scaled_dot_product_cudnn_attention_backward",
    )
)  # fmt: skip


# A norm sums squares, so nothing cancels in it and its result carries one rounding, the same for a whole row. Noise on
# the elements averages out and cannot stand for it: the result is disturbed, where it had been rounded.
_NORMS = frozenset(("aten::linalg_vector_norm", "aten::norm"))


class TrueDouble(OwnMode):
    """Every floating computation in FP64, also where user code asks for another dtype.

    - a floating ``dtype=`` narrower than 64 bits (``.float()``, ``softmax(dtype=...)``, factories) becomes FP64;
    - narrower floating operands are widened first (constants that user code made in FP32);
    - an op without an FP64 kernel runs on FP32 copies and its results are widened (``fallbacks`` lists them);
    - random draws are made as in the low-precision run;
    - entirely masked rows of attention are settled as there (``masking``).

    With ``noise`` some ops are disturbed besides what a ``Recorder`` disturbs: operands of ``_CANCELLING`` ops, and
    operands of decisions and results of norms that had been rounded to the mode's dtype when the low-precision run came
    to the same place. ``marks`` says so: an iterator for each open module call, innermost last. ``products`` is the
    unit roundoff of the operands of matrix products and convolutions where a mode rounds those more coarsely.
    """

    def __init__(
        self, noise: Noise | None = None, marks: Sequence[bool] = (), masking: Masking | None = None,
        products: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self._masking = masking or Masking(FORMATS["float64"])
        self._products = products
        self.fallbacks: set[str] = set()
        self.marks: list[Iterator[bool]] = [iter(marks)]
        self._noise = noise
        self.snapshots = Snapshots()
        self.seen: Callable[[Sequence[Any]], None] | None = None  # told what each op is given
        self._plans: dict[Any, tuple[Draw | None, bool, Places]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if types and made_of_others(types):
            return NotImplemented
        kwargs = dict(kwargs or {})
        if traced():
            return func(*args, **kwargs)
        plan = self._plans.get(func)
        if plan is None:
            if isinstance(func, HigherOrderOperator):
                return opened(self, func, args, kwargs)
            aliases = any(a.alias_info is not None for a in func._schema.arguments)
            plan = self._plans[func] = (draw_of(func), aliases, places_written(func))
        draw, aliases, places = plan
        writes = bool(places)
        if self.seen is not None:
            self.seen(args)
        if writes:
            self.snapshots.before(places, args, kwargs)
        dtype = kwargs.get("dtype")
        if dtype in WIDE:
            kwargs["dtype"] = WIDE[dtype]
        if draw is not None:
            return draw(func, args, kwargs)
        if not aliases or writes:
            args, kwargs = self._widen(args, kwargs, writes)
        if self._noise is not None and not writes:
            args = self._disturbed(func, args)
        try:
            if func._schema.name in MASKED:
                return self._masking.run(func, args, kwargs)
            result = func(*args, **kwargs)
        except (RuntimeError, NotImplementedError) as error:
            return self._narrow(func, args, kwargs, writes, error)
        if self._noise is not None and func._schema.name in _NORMS and next(self.marks[-1], False):
            return result if self._noise.reach is Reach.OUTSIDE else self._noise(result)
        if self._noise is not None and self._noise.reach is Reach.RESULTS and func._schema.name in PRODUCTS:
            return _each(self._noise.rounded, result)
        return result

    def _disturbed(self, func: Any, args: Sequence[Any]) -> Sequence[Any]:
        name = func._schema.name
        noise = self._noise
        assert noise is not None
        if self._products:
            places = rounded_operands(func.overloadpacket)
            args = [noise.by(self._products, a) if i in places else a for i, a in enumerate(args)]
        if name in _CANCELLING:
            return tuple(_each(noise, a) for a in args)
        if is_decision(func, args) and next(self.marks[-1], False):
            if noise.reach is Reach.RESULTS:
                return args
            if name not in _EQUALITIES:
                args = tuple(_each(lambda t: t if is_count(t) else noise.rounded(t), a) for a in args)
            return tuple(_each(noise.on_grid, a) for a in args) if name in _TIES or name in _EQUALITIES else args
        return args

    @staticmethod
    def _widen(args: Sequence[Any], kwargs: dict[str, Any], writes: bool) -> tuple[Sequence[Any], dict[str, Any]]:
        if not any(_is_narrow(a) for a in args) and not any(_is_narrow(a) for a in kwargs.values()):
            return args, kwargs
        if writes:  # the written tensor keeps its dtype; torch promotes elementwise operands by itself
            return args, kwargs
        return tuple(_each(_wide, a) for a in args), {k: _each(_wide, v) for k, v in kwargs.items()}

    def _narrow(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], writes: bool, error: Exception) -> Any:
        if not any(_is_double(a) for a in (*args, *kwargs.values())):
            raise error
        copies: list[tuple[torch.Tensor, torch.Tensor]] = []

        def single(t: torch.Tensor) -> torch.Tensor:
            if t.dtype not in (torch.float64, torch.complex128):
                return t
            new = t.to(torch.float32 if t.dtype == torch.float64 else torch.complex64)
            copies.append((t, new))
            return new

        try:
            result = func(*(_each(single, a) for a in args), **{k: _each(single, v) for k, v in kwargs.items()})
        except (RuntimeError, NotImplementedError):
            raise error from None
        self.fallbacks.add(func._schema.name)
        if writes:
            written = {id(new): old for old, new in copies}
            for old, new in copies:
                old.copy_(new)
            return _each(lambda t: written.get(id(t), t), result)
        return _each(_wide, result)


@dataclass
class Trace:
    """What the ops of one module call did: floating dtypes that they produced, terms of their longest sum."""

    dtypes: set[torch.dtype] = field(default_factory=set)
    terms: float = 1.0
    decisions: list[bool] = field(default_factory=list)  # its own and norms, in order: had the value been rounded?

    def include(self, inner: Trace) -> None:
        """Add what a call inside this one did."""
        self.dtypes |= inner.dtypes
        self.terms = max(self.terms, inner.terms)


class LowWatch(OwnMode):
    """Runs the low-precision code as it is, with canonical draws, and notes what it did.

    ``frames`` holds what the ops did in each open module call, innermost last; ``frames[0]`` is the whole run.
    ``products`` holds the dtypes that matrix products and convolutions ran in, ``defects`` the known backend defects
    that were met; those are computed rightly instead, so that they hide nothing else. ``snapshots`` are told what the
    ops write to, and ``provenance`` and ``roundings``, where there are any, what they make of what.
    """

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Whether code that torch compiles is compiled under this mode, too: it is judged as it will run."""
        return True

    def __init__(self, low: torch.dtype, masking: Masking | None = None, copying: bool = False) -> None:
        super().__init__()
        self.provenance: Provenance | None = None
        self.roundings: Roundings | None = None
        self._low, self._masking = low, masking or Masking(FORMATS["float64"])
        self.products: set[torch.dtype] = set()
        self.frames: list[Trace] = [Trace()]
        self.defects: dict[str, tuple[KnownDefect, float]] = {}
        self.snapshots = Snapshots(copying)
        self._plans: dict[Any, tuple[Draw | None, bool, KnownDefect | None, Places]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if types and made_of_others(types):
            return NotImplemented
        kwargs = dict(kwargs or {})
        if traced():
            return func(*args, **kwargs)
        plan = self._plans.get(func)
        if plan is None:
            if isinstance(func, HigherOrderOperator):
                return opened(self, func, args, kwargs)
            name = func._schema.name
            plan = self._plans[func] = (draw_of(func), name in PRODUCTS, defect_of(name), places_written(func))
        draw, product, defect, places = plan
        if places:
            self.snapshots.before(places, args, kwargs)
        if draw is not None:
            return draw(func, args, kwargs)
        if is_decision(func, args):
            self.frames[-1].decisions.append(self._is_rounded_operand(args[_DECIDING.get(func._schema.name, 0)]))
        if func._schema.name in MASKED:
            result = self._masking.run(func, args, kwargs)
        elif func._schema.name in _SUMS and args[0].dtype is torch.float16:
            scores = args[0].clone() if func._schema.name.endswith("_") else args[0]
            result = func(*args, **kwargs)
            self._masking.watch(scores, args[1], result)
        else:
            result = func(*args, **kwargs)
        if func._schema.name in _NORMS:
            self.frames[-1].decisions.append(_is_rounded(result, self._low))
        if defect is not None:
            result = self._repair(defect, func, args, kwargs, result)
        if self.provenance is not None:
            self.provenance.note(func, args, kwargs, result)
        if self.roundings is not None:
            self.roundings.note(func, args, kwargs, result)
        first = result if isinstance(result, torch.Tensor) else _first_tensor(result)
        if first is not None and first.is_floating_point():
            trace = self.frames[-1]
            trace.dtypes.add(first.dtype)
            trace.terms = max(trace.terms, _terms(func._schema.name, args, first, product))
            if product:
                self.products.add(first.dtype)
        return result

    def _is_rounded_operand(self, t: torch.Tensor) -> bool:
        """Whether rounding to the mode's dtype is the price of ``t``, and not what constants and integers became."""
        return _is_rounded(t, self._low) and not (self.provenance is not None and self.provenance.is_exact(t))

    def _repair(
        self, defect: KnownDefect, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
    ) -> Any:
        right = defect.correct(func, args, kwargs, result)
        if right is None:
            return result
        better, factor = right
        before = self.defects.get(defect.name, (defect, 0.0))[1]
        self.defects[defect.name] = (defect, max(before, factor))
        return better


def is_decision(func: Any, args: Sequence[Any]) -> bool:
    """Whether the op decides something by floating operands."""
    name = func._schema.name
    if (
        (name not in _DECISIONS and name not in _EQUALITIES)
        or not args
        or not isinstance(args[0], torch.Tensor)
        or not args[0].is_floating_point()
    ):
        return False
    return name not in ("aten::max", "aten::min") or len(func._schema.returns) == 2


def _is_rounded(t: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the tensor is in the dtype, or holds only values that the dtype has."""
    return t.dtype == dtype or bool((t.to(dtype).to(t.dtype) == t).all())


# Ops that add rows where an index says: all of them may fall on one.
_SCATTERS = frozenset(f"aten::{n}" for n in ("embedding_dense_backward", "index_add", "scatter_add", "index_put"))


def _terms(name: str, args: Sequence[Any], result: torch.Tensor, product: bool) -> float:
    """How many terms each element of the result sums: K for (M, K) @ (K, N), by the sizes alone."""
    size = max(1, result.numel())
    if name in _SCATTERS:
        return float(
            max((a.numel() for a in args if isinstance(a, torch.Tensor) and not a.is_floating_point()), default=1)
        )
    if not product:
        source = args[0] if args else None
        return source.numel() / size if isinstance(source, torch.Tensor) else 1.0
    sizes = sorted((a.numel() for a in args if isinstance(a, torch.Tensor)), reverse=True)[:2]
    return math.sqrt(sizes[0] * sizes[1] / size) if len(sizes) == 2 else 1.0


def _first_tensor(value: Any) -> torch.Tensor | None:
    if isinstance(value, (list, tuple)):
        return next((v for v in value if isinstance(v, torch.Tensor)), None)
    return None


def _each(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, (list, tuple)) and any(isinstance(v, torch.Tensor) for v in value):
        return type(value)(_each(function, v) for v in value) if type(value) in (list, tuple) else value
    return value


def _wide(t: torch.Tensor) -> torch.Tensor:
    return t.to(WIDE[t.dtype]) if t.dtype in WIDE else t


def _is_narrow(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dtype in WIDE
    return isinstance(value, (list, tuple)) and any(isinstance(v, torch.Tensor) and v.dtype in WIDE for v in value)


def _is_double(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dtype in (torch.float64, torch.complex128)
    return isinstance(value, (list, tuple)) and any(_is_double(v) for v in value)
