"""What a module's tensors were before a mode cast them, so that the reference starts from the truth."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import torch
from torch import nn


class Originals:
    """Remembers parameters and buffers from before ``setup`` casts them.

    Call ``remember(module)`` before the cast and ``settle(module)`` right after it. A tensor that has changed since
    (training, ``load_state_dict``) has no original any more: its present value, widened, is then the truth.
    """

    def __init__(self) -> None:
        self._before: dict[tuple[int, str], torch.Tensor] = {}
        self._after: dict[tuple[int, str], torch.Tensor] = {}
        self._alive: dict[int, weakref.ref[nn.Module]] = {}

    def remember(self, module: nn.Module) -> None:
        """Keep the present values (a copy, in their own dtype). A second call does not overwrite the first."""
        for key, tensor in _tensors(module):
            if key not in self._before:
                self._before[key] = tensor.detach().clone()
        for part in module.modules():
            self._alive[id(part)] = weakref.ref(part)

    def settle(self, module: nn.Module) -> None:
        """Keep the values as they are after the cast, to tell later whether they have been trained."""
        for key, tensor in _tensors(module):
            if key in self._before and key not in self._after:
                self._after[key] = tensor.detach().clone()

    def truth(self, module: nn.Module, name: str, present: torch.Tensor) -> torch.Tensor:
        """The value that the reference must use for the tensor ``name`` that ``module`` itself holds."""
        key = (id(module), name)
        alive = self._alive.get(id(module))
        if key not in self._before or alive is None or alive() is not module:
            return present
        before, after = self._before[key], self._after.get(key)
        if before.shape != present.shape:
            return present
        if after is None:
            return before
        same = after.dtype == present.dtype and torch.equal(
            after.nan_to_num() if after.is_floating_point() else after,
            present.nan_to_num() if present.is_floating_point() else present,
        )
        return before if same else present


def _tensors(module: nn.Module) -> Iterator[tuple[tuple[int, str], torch.Tensor]]:
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    yield (id(part), name), tensor
