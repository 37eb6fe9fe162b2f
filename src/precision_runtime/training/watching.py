"""A look at what happens when values are stored: which part of each update rounding took away, and where it went.

Only where a verdict is open: every update is made once more in FP64, on copies of the optimizer and its hidden state,
and every forward pass that writes a buffer or an average once more on a copy of the model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from precision_runtime.auditing.executing.dispatch import TrueDouble, plain_double
from precision_runtime.auditing.executing.masking import Masking
from precision_runtime.auditing.executing.randomness import RandomState, reseed
from precision_runtime.auditing.executing.worlds import widen_tree
from precision_runtime.casting import HALF
from precision_runtime.formats import FORMATS
from precision_runtime.stepping.updates import Updates, WideUpdates
from precision_runtime.training.course import Observer, held, hidden
from precision_runtime.training.lesson import Lesson
from precision_runtime.training.sheet import MOST, roundoff
from precision_runtime.tree import leaves

_ROUNDED = (*HALF, torch.float32)


@dataclass(eq=False)
class Stored:
    """What became of the new values of one tensor, element by element, over all steps.

    ``total`` and ``squares`` sum the rounding errors and their squares; ``lost`` sums the movements that left the value
    where it was, ``meant`` all movements; ``gone`` and ``wanted`` count both.
    """

    total: torch.Tensor
    squares: torch.Tensor
    lost: torch.Tensor
    meant: torch.Tensor
    gone: int = 0
    wanted: int = 0
    steps: int = 0
    half: bool = True  # wider storage has its own grant (``sheet``)
    mastered: bool = False  # a wider tensor of the same values is kept somewhere: what rounding takes is not lost
    unbiased: bool = False  # rounding loses nothing in expectation

    @classmethod
    def like(cls, t: torch.Tensor) -> Stored:
        """Nothing yet."""
        total, squares, lost, meant = (torch.zeros(t.shape, dtype=torch.float64, device=t.device) for _ in range(4))
        return cls(total, squares, lost, meant, half=t.dtype in HALF)

    @property
    def walk(self) -> float:
        """What the rounding errors come to where their signs are chance. Nothing is granted where most was lost."""
        return math.sqrt(float(self.squares.mean())) if self.walks else 0.0

    @property
    def walks(self) -> bool:
        """Whether rounding errors stay in the value, and are not the loss of what was meant."""
        return self.half and not self.mastered and self.share <= MOST and self.squares.numel() > 0

    @property
    def deviation(self) -> torch.Tensor:
        """The rounding errors' root mean square in one step, element by element."""
        return (self.squares / max(1, self.steps)).sqrt()

    @property
    def share(self) -> float:
        """The share of the movement meant that left no trace (L2 norms of the sums over the steps).

        Where the other roundings make up for it, as stochastic rounding's do, it has not been lost.
        """
        meant = 0.0 if self.unbiased else float(torch.linalg.vector_norm(self.meant))
        lost = min(float(torch.linalg.vector_norm(t)) for t in (self.lost, self.total))
        return lost / meant if meant else 0.0

    def add(self, before: torch.Tensor, after: torch.Tensor, wanted: torch.Tensor) -> None:
        """Count one step: the stored value before and after, and the FP64 value that it should have got."""
        start = before.to(torch.float64)
        movement = wanted - start
        ulp = spacing(before)
        error = (after.to(torch.float64) - wanted).nan_to_num(0.0, 0.0, 0.0)
        error = torch.minimum(torch.maximum(error, -ulp), ulp)  # more is no rounding
        still = (after == before) & (movement != 0)
        self.total += error
        self.squares += error * error
        self.meant += movement
        self.lost += torch.where(still, movement, torch.zeros_like(movement))
        self.steps += 1
        self.gone += int(still.sum())
        self.wanted += int((movement != 0).sum())


def spacing(t: torch.Tensor) -> torch.Tensor:
    """The gap between each value and the next larger one that its dtype has, in float64."""
    form = FORMATS[str(t.dtype).removeprefix("torch.")]
    _, exponent = torch.frexp(t.detach().to(torch.float64))
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent - form.precision).clamp_min(
        form.smallest_subnormal
    )


