"""One replica of a judged run (``replicas.py``): the same on inputs and parameters a little smaller."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from precision_runtime.auditing.executing.noise import Exact, Noise, is_count
from precision_runtime.auditing.executing.recorder import Call
from precision_runtime.auditing.executing.worlds import Worlds, widen
from precision_runtime.auditing.judging.judge import Judge
from precision_runtime.auditing.judging.sheet import Sheet
from precision_runtime.tree import map_tensors

# A running total rounds as it did as long as it moves by less than its own last place, which is much more than what a
# term is moved by. So each tensor as a whole is moved by up to a sixteenth, 16 times the unit roundoff of bfloat16, and
# towards zero: what must be a probability or a cosine stays one.
SHRINK = 1.0 / 16.0


@dataclass
class Again:
    """A run in the mode that a judge of its own could judge, in a world of its own."""

    judge: Judge
    whole: Sheet
    worlds: Worlds
    true: dict[int, torch.Tensor]  # moved parameters, by id
    low: dict[int, torch.Tensor]  # the same as the mode stores them

    def few(self, call: Call | None) -> Sheet | None:
        """See ``replicas.Replica``."""
        if call is None:
            return self.whole
        own = next((c for c in self.judge.low.calls if (c.name, c.index) == (call.name, call.index)), None)
        if own is None or own.end < 0:
            return None
        with self.standing():
            replay = self.judge.replays.true(own)
        return None if replay is None else self.judge.sheet(own, replay.calls[0], replay)

    def standing(self) -> AbstractContextManager[None]:
        """The worlds with the moved parameters in them."""
        return self.worlds.standing(self.true, self.low)


def moved_inputs(value: Any, noise: Noise, exact: Exact) -> Any:
    """Inputs as a user might have given them, a little smaller: same dtypes; a tensor given twice stays one."""
    done: dict[int, torch.Tensor] = {}

    def move(t: torch.Tensor) -> torch.Tensor:
        if id(t) not in done:
            true = widen(t) if t.is_floating_point() or t.is_complex() else t
            fixed = true is t or is_count(true) or exact.holds(true)
            done[id(t)] = t if fixed else noise.shrunk(true, SHRINK).to(t.dtype)
        return done[id(t)]

    return map_tensors(move, value)


def moved_parameters(
    worlds: Worlds, noise: Noise, dtype: torch.dtype
) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
    """True parameters moved as inputs are, and the same as the mode stores them.

    Left as they are: what ``dtype`` holds exactly, and weights that a layer stores as codes.
    """
    true, low = {}, {}
    for key, value in worlds.true_parameters.items():
        stored = worlds.low_parameters.get(key)
        if stored is None or stored.shape != value.shape or not stored.is_floating_point() or key in worlds.unquantized:
            continue
        if value.is_floating_point() and not torch.equal(value.to(dtype).to(value.dtype), value):
            true[key] = noise.shrunk(value, SHRINK)
            low[key] = true[key].to(stored.dtype)
    return true, low
