"""An optimizer steps on wider copies of its parameters: weights, gradients and state, exchanged for the time of a step.

A half state alone loses updates: with beta2 = 0.999 a bfloat16 average never decays, for 0.999 times a value rounds
to the value. So under stochastic rounding and compensation everything that an optimizer computes is float32, and only
what is stored of the weight is half.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch.optim import Optimizer

HALF: Mapping[torch.dtype, torch.dtype] = MappingProxyType(
    {torch.float16: torch.float32, torch.bfloat16: torch.float32}
)
ANY: Mapping[torch.dtype, torch.dtype] = MappingProxyType({**HALF, torch.float32: torch.float64})


class Widened:
    """Context: the parameters of ``optimizer`` that have a gradient are wider inside; ``wider`` says from which dtype
    to which. They are the same objects throughout.

    ``start`` gives the wide value of a parameter; with ``without_gradient`` those that have none yet (a closure will
    make it) are included. Afterwards ``after`` has the wide value of each, and with ``remember`` ``before`` the one
    that it started from; the parameter itself, its storage and its gradient are as they were, also where the step
    raised.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        wider: Mapping[torch.dtype, torch.dtype],
        start: Callable[[torch.Tensor, torch.dtype], torch.Tensor] = lambda p, dtype: p.detach().to(dtype),
        without_gradient: bool = False,
        remember: bool = False,
    ) -> None:
        self.parameters: list[torch.Tensor] = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.dtype in wider and (without_gradient or parameter.grad is not None):
                    self.parameters.append(parameter)
        self._now = [start(p, wider[p.dtype]) for p in self.parameters]
        self.before = [w.clone() for w in self._now] if remember else []
        self.after: list[torch.Tensor] = []

    def __enter__(self) -> Widened:
        self._stored = [p.data for p in self.parameters]
        self._gradients = [p.grad for p in self.parameters]
        for parameter, wide, gradient in zip(self.parameters, self._now, self._gradients, strict=True):
            parameter.grad = None  # a gradient of another dtype than its parameter is refused
            parameter.data = wide
            parameter.grad = None if gradient is None else gradient.to(wide.dtype)
        return self

    def __exit__(self, *error: object) -> None:
        self.after = self._now = [p.data for p in self.parameters]
        for parameter, stored, gradient in zip(self.parameters, self._stored, self._gradients, strict=True):
            parameter.grad = None
            parameter.data = stored
            parameter.grad = gradient

    def narrowly(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """``closure``, run on the stored dtype, as any forward: at the present wide values, rounded to nearest."""

        def evaluate() -> Any:
            self.__exit__()
            held = [p.detach().clone() for p in self.parameters]
            with torch.no_grad():
                for parameter, wide in zip(self.parameters, self._now, strict=True):
                    parameter.copy_(wide)
            try:
                return closure()
            finally:
                with torch.no_grad():
                    for parameter, value in zip(self.parameters, held, strict=True):
                        parameter.copy_(value)
                self.__enter__()

        return evaluate


def widen_state(optimizer: Optimizer, wider: Mapping[torch.dtype, torch.dtype]) -> None:
    """Bring state that is as narrow as its parameter to the wider dtype; counters stay."""
    for parameter, state in optimizer.state.items():
        target = wider.get(parameter.dtype)
        if target is None:
            continue
        for key, value in state.items():
            # Counters have no dimension. Adafactor's state has other shapes than its parameter.
            if torch.is_tensor(value) and value.dtype is parameter.dtype and value.dim():
                state[key] = value.to(target)


class WideLoading:
    """Keeps float32 state float32 when an optimizer loads a checkpoint: torch casts it to the parameter's dtype."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._given: Mapping[str, Any] | None = None
        optimizer.register_load_state_dict_pre_hook(self._before)
        optimizer.register_load_state_dict_post_hook(self._after)

    def _before(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        self._given = state

    def _after(self, optimizer: Optimizer) -> None:
        given, self._given = self._given, None
        if given is None:
            return
        saved = (key for group in given["param_groups"] for key in group["params"])
        present = (p for group in optimizer.param_groups for p in group["params"])
        for key, parameter in zip(saved, present, strict=True):
            for name, value in given["state"].get(key, {}).items():
                held = optimizer.state[parameter].get(name)
                if torch.is_tensor(value) and torch.is_tensor(held) and value.dtype != held.dtype:
                    optimizer.state[parameter][name] = value.to(held.device, copy=True)
