"""What every scaler that scales has in common: rounds.

One scaler serves several optimizers. A *round* is everything between a backward pass that follows a step and the last
step before the next backward: all its gradients carry one scale, each optimizer divides them by that scale, and the
scale changes once, however many optimizers step and whichever of them overflowed.
"""

from __future__ import annotations

import warnings
import weakref
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch.optim import Optimizer

from precision_runtime.errors import ConfigurationError, unknown_names
from precision_runtime.pointing import users_line
from precision_runtime.scaling.agreement import anyone
from precision_runtime.scaling.contract import Inspection, Scaler, check_keys
from precision_runtime.scaling.gradients import Versions, multiply, parameters_of, refuse_half, unscale, versions
from precision_runtime.scaling.history import STATE_KEYS, Change, ScaleState, StalledError, StallWarning, listed

LARGEST = 2.0**127  # float32's largest power of two: a larger scale is inf when it meets a float32 loss
SMALLEST = 2.0**-126  # below, one over the scale is inf

_ON_STALL = ("warn", "raise", "ignore")


class RoundScaler(Scaler):
    """Counts rounds, remembers what happened in them, and notices when nothing moves any more.

    ``patience``: after so many rounds in a row that overflowed while the scale could go no lower, ``on_stall`` says
    what happens: "warn" (``StallWarning``, once per stall), "raise" (``StalledError``) or "ignore". ``process_group``:
    whose processes skip together; where parameters are sharded it is all of them unless told otherwise.
    """

    enabled = True
    settings: ClassVar[tuple[str, ...]] = ("patience", "on_stall")  # names of attributes that state_dict carries

    def __init__(
        self,
        scale: float,
        patience: int = 200,
        on_stall: Literal["warn", "raise", "ignore"] = "warn",
        process_group: Any = None,
    ) -> None:
        if on_stall not in _ON_STALL:
            raise unknown_names("on_stall", [on_stall], list(_ON_STALL), plural="values of on_stall")
        self.patience = int(patience)
        self.on_stall = on_stall
        self.process_group = process_group
        self._known: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._reset(ScaleState(float(scale)))

    @abstractmethod
    def after(self, state: ScaleState, overflow: bool, culprits: tuple[str, ...]) -> ScaleState:
        """The state after a round, which is counted; ``culprits`` are names of parameters."""

    @property
    def scale(self) -> float:
        """See ``Scaler.scale``; after a step it is the new scale already."""
        return self._next.scale

    @property
    def history(self) -> tuple[Change, ...]:
        """The last rounds in which the scale changed or should have, oldest first."""
        return self._next.history

    @property
    def rounds(self) -> int:
        """Rounds so far."""
        return self._next.rounds

    def open(self, optimizers: Iterable[Optimizer]) -> None:
        """Settle the last round. Gradients that are still waiting for their step are brought to the new scale.

        So they may accumulate over a change of the scale, and on top of gradients that were unscaled for clipping.
        """
        self._known.update(optimizers)
        self._settle(self._known)

    def _settle(self, holders: Iterable[Optimizer]) -> None:
        for optimizer in holders:
            carried = 1.0 if optimizer in self._unscaled else self._now.scale
            if carried != self._next.scale:
                multiply(parameters_of(optimizer), self._next.scale / carried)
        self._reset(self._next)

    def _reset(self, state: ScaleState) -> None:
        self._now = state  # of the round that is open
        self._next = state  # of the round after it, as far as its steps are known
        self._overflow = False
        self._culprits: tuple[str, ...] = ()
        self._unscaled: weakref.WeakKeyDictionary[Optimizer, Inspection] = weakref.WeakKeyDictionary()
        # With which gradients an optimizer has stepped, and how many losses had been scaled by then.
        self._spent: weakref.WeakKeyDictionary[Optimizer, tuple[Versions, int]] = weakref.WeakKeyDictionary()

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss times the scale, in float32 at least: the first scale, 65536, is beyond float16's largest value."""
        if self._spent or self._unscaled:  # nobody has called open(): a backward pass, or a gradient, of the user's own
            self._settle(self._known)
        self.losses += 1
        return (loss.float() if loss.dtype in (torch.float16, torch.bfloat16) else loss) * self._now.scale

    def unscale(self, optimizer: Optimizer) -> Inspection:
        """See ``Scaler.unscale``.

        Raises ``ConfigurationError`` for gradients that a step has used already, or that nobody can have scaled.
        """
        parameters = parameters_of(optimizer)
        spent, losses = self._spent.get(optimizer, (None, 0))
        if spent is not None and spent == versions(parameters):
            raise ConfigurationError(
                f"{type(optimizer).__name__} has stepped with these gradients already, and has divided them by the "
                "scale: call backward() before each step"
            )
        if self.alone and self.losses == losses:
            raise ConfigurationError(
                f"{type(optimizer).__name__} is to step, and no loss has been scaled "
                f"{'since its last step' if losses else 'yet'}: its gradients would be divided by a scale, "
                f"{self.scale:g}, that nobody multiplied them by. Call runtime.backward(loss) in place of "
                "loss.backward(); gradients that are set by hand take p.grad = runtime.scaler.scaled(gradient)"
            )
        if spent is not None:
            self._settle(self._known - {optimizer})  # new gradients, without open(): a round of their own
        if optimizer not in self._unscaled:
            self._known.add(optimizer)
            refuse_half(parameters)
            culprits = unscale(parameters, self._now.scale)
            device = parameters[0].device if parameters else torch.device("cpu")
            overflow = anyone(bool(culprits), optimizer, self.process_group, device)
            self._unscaled[optimizer] = Inspection(culprits, elsewhere=overflow and not culprits)
        return self._unscaled[optimizer]

    def close(self, optimizer: Optimizer, culprits: tuple[str, ...] = ()) -> None:
        """Count the step, and work out the next state afresh from the round's first.

        Raises ``StalledError`` where that was asked for.
        """
        self._spent[optimizer] = versions(parameters_of(optimizer)), self.losses
        self._overflow |= bool(self._unscaled.get(optimizer))
        self._culprits = tuple(dict.fromkeys((*self._culprits, *culprits)))
        counted = self._next is not self._now  # another optimizer of this round has told already
        stalled = self._next.stalled if counted else 0
        self._next = self.after(self._now, self._overflow, self._culprits)
        if self._next.stalled == self.patience != stalled:
            self._tell()

    def _tell(self) -> None:
        message = (
            f"{self._next.stalled} steps in a row were skipped: gradients overflow although the loss scale is "
            f"{self.scale:g}, and it can go no lower. The model does not learn any more. In the last round the "
            f"gradient of {listed(self._culprits)} was inf or NaN. Look there for a value beyond float16's 65504 "
            "(audit() names the line), or use bf16-mixed."
        )
        if self.on_stall == "raise":
            raise StalledError(message)
        if self.on_stall == "warn":
            warnings.warn(message, StallWarning, stacklevel=users_line())

    def explain(self) -> str:
        """Why the scale is what it is: the changes remembered, and what comes next."""
        state = self._next
        lines = [f"The loss scale is {state.scale:g} after {state.rounds} round{'' if state.rounds == 1 else 's'}."]
        lines += [f"  {change}" for change in state.history]
        if not state.history:
            lines.append("  It has been so from the beginning: no gradient was inf or NaN.")
        return "\n".join([*lines, f"  {self.outlook()}"])

    @abstractmethod
    def outlook(self) -> str:
        """What happens next, in a sentence."""

    def state_dict(self) -> dict[str, Any]:
        """Settings and state, the rounds remembered included."""
        return {**{name: getattr(self, name) for name in self.settings}, **self._next.to_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Settings and state as saved; an open round is forgotten, and gradients that wait in it."""
        check_keys(state, (*self.settings, *STATE_KEYS))
        for name in self.settings:
            setattr(self, name, state[name])
        self.losses = 0
        self._reset(ScaleState.from_dict(dict(state)))