class Watch(Observer):
    """Watches a training in the mode; ``stored`` has the result by path, ``losses`` the FP64 losses of the very same
    weights (with ``forward`` only). What cannot be copied is not watched.
    """

    def __init__(self, lesson: Lesson, model: nn.Module, optimizer: Any, masking: Masking, forward: bool) -> None:
        self._lesson, self._model, self._optimizer = lesson, model, optimizer
        self._masking, self._forward = masking, forward
        self.stored: dict[str, Stored] = {}
        self.losses: list[torch.Tensor] = []
        self._wanted: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._shadow: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    # -- losses and buffers -----------------------------------------------------------------------------------------

    def before_loss(self, model: nn.Module, batch: Any, seed: int) -> None:
        """Run the loss once more in FP64, on a copy, and note it, and what it writes into buffers."""
        self._shadow = {}
        if not self._forward:
            return
        now = {name: t for name, t in _rounded(model) if not t.requires_grad}  # averages of weights, too
        random = RandomState.capture()
        with suppress(Exception):
            twin = copy.deepcopy(model)
            widen([t for _, t in held(twin)])
            self._run(twin, batch, seed)
            after = dict(held(twin))
            self._shadow = {name: (t.detach().clone(), after[name].detach()) for name, t in now.items()}
        random.restore()

    def _run(self, twin: nn.Module, batch: Any, seed: int) -> None:
        with plain_double(), TrueDouble(masking=self._masking):
            reseed(seed)
            self.losses.append(self._lesson.loss_fn(twin, widen_tree(batch)).detach().reshape(()))

    def after_loss(self, model: nn.Module) -> None:
        """Compare."""
        now = dict(held(model))
        for name, (before, wanted) in self._shadow.items():
            self._add(name, before, now[name].detach(), wanted)
            self.stored[name].mastered = _is_mastered(now[name], (t for _, t in leaves(_plain(model))))

    # -- parameters -------------------------------------------------------------------------------------------------

    def before_update(self) -> None:
        """Step a copy of the optimizer in FP64 on copies of the parameters."""
        self._wanted = {}
        low = {name: p for name, p in self._model.named_parameters() if p.dtype in _ROUNDED and p.grad is not None}
        if not low:
            return
        with suppress(Exception):
            twins = self._step_twin(low)
            self._wanted = {name: (p.detach().clone(), twins[name]) for name, p in low.items()}

    def _step_twin(self, low: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        memo: dict[int, Any] = {}
        twins = {}
        for name, p in self._model.named_parameters():
            twin = nn.Parameter(p.detach().to(torch.float64), p.requires_grad)
            twin.grad = None if p.grad is None else p.grad.detach().to(torch.float64)
            memo[id(p)] = twin
            twins[name] = twin
        ours = {id(t) for t in twins.values()}
        optimizer = object.__new__(type(self._optimizer))
        attributes = {k: v for k, v in vars(self._optimizer).items() if k != "step"}  # ours stands there
        vars(optimizer).update(copy.deepcopy(attributes, memo))
        widen([t for t in memo.values() if isinstance(t, torch.Tensor) and id(t) not in ours])
        with plain_double(), TrueDouble(masking=self._masking):
            optimizer.step()
        return {name: twins[name].detach() for name in low}

    def after_update(self) -> None:
        """Compare."""
        now = dict(self._model.named_parameters())
        for name, (before, wanted) in self._wanted.items():
            self._add(name, before, now[name].detach(), wanted)
            others = (t for _, t in hidden(self._optimizer, self._model) if t is not now[name])
            self.stored[name].mastered = _is_mastered(now[name], others)

    def _add(self, name: str, before: torch.Tensor, after: torch.Tensor, wanted: torch.Tensor) -> None:
        if before.shape != after.shape or before.shape != wanted.shape:
            return
        self.stored.setdefault(name, Stored.like(before)).add(before, after, wanted)


class WideWatch(Watch):
    """Watches where the optimizer steps on wider copies (``updates``): what is kept of them shows after the step."""

    def __init__(
        self, lesson: Lesson, model: nn.Module, optimizer: Any, masking: Masking, forward: bool, updates: WideUpdates
    ) -> None:
        super().__init__(lesson, model, optimizer, masking, forward)
        self._updates = updates
        self._before: dict[str, torch.Tensor] = {}

    def before_loss(self, model: nn.Module, batch: Any, seed: int) -> None:
        """Note the weights as they are stored."""
        super().before_loss(model, batch, seed)
        self._before = {name: p.detach().clone() for name, p in model.named_parameters() if p.dtype in HALF}

    def after_update(self) -> None:
        """Nothing is stored yet."""

    def after_step(self) -> None:
        """Compare."""
        now = dict(self._model.named_parameters())
        for name, (_, wanted) in self._wanted.items():
            if name in self._before:
                self._add(name, self._before[name], self._updates.start(now[name], torch.float32), wanted)
                self.stored[name].unbiased = True
        self._wanted = {}


def watch_of(
    lesson: Lesson, model: nn.Module, optimizer: Any, masking: Masking, forward: bool, updates: Updates
) -> Watch:
    """The watch that fits how weights take their updates."""
    if isinstance(updates, WideUpdates):
        return WideWatch(lesson, model, optimizer, masking, forward, updates)
    return Watch(lesson, model, optimizer, masking, forward)


def widen(tensors: Iterable[torch.Tensor]) -> None:
    """Make floating tensors FP64, in place: the same objects, gradients included."""
    for t in tensors:
        if t.is_floating_point() and t.dtype != torch.float64:
            grad, t.grad = (t.grad, None) if t.is_leaf else (None, None)
            t.data = t.detach().to(torch.float64)
            if grad is not None:
                t.grad = grad.to(torch.float64)


def _rounded(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, t) for name, t in held(model) if t.dtype in _ROUNDED]


def _plain(model: nn.Module) -> list[Any]:
    return [{k: v for k, v in vars(m).items() if not k.startswith("_")} for m in model.modules()]


def _is_mastered(t: torch.Tensor, others: Iterable[torch.Tensor]) -> bool:
    """Whether one of ``others`` is wider and rounds to ``t``."""
    return any(
        o.shape == t.shape
        and o.is_floating_point()
        and roundoff(o) < roundoff(t)
        and bool((o.detach().to(t.dtype) == t).all())
        for o in others
    )
