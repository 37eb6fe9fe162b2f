"""Which float32 values autocast rounds: those that a matrix product or convolution is given, in half.

Everything else in float32 stays as exact as float32 is, so no error is excused by what its rounding would have cost: a
phase of 600 radians that a cosine is taken of, a decay, coordinates that are subtracted. A cast that feeds no product
is the code's own choice, and no rounding that had to be. Nor had data to be rounded for a product with constants, in
which no weight has a part: filters, frequencies, a transform, whose island in FP32 costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from precision_runtime.auditing.executing.places import key_of, tensors_of
from precision_runtime.casting import HALF

# What autocast gives operands in half, by the names that reach a dispatch mode; ops that are not torch's count, too.
_ROUNDING = frozenset(
    f"aten::{name}"
    for name in (
        "mm", "bmm", "addmm", "baddbmm", "addbmm", "addmv", "mv", "dot", "vdot", "addr", "linear", "matmul",
        "convolution", "_convolution", "conv_tbc", "_grouped_mm", "_trilinear", "mkldnn_rnn_layer", "lstm", "gru",
        "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "rnn_tanh", "rnn_relu",
        "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention",
        "_native_multi_head_attention", "_transformer_encoder_layer_fwd", "_flash_attention_forward",
    )
)  # fmt: skip
# A number that was read goes where nobody sees it.
_UNSEEN = frozenset(("aten::_local_scalar_dense",))
# Ops that hand a cast on as it is: to a product in another shape.
_MOVING = frozenset(
    f"aten::{name}"
    for name in (
        "clone", "copy_", "cat", "stack", "constant_pad_nd", "index", "index_select", "gather", "repeat", "roll",
        "flip", "im2col", "expand_copy", "_unsafe_view", "_reshape_copy", "_to_copy", "where", "masked_fill",
        "slice_scatter", "select_scatter", "contiguous", "embedding",
    )
)  # fmt: skip
_NOTHING: frozenset[int] = frozenset()


class Roundings:
    """Told of values at the borders of calls (``admit``) and of each op of the run (``note``), in order."""

    def __init__(self, modules: Collection[nn.Module]) -> None:
        self.now = 0  # how many ops have been seen
        self._made_of: dict[int | None, frozenset[int]] = {}  # by storage: of which admitted values, never rounded
        self._alive: dict[int | None, StorageWeakRef] = {}  # nothing else can take a storage's place meanwhile
        self._cast: dict[int | None, frozenset[int]] = {}  # the same of what has been cast to half
        self._rounded: dict[int, int] = {}  # by admitted value, when first it was
        self._used: dict[int, int] = {}  # when first an op was given it
        self._admitted = 0
        self._learned: set[int | None] = set()  # storages that hold parameters, or what was made of them
        self._data: set[int | None] = set()  # those that hold admitted values, or what was made of them in any dtype
        for m in modules:
            for p in m._parameters.values():
                if p is not None:
                    self._hold(self._learned, p)
        # Compiled code shows nobody its ops.
        self._open = True
        self._blind = any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in modules)

    def admit(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, int]:
        """Follow these values, by path, from now on; the numbers that they are known by."""
        out: dict[str, int] = {}
        for path, t in tensors:
            key = key_of(t) if t.is_floating_point() and not self._blind else None
            if key is None:
                continue
            self._hold(self._data, t)
            if t.dtype is torch.float32:
                out[path] = self._admitted
                self._made_of[key] = self._made_of.get(key, frozenset()) | {self._admitted}
                self._admitted += 1
        return out

    def spared(self, admitted: Mapping[str, int], until: float) -> frozenset[str]:
        """The paths of those that ops were given, but no product in half, until so many ops had been seen."""
        return frozenset(
            path
            for path, number in admitted.items()
            if number in self._used and self._used[number] <= until
            if number not in self._rounded or self._rounded[number] > until
        )

    def note(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        """See an op and what came of it."""
        if not self._open or self._blind:
            return
        self.now += 1
        name, made, cast = func._schema.name, frozenset[int](), frozenset[int]()
        learned = data = constant = False
        for t in (*tensors_of(args), *tensors_of(kwargs)):
            key = key_of(t)
            made |= self._made_of.get(key, _NOTHING)
            cast |= self._cast.get(key, _NOTHING)
            learned = learned or key in self._learned
            data = data or key in self._data
            constant = constant or (t.is_floating_point() and key not in self._data)
        made_now = tensors_of(result) if func._schema.returns else tensors_of(args)
        for t in made_now if learned or data else ():
            if learned:
                self._hold(self._learned, t)
            if data:
                self._hold(self._data, t)
        if not made and not cast:
            return
        self._mark(self._used, made)
        if name in _ROUNDING:
            self._mark(self._rounded, cast if learned or not constant else _NOTHING)
        elif name in _UNSEEN or not name.startswith("aten::"):
            self._mark(self._rounded, made | cast)
        handed = made | cast if name == "aten::_to_copy" else cast if name in _MOVING else _NOTHING
        for t in made_now:
            if t.dtype in HALF:
                self._add(self._cast, t, handed)
            elif t.is_floating_point() or t.is_complex():
                self._add(self._made_of, t, made)

    def close(self) -> None:
        """The forward pass is over."""
        self._open = False

    def _hold(self, storages: set[int | None], t: torch.Tensor) -> None:
        key = key_of(t)
        if key is not None:
            storages.add(key)
            self._alive.setdefault(key, StorageWeakRef(t.untyped_storage()))

    def _mark(self, when: dict[int, int], numbers: Collection[int]) -> None:
        for number in numbers:
            when.setdefault(number, self.now)

    def _add(self, table: dict[int | None, frozenset[int]], t: torch.Tensor, numbers: frozenset[int]) -> None:
        key = key_of(t) if numbers else None
        if key is not None:
            table[key] = table.get(key, _NOTHING) | numbers
            self._alive.setdefault(key, StorageWeakRef(t.untyped_storage()))
