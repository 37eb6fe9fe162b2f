"""How the weights of a half model take small updates: rounded to nearest, stochastically, or with what was lost kept.

Rounded to nearest, an update below half a unit in the last place of its weight is lost: in bfloat16 one of less than
1/512 to 1/256 of the weight. A learning rate of 1e-4 then moves no weight above 0.05, and the loss stands still.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from precision_runtime.errors import ConfigurationError, unknown_names
from precision_runtime.formats import FORMATS
from precision_runtime.modes import Mode
from precision_runtime.stepping.rounding import mixed, round_stochastically, words_like
from precision_runtime.stepping.widening import HALF, WideLoading, Widened, widen_state

Record = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


class Updates(ABC):
    """What the runtime asks of a way to update weights."""

    name: str
    wide: bool  # whether optimizers compute in float32 and keep float32 state

    @abstractmethod
    def adopt(self, optimizer: Optimizer) -> None:
        """Prepare an optimizer that is met for the first time."""

    @abstractmethod
    def step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any], record: Record | None = None
    ) -> None:
        """Step ``optimizer``; ``args`` is empty or has the closure.

        ``record`` is told of each parameter: itself, the wide value before and after the update, and what is stored of
        it (in expectation, where rounding is random).
        """

    @abstractmethod
    def state_dict(self, named: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """What goes into a checkpoint; ``named`` are the parameters by path. Empty where there is nothing."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any], named: Mapping[str, torch.Tensor]) -> None:
        """The inverse. Raises ``ConfigurationError`` for the state of another way."""


