"""An FP64 run beside the run in the mode: each result and gradient is judged as it comes, and then let go.

Most calls are never asked for more than this. One that does not pass is judged by a replay of its own, which has values
of its own. So the FP64 values of all calls together, four times those in a half mode, are nowhere at the same time.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

import torch

from precision_runtime.auditing.excess import Judgement
from precision_runtime.auditing.recorder import Call
from precision_runtime.auditing.replays import Yardstick
from precision_runtime.auditing.runs import Run
from precision_runtime.auditing.sheet import Screened, Sheet, Site, input_name, unlike
from precision_runtime.auditing.snapshots import place_of
from precision_runtime.tree import leaves

# A glance takes in stretches of this many elements, one out of as many as this.
STRETCH, EVERY = 256, 4096
GLANCE_MARGIN = 1.25


class Screening:
    """Judges the calls of an FP64 run as they come (``recorder.Exchange``); the run goes on as if nothing were.

    ``calls`` are the low-precision run's that the FP64 run makes again. Results are kept of what ``kept`` names, and of
    calls that no floating number goes into: for these the FP64 run itself is the replay (``calls.anchored``).
    """

    def __init__(self, low: Run, calls: Iterable[Call], yardstick: Yardstick, kept: Collection[Call] = ()) -> None:
        self._low, self._yardstick, self._kept = low, yardstick, {id(call) for call in kept}
        # What was judged last, by direction: where it is, its values in FP64, and what was found.
        self._last: dict[str, tuple[Any, torch.Tensor, Judgement | str | None]] = {}
        self._twins: dict[tuple[str, int], Call] = {}
        counts: dict[str, int] = {}
        for call in calls:
            counts[call.name] = index = counts.get(call.name, -1) + 1
            self._twins[call.name, index] = call

    def keeps(self, call: Call) -> bool:
        """Whether the call's results are needed later."""
        low = self._twins.get((call.name, call.index))
        return low is not None and (call.anchors is not None or id(low) in self._kept)

    def values(self, call: Call, output: Any) -> Any:
        """Judge what the call gave, and go on with it."""
        low = self._twins.get((call.name, call.index))
        if low is None or self.keeps(call):
            return output
        call.screened = Screened()
        true, u = dict(leaves(output)), self._yardstick.own_u(low, "forward")
        for path, theirs in low.outputs:
            if path in true:
                self._judge(call.screened, ("forward", f"output{path}"), theirs, true[path].detach(), u, 1.0)
        call.screened.apart += unlike(len(low.outputs), len(true))
        return output

    def arrive(self, call: Call, path: str, grad: torch.Tensor, inside: bool) -> torch.Tensor | None:
        """Judge the gradient that arrives at an input, and go on with it."""
        low = self._twins.get((call.name, call.index))
        if not inside or call.screened is None or low is None or self._low.second_order or low.name in self._low.leaky:
            return None
        theirs = low.input_grads.get(path)
        if theirs is not None:
            u = self._yardstick.own_u(low, "backward")
            with torch._C._DisableTorchDispatch():
                site = "backward", f"grad of {input_name(path)}"
                self._judge(call.screened, site, theirs, grad.detach(), u, self._low.scale)
        return None

    def _judge(
        self, found: Screened, site: Site, low: torch.Tensor, true: torch.Tensor, u: float, scale: float
    ) -> None:
        """Judge one tensor, unless it is the last one again: modules hand on what their last part returned."""
        places = (place_of(low), place_of(true), u)
        known, _, judged = self._last.get(site[0], (None, None, None))
        if None in places or places != known:
            judged = self._judged(site, low, true, u, scale)
            self._last[site[0]] = places, true, judged  # alive, so that nothing else takes its place in memory
        if isinstance(judged, Judgement):
            found.judged[site] = replace(judged, tensor=site[1])
        elif judged is not None:
            found.apart.append(f"{site[1]} {judged}")

    def _judged(
        self, site: Site, low: torch.Tensor, true: torch.Tensor, u: float, scale: float
    ) -> Judgement | str | None:
        limit, step = self._yardstick.limit, self._yardstick.step
        # Most do not pass deep in a network: what is off was handed on to them. Only a replay, or the run of borders,
        # says more of these.
        off = _at_a_glance(low, true, u, step / scale, scale)
        if off > GLANCE_MARGIN * limit:
            return Judgement(site[1], off, bound=True)
        sheet = Sheet()
        if site[0] == "forward":
            sheet.add_outputs([("", low)], [("", true)], u, step)
        else:
            sheet.add_gradient("", low, true, u, step, scale)
        for judged in sheet.screen(limit).values():
            return judged
        for sentence in sheet.apart:
            return sentence.removeprefix("output ")
        return None


def _at_a_glance(low: torch.Tensor, true: torch.Tensor, u: float, step: float, scale: float) -> float:
    """About how many times one rounding a large tensor is off, by some of its elements; 0 where that is not to be said.

    ``low`` is ``scale`` times as large as it should be; ``step`` is in units of ``true``.
    """
    count = true.numel() // EVERY
    if count < EVERY // STRETCH or true.dtype is not torch.float64 or not low.is_floating_point():
        return 0.0
    if any(t.layout is not torch.strided or t.is_nested for t in (low, true)):
        return 0.0
    if low.shape != true.shape or low.device != true.device or not (low.is_contiguous() and true.is_contiguous()):
        return 0.0
    theirs, ours = (t.view(-1)[: count * EVERY].view(count, EVERY)[:, :STRETCH] for t in (low, true))
    error = float(torch.linalg.vector_norm(theirs.to(torch.float64) / scale - ours))
    one = math.hypot(u / math.sqrt(3.0) * float(torch.linalg.vector_norm(ours)), step * math.sqrt(ours.numel()))
    return error / one if one > 0.0 and math.isfinite(error) else 0.0
