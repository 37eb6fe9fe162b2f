"""Loss scaling: keep small float16 gradients from vanishing, and skip the steps whose gradients overflowed.

One scaler serves several optimizers. A *round* is everything between a backward pass that follows a step and the last
step before the next backward: all its gradients carry one scale, each optimizer divides them by that scale, and the
scale changes once, however many optimizers step and whichever of them overflowed.
"""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.optim import Optimizer

from precision_runtime.errors import ConfigurationError

# float32's largest power of two: a larger scale is inf when it meets a float32 loss.
_LARGEST = 2.0**127


class Scaler(ABC):
    """What the runtime asks of a scaler."""

    enabled: bool

    @property
    @abstractmethod
    def scale(self) -> float:
        """What the next round's losses are multiplied by."""

    @abstractmethod
    def open(self, optimizers: Iterable[Optimizer]) -> None:
        """A backward pass begins; ``optimizers`` may hold gradients."""

    @abstractmethod
    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss to run backward from."""

    @abstractmethod
    def unscale(self, optimizer: Optimizer) -> tuple[torch.Tensor, ...]:
        """Divide the gradients of ``optimizer``, once per round; return the parameters whose gradient is not finite."""

    @abstractmethod
    def close(self, optimizer: Optimizer) -> None:
        """``optimizer`` has stepped, or its step was skipped."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Builtins only."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse; raises ``ConfigurationError`` with every key that is missing or foreign."""


class NullScaler(Scaler):
    """Scales by 1 and never skips: the scaler of every mode that needs none."""

    enabled = False
    scale = 1.0

    def open(self, optimizers: Iterable[Optimizer]) -> None:
        """Nothing to settle."""

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss itself."""
        return loss

    def unscale(self, optimizer: Optimizer) -> tuple[torch.Tensor, ...]:
        """Nothing is scaled, nobody looks: no culprits."""
        return ()

    def close(self, optimizer: Optimizer) -> None:
        """Nothing to count."""

    def state_dict(self) -> dict[str, Any]:
        """Empty."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ``ConfigurationError`` for a state that is not empty."""
        _check_keys(state, ())


@dataclass(frozen=True)
class ScaleState:
    """What changes: the scale, the good rounds since its last change, the overflows that hysteresis has forgiven."""

    scale: float
    good: int = 0
    forgiven: int = 0