class Nearest(Updates):
    """As torch does it: the optimizer works on the parameters as they are. Nothing is added, nothing is kept."""

    name = "nearest"
    wide = False

    def adopt(self, optimizer: Optimizer) -> None:
        """Nothing to prepare."""

    def step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any], record: Record | None = None
    ) -> None:
        """The optimizer's own step; the meter for it is ``lost.probe``."""
        optimizer.step(*args, **kwargs)

    def state_dict(self, named: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Empty."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], named: Mapping[str, torch.Tensor]) -> None:
        """Raises ``ConfigurationError`` for a state that is not empty."""
        _check(state, {}, self)


class WideUpdates(Updates):
    """Steps on float32 copies made for the step, and stores what the subclass makes of the result.

    The copies of weights and gradients take 8 bytes per parameter during a step. State is float32 throughout, also
    when it is loaded after ``setup``; loaded before into half parameters, torch has rounded it already. So any
    optimizer computes what it computes in mixed precision, and an ``eps`` that half cannot hold does no harm.
    """

    wide = True

    def __init__(self) -> None:
        self._loading: weakref.WeakKeyDictionary[Optimizer, WideLoading] = weakref.WeakKeyDictionary()

    def adopt(self, optimizer: Optimizer) -> None:
        """Its state becomes float32, and stays so when a checkpoint is loaded."""
        if optimizer not in self._loading:
            self._loading[optimizer] = WideLoading(optimizer)
        widen_state(optimizer, HALF)

    def step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any], record: Record | None = None
    ) -> None:
        """See ``Updates.step``. A closure runs on half weights, as any forward; state stays behind if it raises."""
        self.adopt(optimizer)
        widened = Widened(optimizer, HALF, self.start, bool(args), remember=record is not None)
        if args:
            args = (widened.narrowly(args[0]), *args[1:])
        with widened:
            optimizer.step(*args, **kwargs)
        self.begin()
        with torch.no_grad():
            for number, (parameter, after) in enumerate(zip(widened.parameters, widened.after, strict=True)):
                stored = self.store(parameter, after)
                if record is not None:
                    record(parameter, widened.before[number], after, stored)

    @abstractmethod
    def start(self, parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The wide value that the optimizer starts from."""

    def begin(self) -> None:
        """A step's values are about to be stored."""

    @abstractmethod
    def store(self, parameter: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
        """Write ``wide`` into ``parameter``; return what is stored of it, in expectation."""


class Stochastic(WideUpdates):
    """Rounds the new weight up or down at random, so that its expectation is right (see ``rounding``).

    Draws come from generators of its own, seeded by ``seed`` and the number of steps: global random numbers stay
    untouched, and a run goes on after a checkpoint as if it had never stopped. Processes that hold the same weights
    use the same seed and draw the same.
    """

    name = "stochastic"

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = int(seed)
        self.steps = 0
        self._generators: dict[torch.device, torch.Generator] = {}

    def __repr__(self) -> str:
        return f"Stochastic(seed={self.seed})"

    def start(self, parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The weight itself."""
        return parameter.detach().to(dtype)

    def begin(self) -> None:
        """Seed this step's draws."""
        self.steps += 1
        for generator in self._generators.values():
            generator.manual_seed(mixed(self.seed, self.steps))

    def store(self, parameter: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
        """See ``WideUpdates.store``."""
        generator = self._generators.get(parameter.device)
        if generator is None:
            generator = self._generators[parameter.device] = torch.Generator(parameter.device)
            generator.manual_seed(mixed(self.seed, self.steps))
        parameter.copy_(round_stochastically(wide, parameter.dtype, words_like(wide, generator)))
        return wide

    def state_dict(self, named: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Seed and number of steps, as builtins."""
        return {"kind": self.name, "seed": self.seed, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any], named: Mapping[str, torch.Tensor]) -> None:
        """See ``Updates.load_state_dict``."""
        _check(state, {"kind", "seed", "steps"}, self)
        self.seed, self.steps = int(state["seed"]), int(state["steps"])


class Kahan(WideUpdates):
    """Keeps beside each weight, in its own dtype, what rounding took away, and gives it back in the next step.

    Weight and residual together hold the weight to twice the format's digits: with ``s = fl(w + r)`` stored, the error
    ``(w + r) - s`` is a float32 number without rounding (it is below the last place of ``s``, whose bits it continues),
    and is rounded once when it becomes the residual. Two bytes per parameter. Compensated summation: Kahan, 1965, CACM
    8(1), 40; for bfloat16 weights Zamirai et al., 2020, arXiv:2010.06192, algorithm 1.
    """

    name = "kahan"

    def __init__(self) -> None:
        super().__init__()
        self._residuals: Any = WeakIdKeyDictionary()
        self._waiting: dict[str, torch.Tensor] = {}

    def __repr__(self) -> str:
        return "Kahan()"

    def start(self, parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Weight and residual, added."""
        wide = parameter.detach().to(dtype)
        residual = self._residuals.get(parameter)
        return wide if residual is None else wide + residual.to(dtype)

    def store(self, parameter: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
        """See ``WideUpdates.store``."""
        parameter.copy_(wide)
        stored = parameter.detach().to(wide.dtype)
        lost = torch.where(torch.isfinite(stored), wide - stored, 0.0)  # inf - inf is NaN, and would stay for ever
        residual = self._residuals[parameter] = lost.to(parameter.dtype)
        return stored + residual.to(wide.dtype)

    def residual(self, parameter: torch.Tensor) -> torch.Tensor:
        """What is kept beside ``parameter``: a tensor of its shape and dtype."""
        found: torch.Tensor | None = self._residuals.get(parameter)
        return torch.zeros_like(parameter, requires_grad=False) if found is None else found

    def state_dict(self, named: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """The residuals by the paths of their parameters."""
        kept = {path: self._residuals[p] for path, p in named.items() if p in self._residuals}
        return {"kind": self.name, "residuals": kept}

    def load_state_dict(self, state: Mapping[str, Any], named: Mapping[str, torch.Tensor]) -> None:
        """See ``Updates.load_state_dict``. The models are to be set up before."""
        _check(state, {"kind", "residuals"}, self)
        residuals: Mapping[str, torch.Tensor] = state["residuals"]
        unknown = [path for path in residuals if path not in named]
        if unknown:
            raise unknown_names("parameter", unknown, list(named), "the saved residuals; set the models up first")
        self._residuals.clear()
        for path, residual in residuals.items():
            self._residuals[named[path]] = residual.to(named[path].device, copy=True)


KINDS: Mapping[str, Callable[[], Updates]] = {"nearest": Nearest, "stochastic": Stochastic, "kahan": Kahan}


def updates_from(given: object, mode: Mode) -> Updates:
    """The way behind the argument ``updates``: None or a name of ``KINDS``, or one of the objects themselves.

    Raises ``UnknownNameError`` for another name, and ``ConfigurationError`` where the mode has no half weights of its
    own to round: full and mixed modes keep float32 weights, Apex O2 keeps float32 masters.
    """
    if given is None:
        return Nearest()
    if isinstance(given, str):
        if given not in KINDS:
            raise unknown_names("way of updates", [given], list(KINDS), "updates", plural="ways of updates")
        given = KINDS[given]()
    if not isinstance(given, Updates):
        raise ConfigurationError(f"updates={given!r}: give one of {', '.join(map(repr, KINDS))}, or Stochastic(seed)")
    if given.wide and (mode.scaled or FORMATS[mode.params].precision >= FORMATS["float32"].precision):
        raise ConfigurationError(
            f"updates={given.name!r} is for modes whose weights are half, such as bf16-true; {mode} steps on float32 "
            "weights, which lose no update that matters. Leave it out."
        )
    return given


def _check(state: Mapping[str, Any], keys: Iterable[str], way: Updates) -> None:
    if set(state) != set(keys) or state.get("kind", way.name) != way.name:
        raise ConfigurationError(
            f"this state was saved with updates={state.get('kind', 'nearest')!r} and cannot be loaded with "
            f"updates={way.name!r}: make the runtime with the same updates"
        )
