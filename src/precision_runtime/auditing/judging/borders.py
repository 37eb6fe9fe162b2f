"""Every stretch of a backward pass by itself, in one FP64 run: what comes in at a border is what came in there.

At each border of a module call (its inputs, its outputs) this run goes on with the values and the gradients that the
low-precision run had there. So nothing is inherited: the gradient that arrives at the next border shows what the
stretch between the two did, be it a module's own code or the code between its parts. A call in which no stretch is off
by more than the limit is explained: its own error is what sound stretches add up to, and nobody need replay it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from precision_runtime.auditing.executing.recorder import Call
from precision_runtime.auditing.executing.runs import Run
from precision_runtime.auditing.executing.snapshots import place_of
from precision_runtime.auditing.executing.worlds import widen
from precision_runtime.auditing.judging.replays import Yardstick
from precision_runtime.auditing.judging.sheet import Sheet
from precision_runtime.tree import leaves, map_tensors


class Borders:
    """Judges gradients as they arrive at the borders of a run's calls, and says what to go on with instead.

    Scores are upper bounds, in units of the excess: no perturbed run is made. Gradients are judged at once and not
    kept.
    """

    def __init__(self, low: Run, yardstick: Yardstick) -> None:
        self._low, self._yardstick = low, yardstick
        self._calls = {(c.name, c.index): c for c in low.calls}
        self._own: dict[tuple[int, str], float] = {}  # scores at inputs, by id of the low run's call and path
        self._behind: dict[tuple[int, str], float] = {}  # and at outputs
        self._parameters: dict[int, float] = {}
        self._verdicts: dict[int, tuple[bool, bool]] = {}
        # What stood last in the place of what, by direction: modules hand on what their last part returned.
        self._put: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    # -- during the run ---------------------------------------------------------------------------------------------

    def keeps(self, call: Call) -> bool:
        """Nothing is kept."""
        return False

    def values(self, call: Call, output: object) -> object:
        """The call's output with the low-precision run's values in it, which gradients pass as if nothing were."""
        low = self._calls.get((call.name, call.index))
        if low is None:
            return output
        theirs = dict(low.outputs)
        paths = {id(t): path for path, t in leaves(output)}

        def put(t: torch.Tensor) -> torch.Tensor:
            value = theirs.get(paths.get(id(t), ""))
            if value is None or value.shape != t.shape or not _plain(t) or not _plain(value):
                return t
            if self._stands("forward", value, t):
                return t
            step = widen(value) - t.detach()
            if not math.isfinite(float(step.sum())):  # a mask's infinities stay
                return t
            return self._noted("forward", value, t + step)

        return map_tensors(put, output, objects=False)

    def arrive(self, call: Call, path: str, grad: torch.Tensor, inside: bool) -> torch.Tensor | None:
        """Judge what arrives at an input (``inside`` the call) or an output; return what to go on with, if anything."""
        low = self._calls.get((call.name, call.index))
        if low is None:
            return None
        theirs = (low.input_grads if inside else low.output_grads).get(path)
        if theirs is None or theirs.shape != grad.shape:
            return None
        with torch._C._DisableTorchDispatch():
            scores = self._own if inside else self._behind
            if self._stands("backward", theirs, grad):
                scores[id(low), path] = 0.0
                return None
            scores[id(low), path] = self._score(low, path, theirs, grad)
            return self._noted("backward", theirs, widen(theirs) / self._low.scale)

    def _noted(self, where: str, low: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
        self._put[where] = low, now.detach()
        return now

    def _stands(self, where: str, low: torch.Tensor, now: torch.Tensor) -> bool:
        """Whether this is what was put there for these values of the low-precision run the last time."""
        before = self._put.get(where)
        pairs = [] if before is None else [(before[0], low), (before[1], now.detach())]
        return bool(pairs) and all(place_of(a) == place_of(b) is not None for a, b in pairs)

    # -- after it ---------------------------------------------------------------------------------------------------

    def settle(self, run: Run, owned: Mapping[int, Mapping[int, str]]) -> None:
        """Judge the gradients of parameters that one call alone uses (``owned``: by ids of call and parameter)."""
        for call in self._low.calls:
            for key, name in owned.get(id(call), {}).items() if call.output_grads else ():
                low, true = self._low.parameter_grads.get(key), run.parameter_grads.get(key)
                if low is not None and true is not None:
                    score = self._score(call, name, low, true)
                    self._parameters[id(call)] = max(self._parameters.get(id(call), 0.0), score)

    def explains(self, call: Call) -> bool:
        """Whether every stretch inside the call is sound."""
        return self._verdict(call)[0]

    def _verdict(self, call: Call) -> tuple[bool, bool]:
        """Whether all inside the call is sound, and whether the stretch behind it is, too."""
        if id(call) not in self._verdicts:
            inside = (
                call.end >= 0
                and call.name not in self._low.leaky
                and self._parameters.get(id(call), 0.0) <= self._yardstick.limit
                and self._sound(self._own, call, call.input_grads)
                and all(all(self._verdict(c)) for c in call.children)
            )
            behind = self._sound(self._behind, call, call.output_grads)
            self._verdicts[id(call)] = (inside, behind)
        return self._verdicts[id(call)]

    def _sound(self, scores: Mapping[tuple[int, str], float], call: Call, paths: Iterable[str]) -> bool:
        return all(scores.get((id(call), path), math.inf) <= self._yardstick.limit for path in paths)

    def _score(self, call: Call, name: str, low: torch.Tensor, true: torch.Tensor) -> float:
        sheet, yardstick = Sheet(), self._yardstick
        u = yardstick.own_u(call, "backward")
        sheet.add_gradient(name, low, true, u, yardstick.step, self._low.scale)
        if sheet.apart:
            return math.inf
        return max((j.score for j in sheet.screen(yardstick.limit).judged.values()), default=0.0)


def _plain(t: torch.Tensor) -> bool:
    return (t.is_floating_point() or t.is_complex()) and t.layout is torch.strided and not t.is_nested