class DynamicScaler(Scaler):
    """Doubles the scale after ``growth_interval`` good rounds, halves it after an overflow, never below ``floor``.

    The floor is 1 unless told otherwise. Scaling exists to lift gradients; below 1 it would push them down, towards
    the underflow that it is there to prevent, and an overflow at scale 1 belongs to the model: no scale cures it. A
    scale without a floor halves until it is 0, and then the next healthy step writes NaN into every weight (0 / 0).

    ``hysteresis`` is the number of overflows, 1 or more, that it takes to lower the scale; a good round's growth
    resets the count. Raises ``ConfigurationError`` for settings that cannot work, all of them at once.
    """

    enabled = True

    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        floor: float = 1.0,
        hysteresis: int = 1,
    ) -> None:
        wrong = [
            text
            for bad, text in (
                (not 0.0 < floor <= init_scale, f"0 < floor <= init_scale, got {floor=}, {init_scale=}"),
                (not init_scale <= _LARGEST, f"init_scale <= 2**127, got {init_scale}"),
                (not growth_factor > 1.0, f"growth_factor > 1, got {growth_factor}"),
                (not 0.0 < backoff_factor < 1.0, f"0 < backoff_factor < 1, got {backoff_factor}"),
                (not growth_interval >= 1, f"growth_interval >= 1, got {growth_interval}"),
                (not hysteresis >= 1, f"hysteresis >= 1, got {hysteresis}"),
            )
            if bad
        ]
        if wrong:
            raise ConfigurationError(f"a loss scaler needs {'; '.join(wrong)}")
        self.growth_factor = float(growth_factor)
        self.backoff_factor = float(backoff_factor)
        self.growth_interval = int(growth_interval)
        self.floor = float(floor)
        self.hysteresis = int(hysteresis)
        self._known: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._reset(ScaleState(float(init_scale)))

    @property
    def scale(self) -> float:
        """See ``Scaler.scale``; after a step it is the new scale already."""
        return self._next.scale

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
                _multiply(_gradients(optimizer), self._next.scale / carried)
        self._reset(self._next)

    def _reset(self, state: ScaleState) -> None:
        self._now = state  # of the round that is open
        self._next = state  # of the round after it, as far as its steps are known
        self._overflow = False
        self._unscaled: weakref.WeakKeyDictionary[Optimizer, tuple[torch.Tensor, ...]] = weakref.WeakKeyDictionary()
        self._spent: weakref.WeakKeyDictionary[Optimizer, _Versions] = weakref.WeakKeyDictionary()

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss times the scale, in float32 at least: the first scale, 65536, is beyond float16's largest value."""
        return (loss.float() if loss.dtype in (torch.float16, torch.bfloat16) else loss) * self._now.scale

    def unscale(self, optimizer: Optimizer) -> tuple[torch.Tensor, ...]:
        """See ``Scaler.unscale``. Raises ``ConfigurationError`` for gradients that a step has used already."""
        if optimizer in self._spent:
            if self._spent[optimizer] == _versions(optimizer):
                raise ConfigurationError(
                    f"{type(optimizer).__name__} has stepped with these gradients already, and has divided them by the "
                    "scale: call backward() before each step"
                )
            self._settle(self._known - {optimizer})  # new gradients, written without backward(): a round of their own
        if optimizer not in self._unscaled:
            self._known.add(optimizer)
            parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            _refuse_half(parameters)
            culprits = _not_finite(parameters)
            if self._now.scale != 1.0:
                _multiply(_gradients(optimizer), 1.0 / self._now.scale)
            self._unscaled[optimizer] = culprits
        return self._unscaled[optimizer]

    def close(self, optimizer: Optimizer) -> None:
        """Count the step, and work out the next scale afresh from the round's first."""
        self._spent[optimizer] = _versions(optimizer)
        self._overflow |= bool(self._unscaled.get(optimizer))
        self._next = self._after(self._now, self._overflow)

    def _after(self, state: ScaleState, overflow: bool) -> ScaleState:
        if overflow and state.forgiven + 1 < self.hysteresis:
            return replace(state, good=0, forgiven=state.forgiven + 1)
        if overflow:
            return ScaleState(max(self.floor, state.scale * self.backoff_factor))
        if state.good + 1 >= self.growth_interval:
            return ScaleState(min(_LARGEST, state.scale * self.growth_factor))
        return replace(state, good=state.good + 1)

    _SETTINGS = ("growth_factor", "backoff_factor", "growth_interval", "floor", "hysteresis")

    def state_dict(self) -> dict[str, Any]:
        """Settings and state."""
        state = {name: getattr(self, name) for name in self._SETTINGS}
        return {**state, "scale": self._next.scale, "good": self._next.good, "forgiven": self._next.forgiven}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Settings and state as saved; an open round is forgotten."""
        _check_keys(state, (*self._SETTINGS, "scale", "good", "forgiven"))
        settings = {name: state[name] for name in self._SETTINGS}
        DynamicScaler.__init__(self, init_scale=state["scale"], **settings)  # checks them, and forgets an open round
        self._reset(ScaleState(float(state["scale"]), int(state["good"]), int(state["forgiven"])))


class AdoptedScaler(DynamicScaler):
    """Takes the settings of a ``torch.amp.GradScaler`` and keeps its ``get_scale()`` true; the floor is added."""

    def __init__(self, source: torch.amp.GradScaler) -> None:
        if type(source) not in _PLAIN:
            raise ConfigurationError(
                f"scaler={type(source).__name__}: a subclass of GradScaler may do more than its settings say, and that "
                "would be lost. Give a torch.amp.GradScaler, or a precision_runtime.scaling.DynamicScaler."
            )
        first = source.get_scale()
        super().__init__(
            init_scale=first,
            growth_factor=source.get_growth_factor(),
            backoff_factor=source.get_backoff_factor(),
            growth_interval=source.get_growth_interval(),
            floor=min(1.0, first),
        )
        self._source = source

    def close(self, optimizer: Optimizer) -> None:
        """Count the step, and tell the source."""
        super().close(optimizer)
        self._publish()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As saved, and tell the source."""
        super().load_state_dict(state)
        self._publish()

    def _publish(self) -> None:
        if self._source.get_scale() != self.scale:
            self._source.scale(torch.ones(1, device=self._source._device))  # makes the tensor that update() fills
            self._source.update(self.scale)


