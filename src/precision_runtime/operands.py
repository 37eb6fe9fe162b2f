"""Special layers tell whoever listens how they rounded the operands of a product. Costs nothing where nobody does.

Layers that round to 8 or 4 bits do so to grids that depend on scales, blocks and history. What such a rounding must
cost can only be seen where it happens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn


class Listener(Protocol):
    """Hears of every rounding: ``role`` is "input", "weight" or "gradient", ``clamped`` the elements that saturated."""

    def rounded(
        self, layer: nn.Module, role: str, before: torch.Tensor, after: torch.Tensor, clamped: torch.Tensor | None
    ) -> None:
        """``layer`` used ``after`` in place of ``before``; same shape, in any dtype."""


_listeners: list[Listener] = []  # of the process: on a GPU backward runs in a thread of its own


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Let ``listener`` hear of every rounding inside."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners[:] = [other for other in _listeners if other is not listener]


def heard() -> bool:
    """Whether anybody listens, so that it is worth working out what to tell."""
    return bool(_listeners)


def tell(
    layer: nn.Module, role: str, before: torch.Tensor, after: torch.Tensor, clamped: torch.Tensor | None = None
) -> None:
    """Tell everybody who listens."""
    for listener in _listeners:
        listener.rounded(layer, role, before, after, clamped)
