"""The suspicion: a run in the mode, each op of which is followed in FP64."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from precision_runtime.auditing.blaming.observer import Observer, Plan, Step
from precision_runtime.auditing.blaming.shadow import map_operands, own, relative, written
from precision_runtime.auditing.executing.noise import is_count
from precision_runtime.auditing.executing.places import is_plain, key_of, tensors_of


@dataclass
class Event:
    """What one op did to the error, relative to the size (rms) of the true result.

    ``incoming`` is the largest error among the operands, ``outgoing`` the result's, ``local`` what the op's own kernel
    and rounding added. ``sources`` are the numbers of the events that made the floating operands, None where one was
    there from the start.
    """

    step: Step
    incoming: float
    sources: tuple[int | None, ...]
    outgoing: float = 0.0
    local: float = 0.0
    born: bool = False  # finite operands, a result that is not finite where the true one is
    small: int = 0  # wrong values below the dtype's normal range
    zeros: int = 0  # those of them that became exactly zero
    flushed: float = 0.0  # share that the small ones have in the error, squared
    lost: bool = False  # whole numbers beyond the dtype's exact ones have changed
    numel: int = 0


_Row = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # a result, the true one, the right one for the actual operands


class Following(Observer):
    """Runs the code as it is and follows every op in FP64 from the same inputs; ``events`` says what each op did.

    Whole numbers and decisions are those of the actual run, so both take the same way.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: dict[int, Event] = {}  # by number
        self._makers: dict[int | None, int] = {}  # the event that wrote a storage last

    def follow(self, func: Any, plan: Plan, step: Step, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run one op, and once more on the true operands, and on the actual ones in FP64."""
        operands = [t for t in tensors_of((args, kwargs)) if t.is_floating_point() or t.is_complex()]
        targets = written(func, args, kwargs)
        if plan.garbage or plan.fixed:
            result = func(*args, **kwargs)
            self._start_anew(plan, args, [*targets, *tensors_of(result)], result)
        else:
            with torch._C._DisableTorchDispatch():
                event = Event(
                    step,
                    incoming=max((relative(t, self.wide(t)) for t in operands if t in self.shadows), default=0.0),
                    sources=tuple(dict.fromkeys(self._makers.get(key_of(t)) for t in operands)),
                )
                finite = all(bool(torch.isfinite(t).all()) for t in operands)
                copies = {id(t): own(t) for t in targets}
                alone = self.compute(func, *map_operands(lambda t: copies.get(id(t), own(t)), args, kwargs))
                shadows = {id(t): self.shadows.put(t) for t in targets}
                true = alone
                if event.incoming > 0.0 or targets:
                    operand = functools.partial(_operand, shadows, self.wide)
                    true = self.compute(func, *map_operands(operand, args, kwargs))
            result = func(*args, **kwargs)
            with torch._C._DisableTorchDispatch():
                if true is None or alone is None:
                    for t in targets:
                        self.shadows.drop(t)
                else:
                    rows = [(t, _operand(shadows, own, t), copies[id(t)]) for t in targets]
                    rows += self._made(result, true, alone, targets, {key_of(t) for t in operands})
                    for row in rows:
                        _note(event, finite, *row)
                    self.events[step.number] = event
        for t in (*targets, *tensors_of(result)):
            self._makers[key_of(t)] = step.number
        return result

    def _start_anew(self, plan: Plan, args: Sequence[Any], written: list[torch.Tensor], result: Any) -> None:
        """Draws, uninitialised memory and results of packed codes are what they are in the actual run."""
        with torch._C._DisableTorchDispatch():
            dropped = self.dropped_out(plan, args, result)
            for t in written:
                self.shadows.drop(t)
            if dropped is not None:
                self.shadows.put(result[0], dropped)

    def _made(
        self, result: Any, true: Any, alone: Any, targets: list[torch.Tensor], taken: set[int | None]
    ) -> list[_Row]:
        """The results that are new tensors, beside what they should be; they get their shadows here."""
        rows: list[_Row] = []
        for low, exact, right in zip(tensors_of(result), tensors_of(true), tensors_of(alone), strict=False):
            if any(low is t for t in targets) or not low.shape == exact.shape == right.shape:
                continue
            rows.append((low, exact, right))
            if key_of(low) not in taken:
                self.shadows.put(low, exact)
        return rows


def _note(event: Event, finite: bool, low: torch.Tensor, exact: torch.Tensor, right: torch.Tensor) -> None:
    """Add one result to an event."""
    if low.numel() == 0 or not is_plain(low):
        return
    event.numel = max(event.numel, low.numel())
    if not (low.is_floating_point() or low.is_complex()):
        return
    event.outgoing = max(event.outgoing, relative(low, exact))
    event.local = max(event.local, relative(low, right))
    if low.is_complex():
        return
    event.born |= finite and bool((~torch.isfinite(low) & torch.isfinite(exact)).any())
    error = (low.to(exact.dtype) - exact).nan_to_num(0.0, 0.0, 0.0).square()
    small = (exact.abs() < torch.finfo(low.dtype).tiny) & (error > 0)
    if bool(small.any()):
        event.small += int(small.sum())
        event.zeros += int((small & (low == 0)).sum())
        event.flushed = max(event.flushed, float(error[small].sum()) / float(error.sum()))
    event.lost |= is_count(exact) and bool((exact != low.to(exact.dtype)).any())


def _operand(
    shadows: dict[int, torch.Tensor | None], otherwise: Callable[[torch.Tensor], torch.Tensor], t: torch.Tensor
) -> torch.Tensor:
    shadow = shadows.get(id(t))
    return otherwise(t) if shadow is None else shadow
