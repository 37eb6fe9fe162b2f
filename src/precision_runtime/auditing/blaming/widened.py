"""The proof: a run in the mode, with chosen ops in FP64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from precision_runtime.auditing.blaming.observer import Observer, Plan, Step
from precision_runtime.auditing.blaming.shadow import map_operands, own, written
from precision_runtime.auditing.executing.places import key_of, tensors_of


class Widening(Observer):
    """Runs the code as it is, but the ops that ``chosen`` takes in FP64, with everything that follows from them.

    What follows is what follows where a user writes ``.double()`` there: FP64 operands promote the others, and the
    tensors that they are written to, until a cast to a narrower dtype or a matrix product, which take the rounded
    values. dtypes as the code sees them stay. With ``single`` the results are rounded to FP32.
    """

    def __init__(self, chosen: Callable[[Step], bool], single: bool = False) -> None:
        super().__init__()
        self._chosen, self._single = chosen, single

    def follow(self, func: Any, plan: Plan, step: Step, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run one op, in FP64 where it is chosen or promoted."""
        chosen = self._chosen(step)
        if not chosen and not any(t in self.shadows for t in tensors_of((args, kwargs))):
            return func(*args, **kwargs)
        if plan.garbage or (not chosen and (plan.product or _narrows(plan, args, kwargs))):
            return func(*args, **kwargs)
        if plan.fixed:
            result = func(*args, **kwargs)
            with torch._C._DisableTorchDispatch():
                dropped = self.dropped_out(plan, args, result)
                for t in written(func, args, kwargs):
                    self.shadows.drop(t)
                if dropped is not None:
                    self._give(result[0], dropped)
            return result
        return self._written(func, args, kwargs) if plan.writes else self._made(func, args, kwargs)

    def _made(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        with torch._C._DisableTorchDispatch():
            wide = self.compute(func, *map_operands(self.wide, args, kwargs))
            mine = {key_of(t) for t in tensors_of((args, kwargs))}
            for low, exact in zip(tensors_of(result), tensors_of(wide), strict=False):
                if key_of(low) not in mine and low.shape == exact.shape:
                    self._give(low, exact)
        return result

    def _written(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        targets = written(func, args, kwargs)
        with torch._C._DisableTorchDispatch():
            shadows: dict[int, torch.Tensor] = {}
            for t in targets:
                shadow = self.shadows.put(t)
                shadows[id(t)] = own(t) if shadow is None else shadow
            wide = self.compute(func, *map_operands(lambda t: shadows.get(id(t), self.wide(t)), args, kwargs))
        if wide is None:
            for t in targets:
                self.shadows.drop(t)
            return func(*args, **kwargs)
        # The low op runs too: what it returns and what it does to sizes is as the code expects.
        result = func(*args, **kwargs)
        with torch._C._DisableTorchDispatch():
            for t in targets:
                if t.shape == shadows[id(t)].shape:
                    _round_into(t, shadows[id(t)].copy_(self._rounded(shadows[id(t)])))
            for low, exact in zip(tensors_of(result), tensors_of(wide), strict=False):
                if all(low is not t for t in targets) and low.shape == exact.shape:
                    self._give(low, exact)
        return result

    def _give(self, low: torch.Tensor, exact: torch.Tensor) -> None:
        """Make ``exact`` the value of a result: its shadow where it is floating, and rounded in the result itself."""
        if exact.is_floating_point() or exact.is_complex():
            exact = self._rounded(exact)
            self.shadows.put(low, exact)
        _round_into(low, exact)

    def _rounded(self, exact: torch.Tensor) -> torch.Tensor:
        if not self._single:
            return exact
        return exact.to(torch.complex64 if exact.is_complex() else torch.float32).to(exact.dtype)


def _narrows(plan: Plan, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the op is a cast to a narrower floating dtype, as user code or autocast makes it."""
    target = kwargs.get("dtype")
    if not plan.copies or target is None or not target.is_floating_point:
        return False
    return bool(target.itemsize < args[0].dtype.itemsize)


def _round_into(low: torch.Tensor, exact: torch.Tensor) -> None:
    if low.is_complex() == exact.is_complex():
        low.copy_(exact)
