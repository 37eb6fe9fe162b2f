"""Sees every step of an optimizer, whoever calls it, and can hold it back."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


class Gatekeeper:
    """Stands before ``optimizer.step``: a loss scaler, a scheduler or the user's own code call it as ever.

    ``open`` False: the step does not happen. ``before`` and ``after`` are called around each one that does; ``count``
    counts those.
    """

    def __init__(
        self, optimizer: Any, before: Callable[[], None] = lambda: None, after: Callable[[], None] = lambda: None
    ) -> None:
        self.open, self.count = True, 0
        inner = optimizer.step

        def step(own: Any, /, *args: Any, **kwargs: Any) -> Any:
            if not self.open:
                return None
            self.count += 1
            before()
            result = inner(*args, **kwargs)
            after()
            return result

        vars(step).update(getattr(inner, "__dict__", {}))  # schedulers mark a step that they count
        optimizer.step = MethodType(step, optimizer)  # a bound method: torch's schedulers ask for its __func__


class Stand(Optimizer):
    """Stands for an optimizer that is none of torch's, so that a loss can be scaled and a step skipped for it, too."""

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        super().__init__([p for p in model.parameters() if p.requires_grad], {})
        self.optimizer = optimizer

    def step(self, closure: Any = None) -> Any:
        """The optimizer's own step."""
        return self.optimizer.step() if closure is None else self.optimizer.step(closure)


def clear(model: nn.Module, optimizer: Any) -> None:
    """Forget the gradients, in the optimizer's own way where it has one."""
    zero = getattr(optimizer, "zero_grad", None)
    if zero is not None:
        zero()
    else:
        model.zero_grad()


def finite(tensors: list[torch.Tensor]) -> bool:
    """Whether every element is."""
    return all(bool(torch.isfinite(t).all()) for t in tensors)