_PLAIN = (torch.amp.GradScaler, torch.cuda.amp.GradScaler, torch.cpu.amp.grad_scaler.GradScaler)


def scaler_from(given: object) -> Scaler:
    """The scaler behind the argument ``scaler``: None for the default, one of ours, or a ``torch.amp.GradScaler``.

    Raises ``ConfigurationError`` for anything else.
    """
    if given is None:
        return DynamicScaler()
    if isinstance(given, Scaler):
        return given
    if isinstance(given, torch.amp.GradScaler):
        return AdoptedScaler(given) if given.is_enabled() else NullScaler()
    raise ConfigurationError(
        f"scaler={given!r} is no scaler: give a precision_runtime.scaling.DynamicScaler or a torch.amp.GradScaler"
    )


def _gradients(optimizer: Optimizer) -> list[torch.Tensor]:
    """The gradients as dense tensors that may be written to; each once."""
    parameters = {id(p): p for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
    return [_dense(p) for p in parameters.values()]


def _dense(parameter: torch.Tensor) -> torch.Tensor:
    gradient = parameter.grad
    assert gradient is not None
    if gradient.is_sparse:
        if not gradient.is_coalesced():  # an index may come twice, and only the sum shows an overflow
            parameter.grad = gradient = gradient.coalesce()
        return gradient._values()
    return gradient


@torch.no_grad()
def _multiply(tensors: list[torch.Tensor], factor: float) -> None:
    if tensors:
        torch._foreach_mul_(tensors, factor)


# Which gradient tensors an optimizer held, and how often each had been written to.
_Versions = list[tuple[weakref.ref[torch.Tensor], int]]


def _versions(optimizer: Optimizer) -> _Versions:
    return [(weakref.ref(g), g._version) for g in _gradients(optimizer)]


def _check_keys(state: Mapping[str, Any], expected: Iterable[str]) -> None:
    missing, foreign = sorted(set(expected) - set(state)), sorted(map(str, set(state) - set(expected)))
    if missing or foreign:
        raise ConfigurationError(f"this is no state of the mode's loss scaler: missing {missing}, unknown {foreign}")


def _refuse_half(parameters: list[torch.Tensor]) -> None:
    half = sum(p.dtype is torch.float16 for p in parameters)
    if half:
        raise ConfigurationError(
            f"{half} of {len(parameters)} parameters are float16, whose gradients have overflowed or vanished before "
            "they could be unscaled. 16-mixed keeps parameters in float32: call setup(model, optimizer). 16-true is "
            "the mode for float16 parameters, and has no scaler."
        )


@torch.no_grad()
def _not_finite(parameters: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    gradients = [g for g in (_dense(p) for p in parameters) if g.numel()]
    # One number for all of them: the largest magnitude, which a NaN survives.
    if not gradients or math.isfinite(torch.nn.utils.get_total_norm(gradients, norm_type=math.inf).item()):
        return ()
    return tuple(p for p in parameters if not torch.isfinite(_dense(p)).all())
