"""Shares of underflow and saturation, counted while somebody watches; nothing is counted otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from precision_runtime.formats import Format


@dataclass(frozen=True)
class Share:
    """What rounding did to one tensor of a layer, over all calls: counts of elements.

    ``underflow``: not zero before, zero after. ``saturation``: beyond the largest value of the format, so clamped.
    """

    elements: int = 0
    underflow: int = 0
    saturation: int = 0

    @property
    def underflow_share(self) -> float:
        """Underflow as a share of all elements, 0 to 1."""
        return self.underflow / max(self.elements, 1)

    @property
    def saturation_share(self) -> float:
        """Saturation as a share of all elements, 0 to 1."""
        return self.saturation / max(self.elements, 1)

    def __add__(self, other: Share) -> Share:
        return Share(
            self.elements + other.elements, self.underflow + other.underflow, self.saturation + other.saturation
        )


class Shares:
    """The shares of each layer's input, weight and gradient, as counted so far."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[nn.Module, dict[str, Share]]] = {}

    def of(self, layer: nn.Module) -> dict[str, Share]:
        """``{"input": …, "weight": …, "gradient": …}`` of one layer: what it has rounded, empty where nothing."""
        return dict(self._of[id(layer)][1]) if id(layer) in self._of else {}

    def by_name(self, model: nn.Module) -> dict[str, dict[str, Share]]:
        """The shares of every layer inside ``model`` that has rounded something, by its path."""
        return {name: self.of(layer) for name, layer in model.named_modules() if id(layer) in self._of}

    def add(self, layer: nn.Module, tensor: str, share: Share) -> None:
        """Count one more rounding."""
        _, found = self._of.setdefault(id(layer), (layer, {}))
        found[tensor] = found.get(tensor, Share()) + share


# For the whole process, not the thread: on a GPU backward runs in a thread of its own.
_watchers: list[Shares] = []


@contextmanager
def watching() -> Iterator[Shares]:
    """Every emulated FP8 layer counts inside; then ``shares.by_name(model)``. What they compute stays the same."""
    shares = Shares()
    _watchers.append(shares)
    try:
        yield shares
    finally:
        _watchers[:] = [w for w in _watchers if w is not shares]


def watched() -> bool:
    """Whether somebody watches."""
    return bool(_watchers)


def count(layer: nn.Module, tensor: str, scaled: torch.Tensor, codes: torch.Tensor, form: Format) -> None:
    """Report one rounding of ``scaled`` to ``codes`` (both without scale) to whoever watches."""
    vanished = int(((scaled != 0) & (codes == 0)).sum())
    clamped = int((scaled.abs() > form.max).sum())
    for watcher in _watchers:
        watcher.add(layer, tensor, Share(scaled.numel(), vanished, clamped))
