"""Which dtype each tensor of a model would have in a mode, worked out without changing anything.

The rules are those of ``setup``, in its order: swapped weights are stored as the mode says, islands stay wide, parts
that a model declares to need float32 and Apex's batch norms are float32, and the mode's table has the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from precision_runtime.casting import FLOATING, TO, kept_in_float32
from precision_runtime.layers import QuantizedLayer
from precision_runtime.setup.islands import island_around
from precision_runtime.setup.keeping import COMPLEX, Island, wider
from precision_runtime.setup.swapping import Swap
from precision_runtime.strategies import Strategy

_REAL = {pair: real for real, pair in COMPLEX.items()}


@dataclass(frozen=True)
class Place:
    """A tensor that a model holds, with all its paths and the modules that hold it there, in the order of modules."""

    names: tuple[str, ...]
    kind: Literal["parameter", "buffer"]
    owners: tuple[nn.Module, ...]
    tensor: torch.Tensor

    @property
    def owner(self) -> nn.Module:
        """The first module."""
        return self.owners[0]

    @property
    def name(self) -> str:
        """The first path."""
        return self.names[0]


def places(root: nn.Module) -> list[Place]:
    """The distinct parameters and buffers of ``root``."""
    found: dict[int, tuple[list[str], Literal["parameter", "buffer"], list[nn.Module], torch.Tensor]] = {}
    for path, owner in root.named_modules(remove_duplicate=False):
        kinds: tuple[tuple[Literal["parameter", "buffer"], dict[str, torch.Tensor | None]], ...] = (
            ("parameter", owner._parameters),
            ("buffer", owner._buffers),
        )
        for kind, tensors in kinds:
            for name, tensor in tensors.items():
                if tensor is not None:
                    entry = found.setdefault(id(tensor), ([], kind, [], tensor))
                    entry[0].append(f"{path}.{name}" if path else name)
                    entry[2].append(owner)
    return [Place(tuple(names), kind, tuple(owners), tensor) for names, kind, owners, tensor in found.values()]


class Targets:
    """Asks for one tensor after the other: ``targets(place)`` is a dtype, or the name of a storage format ("nf4").

    ``islands`` and ``swaps`` are those of the same model under the same strategy.
    """

    def __init__(self, root: nn.Module, strategy: Strategy, islands: Sequence[Island], swaps: Iterable[Swap]) -> None:
        self.strategy, self.islands = strategy, islands
        table = strategy.module_table
        self._kept = kept_in_float32(root, set(table.values())) if table else {}
        mode = strategy.mode
        codes = mode.weights if mode.weights not in ("", "int8-training") else ""
        self._codes = {id(row.layer._parameters["weight"]): codes for row in swaps if row.swapped and codes}
        self._norms = {
            id(t)
            for part in root.modules() if mode.masters and isinstance(part, _BatchNorm)
            for t in (*part._parameters.values(), *part._buffers.values())
        }  # fmt: skip

    def __call__(self, place: Place) -> torch.dtype | str:
        """What the tensor becomes."""
        tensor = place.tensor
        if id(tensor) in self._codes:
            return self._codes[id(tensor)]
        if isinstance(place.owner, QuantizedLayer) and not tensor.is_floating_point():
            return place.owner.storage if tensor is place.owner._parameters.get("weight") else tensor.dtype
        return self.cast(tensor.dtype, id(tensor), place.name)

    def cast(self, dtype: torch.dtype, key: int, path: str) -> torch.dtype:
        """What a tensor of ``dtype`` with this id becomes at ``path``, where it is no swapped weight."""
        if key in self._norms and dtype in FLOATING:
            return torch.float32
        table = TO[torch.float32] if key in self._kept else self.strategy.module_table
        island = island_around(path, self.islands)
        least = None if island is None else getattr(torch, island.dtype)
        if dtype in _REAL and least is not None:
            return COMPLEX[wider(least, wider(torch.float32, table.get(_REAL[dtype], _REAL[dtype])))]
        after = table.get(dtype, dtype)
        return after if least is None or after not in FLOATING else wider(least, after)
