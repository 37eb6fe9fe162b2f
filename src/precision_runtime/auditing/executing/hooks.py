"""Listening to gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch


def on_gradient(t: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Have ``function`` see, or replace, each gradient that arrives at ``t``; a backward pass may give none at all."""

    def hook(grad: torch.Tensor | None) -> torch.Tensor | None:
        return None if grad is None else function(grad)

    t.register_hook(hook)
