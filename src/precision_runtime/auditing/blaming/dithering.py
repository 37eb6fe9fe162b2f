"""The code in the mode once more, on the very same operands, with each op's result rounded up or down by chance.

The errors of one run in the mode are what they are: 800 roundings of a running total may cancel by luck. Rounded by
chance they are drawn anew, and the rms over some runs says how large the error has to be expected (Parker, "Monte Carlo
arithmetic", 1997; Vignes, "A stochastic arithmetic for reliable scientific computation", 1993).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from precision_runtime.auditing.blaming.observer import Observer, Plan, Step
from precision_runtime.auditing.blaming.shadow import map_operands, own, written
from precision_runtime.auditing.executing.places import tensors_of
from precision_runtime.casting import HALF
from precision_runtime.stepping.rounding import mixed, round_stochastically, words_like


class Dithering(Observer):
    """Computes each op in FP64 on its actual operands and rounds its half-precision results by chance.

    What is exact stays exact: copies, products with powers of two, sums that fit. Random draws are left alone, and so
    are ops without an FP64 kernel and results that are not finite.
    """

    def __init__(self, seed: int, number: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(mixed(seed, number))

    def follow(self, func: Any, plan: Plan, step: Step, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run one op, and draw the rounding of its results."""
        if plan.fixed or plan.garbage or plan.foreign:
            return func(*args, **kwargs)
        return self._written(func, args, kwargs) if plan.writes else self._made(func, args, kwargs)

    def _made(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        made = tensors_of(result)
        if not any(t.dtype in HALF for t in made):
            return result
        with torch._C._DisableTorchDispatch():
            given = {id(t) for t in tensors_of((args, kwargs))}
            exact = tensors_of(self.compute(func, *map_operands(own, args, kwargs)))
            for low, wide in zip(made, exact, strict=False):
                if id(low) not in given:
                    self._draw(low, wide)
        return result

    def _written(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        targets = [t for t in written(func, args, kwargs) if t.dtype in HALF]
        if not targets:
            return func(*args, **kwargs)
        with torch._C._DisableTorchDispatch():
            copies = {id(t): own(t) for t in targets}
            exact = self.compute(func, *map_operands(lambda t: copies.get(id(t), own(t)), args, kwargs))
        result = func(*args, **kwargs)
        if exact is not None:
            with torch._C._DisableTorchDispatch():
                for t in targets:
                    self._draw(t, copies[id(t)])
        return result

    def _draw(self, low: torch.Tensor, exact: torch.Tensor) -> None:
        if low.dtype not in HALF or low.shape != exact.shape or not exact.is_floating_point():
            return
        single = exact.to(torch.float32)
        drawn = round_stochastically(single, low.dtype, words_like(single.cpu(), self._generator).to(single.device))
        low.copy_(torch.where(torch.isfinite(low) & torch.isfinite(drawn), drawn, low))
