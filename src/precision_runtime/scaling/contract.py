"""What the runtime asks of a scaler, and the scaler of modes that need none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from precision_runtime.errors import ConfigurationError


@dataclass(frozen=True)
class Inspection:
    """What a look at an optimizer's gradients showed. True where the step is to be skipped.

    ``culprits``: the parameters whose gradient is not finite. ``elsewhere``: only other processes hold such ones.
    """

    culprits: tuple[torch.Tensor, ...] = ()
    elsewhere: bool = False

    def __bool__(self) -> bool:
        return bool(self.culprits) or self.elsewhere


CLEAN = Inspection()


class Scaler(ABC):
    """What the runtime asks of a scaler. ``losses`` counts what it has scaled, ``alone`` says that nobody else does."""

    enabled: bool
    alone: bool = True
    losses: int = 0

    @property
    @abstractmethod
    def scale(self) -> float:
        """What the next round's losses are multiplied by."""

    @abstractmethod
    def open(self, optimizers: Iterable[Optimizer]) -> None:
        """A backward pass begins; ``optimizers`` may hold gradients."""

    @abstractmethod
    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss to run backward from, or a gradient as that would have been."""

    @abstractmethod
    def unscale(self, optimizer: Optimizer) -> Inspection:
        """Divide the gradients of ``optimizer``, once per round, and say which are not finite."""

    @abstractmethod
    def close(self, optimizer: Optimizer, culprits: tuple[str, ...] = ()) -> None:
        """``optimizer`` has stepped, or its step was skipped because of the parameters named ``culprits``."""

    @abstractmethod
    def explain(self) -> str:
        """Why the scale is what it is, in sentences."""

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

    def unscale(self, optimizer: Optimizer) -> Inspection:
        """Nothing is scaled, nobody looks: no culprits."""
        return CLEAN

    def close(self, optimizer: Optimizer, culprits: tuple[str, ...] = ()) -> None:
        """Nothing to count."""

    def explain(self) -> str:
        """That there is no scaling."""
        return "The loss is not scaled."

    def state_dict(self) -> dict[str, Any]:
        """Empty."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ``ConfigurationError`` for a state that is not empty."""
        check_keys(state, ())


def check_numbers(**settings: object) -> None:
    """Raise ``ConfigurationError`` where a scaler's setting is no number; a string of digits is none."""
    wrong = [f"{name}={value!r}" for name, value in settings.items() if not hasattr(type(value), "__float__")]
    if wrong:
        raise ConfigurationError(f"a loss scaler's settings are numbers, such as 1024.0, got {', '.join(wrong)}")


def check_keys(state: Mapping[str, Any], expected: Iterable[str]) -> None:
    """Raise ``ConfigurationError`` where ``state`` has other keys than ``expected``."""
    missing, foreign = sorted(set(expected) - set(state)), sorted(map(str, set(state) - set(expected)))
    if missing or foreign:
        raise ConfigurationError(f"this is no state of the mode's loss scaler: missing {missing}, unknown {foreign}")
