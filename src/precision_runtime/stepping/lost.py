"""The meter for lost updates: how many weights an optimizer meant to move, and how many stayed where they were."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch.optim import Optimizer

from precision_runtime.errors import ConfigurationError
from precision_runtime.stepping.updates import Updates
from precision_runtime.stepping.widening import ANY, Widened, widen_state


@dataclass
class Share:
    """Counted over elements and steps. ``meant``: the update was not zero; ``small``: below half a unit in the last
    place of the weight, so that rounding to nearest loses it; ``lost``: it left no trace, neither in the weight nor in
    what is kept beside it (under stochastic rounding: nor in the weight's expectation).
    """

    meant: int = 0
    small: int = 0
    lost: int = 0

    @property
    def share(self) -> float:
        """Lost of those meant; 0 where none was."""
        return self.lost / self.meant if self.meant else 0.0

    def add(self, other: Share) -> None:
        """Add the counts of ``other``."""
        self.meant += other.meant
        self.small += other.small
        self.lost += other.lost


class LostUpdates:
    """Context in which each step of a runtime is measured: ``with runtime.lost_updates() as lost``.

    The update that counts is the one that the optimizer computes in the next wider format (float32 for half weights,
    float64 for float32) from the same weights, gradients and state. Where the optimizer does not work like that
    anyhow, each step inside is computed twice and holds a wide copy of weights, gradients and state: measure one step
    in a hundred.
    """

    def __init__(
        self, names: Callable[[Iterable[torch.Tensor]], tuple[str, ...]], switch: Callable[[LostUpdates | None], None]
    ) -> None:
        self._names, self._switch = names, switch
        self.steps = 0
        self._shares: dict[str, Share] = {}

    def __enter__(self) -> LostUpdates:
        self._switch(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._switch(None)

    @property
    def total(self) -> Share:
        """Over all parameters."""
        total = Share()
        for share in self._shares.values():
            total.add(share)
        return total

    @property
    def share(self) -> float:
        """Share of the updates meant that were lost, over all parameters: 0 … 1."""
        return self.total.share

    @property
    def by_parameter(self) -> dict[str, Share]:
        """The same for each parameter, by its path; the worst first."""
        return dict(sorted(self._shares.items(), key=lambda item: -item[1].share))

    def to_dict(self) -> dict[str, Any]:
        """Builtins only."""
        rows = {n: {"meant": s.meant, "small": s.small, "lost": s.lost} for n, s in self.by_parameter.items()}
        return {"steps": self.steps, "share": self.share, "parameters": rows}

    def __str__(self) -> str:
        total = self.total
        lines = [
            f"{total.share:.1%} of {total.meant} updates lost in {self.steps} steps; "
            f"{total.small / max(total.meant, 1):.1%} were below half a unit in the last place of their weight"
        ]
        lines += [f"  {share.share:7.1%}  {name}" for name, share in self.by_parameter.items()]
        return "\n".join(lines)

    def step(self, updates: Updates, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Step ``optimizer`` as ``updates`` do, and count."""
        if args:
            raise ConfigurationError("lost updates cannot be counted where the optimizer steps with a closure")
        if updates.wide:
            updates.step(optimizer, args, kwargs, self.record)
        else:
            parameters, before, wanted = probe(optimizer, kwargs)
            stored = [p.detach().clone() for p in parameters]
            updates.step(optimizer, args, kwargs)
            for parameter, old, start, end in zip(parameters, stored, before, wanted, strict=True):
                self.record(parameter, start, end, parameter.detach().to(start.dtype), old)
        self.steps += 1

    @torch.no_grad()
    def record(
        self,
        parameter: torch.Tensor,
        before: torch.Tensor,
        after: torch.Tensor,
        kept: torch.Tensor,
        stored: torch.Tensor | None = None,
    ) -> None:
        """Count one parameter: its wide value before and after the update, and what is kept of it.

        ``stored`` is the weight before the step; without it, it is ``before``, rounded.
        """
        dtype = parameter.dtype
        grid = before.to(dtype) if stored is None else stored
        update = after - before
        meant = update != 0
        small = meant & ((grid.to(before.dtype) + update).to(dtype) == grid)
        lost = meant & (kept == before)
        (name,) = self._names([parameter])
        counts = torch.stack([meant.sum(), small.sum(), lost.sum()]).tolist()
        self._shares.setdefault(name, Share()).add(Share(*counts))


def probe(
    optimizer: Optimizer, kwargs: dict[str, Any]
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """What ``optimizer`` would do to its parameters in the wider format: they, and their values before and after.

    Nothing changes: the step runs on wide copies of weights, gradients and state.
    """
    state = dict(optimizer.state.items())
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    try:
        optimizer.state.clear()
        optimizer.state.update({parameter: copy.deepcopy(values) for parameter, values in state.items()})
        for group, values in zip(optimizer.param_groups, settings, strict=True):
            group.update(copy.deepcopy(values))
        widen_state(optimizer, ANY)
        widened = Widened(optimizer, ANY, remember=True)
        with widened:
            optimizer.step(**kwargs)
    finally:
        optimizer.state.clear()
        optimizer.state.update(state)
        for group, values in zip(optimizer.param_groups, settings, strict=True):
            group.update(values)
    return widened.parameters, widened.before, widened.after
