"""What the low-precision run's values are made of: the code's own constants, and parameters that nothing rounds.

Neither had to be rounded. A table that code builds in half from numbers of its own (a grid, a schedule, positions)
could as well be in float32, in whichever module it is built; and under autocast a float32 parameter is cast for matrix
products only: what a custom autograd function does with its own is exact to float32.
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
        self._parameters: dict[int | None, int] = {}  # id by storage
        self._rounded: set[int] = set()
        self._used: set[int] = set()
        self._open = True
        self._read = False  # whether the code has looked at a number that it had computed
        for b in buffers:
            self._hold(b)
        for p in parameters:
            key = key_of(p)
            if key is not None and p.dtype is torch.float32:
                self._parameters[key] = id(p)

    def is_table(self, t: torch.Tensor) -> bool:
        """Whether ``t`` is made of constants only."""
        return key_of(t) in self._tables

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
        for t in tensors_of(result) if func._schema.returns else given:  # what returns nothing writes to its arguments
            if made:
                self._hold(t)
            else:
                self._tables.pop(key_of(t), None)

    def close(self) -> None:
        """The forward pass is over. Where a backward pass casts a parameter, that is its own doing, not autocast's."""
        self._open = False

    def _hold(self, t: torch.Tensor) -> None:
        key = key_of(t)
        if key is not None:
            self._tables[key] = StorageWeakRef(t.untyped_storage())


def _is_cast(name: str, t: torch.Tensor, result: Any) -> bool:
    return name == "aten::_to_copy" and isinstance(result, torch.Tensor) and result.dtype is not t.dtype
