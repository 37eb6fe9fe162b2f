"""What the low-precision run's values are made of: the code's own constants, integers, parameters that nothing rounds.

None of these had to be rounded. A table that code builds in half from numbers of its own (a grid, a schedule,
positions) could as well be in float32, in whichever module it is built; so could what is computed of integers that the
code is given (time steps, pixels), before something is decided by it; and under autocast a float32 parameter is cast
for matrix products only: what a custom autograd function does with its own is exact to float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from precision_runtime.auditing.executing.places import key_of, tensors_of

# Ops whose results hold nothing that a tensor among their arguments holds. Random ones are none of them.
_FACTORIES = frozenset(
    f"aten::{name}"
    for name in (
        "arange", "linspace", "logspace", "eye", "zeros", "ones", "zeros_like", "ones_like", "new_zeros", "new_ones",
        "tril_indices", "triu_indices", "hann_window", "hamming_window", "blackman_window", "kaiser_window",
        "bartlett_window",
    )
)  # fmt: skip
# These hold a number that may have been read from a tensor before.
_FILLED = frozenset(f"aten::{name}" for name in ("full", "full_like", "new_full", "scalar_tensor", "lift_fresh"))


class Provenance:
    """Told of each op of a run (``note``). ``buffers`` are tables, until something is written to them.

    What it does not see (compiled code) is neither a table nor a parameter that nothing rounds.
    """

    def __init__(self, buffers: Iterable[torch.Tensor], parameters: Iterable[nn.Parameter]) -> None:
        # Weak references: nothing else can take the place of a storage as long as there is one.
        self._tables: dict[int | None, StorageWeakRef] = {}
        self._counted: dict[int | None, StorageWeakRef] = {}  # floating tensors made of integers and constants
        self._decided: dict[int | None, StorageWeakRef] = {}  # integers and flags that floating values decided
        self._parameters: dict[int | None, int] = {}  # id by storage
        self._rounded: set[int] = set()
        self._used: set[int] = set()
        self._open = True
        self._read = False  # whether the code has looked at a number that it had computed
        for b in buffers:
            _mark(self._tables, key_of(b), b, True)
        for p in parameters:
            key = key_of(p)
            if key is not None and p.dtype is torch.float32:
                self._parameters[key] = id(p)

    def is_table(self, t: torch.Tensor) -> bool:
        """Whether ``t`` is made of constants only."""
        return key_of(t) in self._tables

    def is_exact(self, t: torch.Tensor) -> bool:
        """Whether ``t`` is made of constants and whole numbers only: nothing but the code's own choice rounds it."""
        key = key_of(t)
        return key in self._tables or key in self._counted

    @property
    def unrounded(self) -> frozenset[int]:
        """Float32 parameters, by id, that ops were given and that nothing has cast to another format."""
        return frozenset(self._used - self._rounded)

    def note(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        """See an op and what came of it."""
        if not self._open:
            return
        name, given = func._schema.name, [*tensors_of(args), *tensors_of(kwargs)]
        made_keys = {key_of(t) for t in tensors_of(result)}
        constant = 0
        for t in given:
            key = key_of(t)
            if key in self._tables:
                constant += 1
            elif key in self._parameters and key not in made_keys:  # a view of one is it still
                (self._rounded if _is_cast(name, t, result) else self._used).add(self._parameters[key])
        if name == "aten::_local_scalar_dense":
            self._read |= constant < len(given)
            return
        made = name in _FACTORIES or (name in _FILLED and not self._read) or 0 < constant == len(given)
        exact = made or (name not in _FILLED and bool(given) and all(self._has_no_rounding(t) for t in given))
        for t in tensors_of(result) if func._schema.returns else given:  # what returns nothing writes to its arguments
            key = key_of(t)
            _mark(self._tables, key, t, made)
            if t.is_floating_point() or t.is_complex():
                _mark(self._counted, key, t, exact and not made)
            else:
                _mark(self._decided, key, t, not exact)

    def close(self) -> None:
        """The forward pass is over. Where a backward pass casts a parameter, that is its own doing, not autocast's."""
        self._open = False

    def _has_no_rounding(self, t: torch.Tensor) -> bool:
        """Whether ``t`` is made of constants and integers that were given; integers that floats decided are neither."""
        if t.is_floating_point() or t.is_complex():
            return self.is_exact(t)
        return key_of(t) not in self._decided


def _mark(marks: dict[int | None, StorageWeakRef], key: int | None, t: torch.Tensor, is_one: bool) -> None:
    if is_one and key is not None:
        marks[key] = StorageWeakRef(t.untyped_storage())
    elif not is_one:
        marks.pop(key, None)


def _is_cast(name: str, t: torch.Tensor, result: Any) -> bool:
    return name == "aten::_to_copy" and isinstance(result, torch.Tensor) and result.dtype is not t.dtype
