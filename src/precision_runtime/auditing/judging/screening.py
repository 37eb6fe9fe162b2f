"""An FP64 run beside the run in the mode: each result and gradient is judged as it comes, and then let go.

Most calls are never asked for more than this. One that does not pass is judged by a replay of its own, which has values
of its own. So the FP64 values of all calls together, four times those in a half mode, are nowhere at the same time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

import torch

from precision_runtime.auditing.executing.recorder import Call
from precision_runtime.auditing.executing.runs import Run
from precision_runtime.auditing.executing.snapshots import place_of
from precision_runtime.auditing.judging.replays import Yardstick
from precision_runtime.auditing.judging.screened import Screened, Site
from precision_runtime.auditing.judging.sheet import Sheet, input_name, unlike
from precision_runtime.tree import leaves


class Screening:
    """Judges the calls of an FP64 run as they come (``recorder.Exchange``); the run goes on as if nothing were.

    ``calls`` are the low-precision run's that the FP64 run makes again. Results are kept of what ``kept`` names, and of
    calls that no floating number goes into: for these the FP64 run itself is the replay (``calls.anchored``).
    """

    def __init__(self, low: Run, calls: Iterable[Call], yardstick: Yardstick, kept: Collection[Call] = ()) -> None:
        self._low, self._yardstick, self._kept = low, yardstick, {id(call) for call in kept}
        # What was judged last, by direction: where it is, its values in FP64, and what was found.
        self._last: dict[str, tuple[Any, torch.Tensor | None, Screened]] = {}
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
        known, _, seen = self._last.get(site[0], (None, None, Screened()))
        if None in places or places != known:
            seen = self._seen(site[0], low, true, u, scale)
            self._last[site[0]] = places, true, seen  # alive, so that nothing else takes its place in memory
        for judged in seen.judged.values():
            found.judged[site] = replace(judged, tensor=site[1])
        found.apart += seen.apart

    def _seen(self, where: str, low: torch.Tensor, true: torch.Tensor, u: float, scale: float) -> Screened:
        sheet, step = Sheet(), self._yardstick.step
        if where == "forward":
            sheet.add_outputs([("", low)], [("", true)], u, step)
        else:
            sheet.add_gradient("", low, true, u, step, scale)
        return sheet.screen(self._yardstick.limit)
