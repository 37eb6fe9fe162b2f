"""Every mode of this package in a training script that Hugging Face accelerate runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from precision_runtime.errors import ConfigurationError, UnsupportedError
from precision_runtime.runtime import PrecisionRuntime, StepResult

try:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
except ImportError:  # the class can then be imported, and says what to install when it is used
    Accelerator = AcceleratedOptimizer = None

Base: Any = object if Accelerator is None else Accelerator


class PrecisionAccelerator(Base):
    """``accelerator = PrecisionAccelerator(PrecisionRuntime("bf16-mixed"), gradient_accumulation_steps=4)``.

    It is an ``Accelerator`` that leaves precision to ``runtime``: ``prepare`` sets models and optimizers up,
    ``backward``, ``clip_grad_norm_``, ``clip_grad_value_``, ``autocast``, ``optimizer.step()``, ``step_was_skipped``,
    ``save_state`` and ``load_state`` go through it. A mode alone stands for the runtime of that mode on accelerate's
    device. The rest of the arguments is the Accelerator's.

    Raises ``ConfigurationError`` where accelerate is to choose a precision of its own, ``UnsupportedError`` without
    accelerate.
    """

    def __init__(self, mode: object, **options: Any) -> None:
        if Accelerator is None:
            raise UnsupportedError("this takes accelerate: pip install 'pytest-precision[accelerate]'")
        own = options.setdefault("mixed_precision", "no")
        super().__init__(**options)
        runtime = mode if isinstance(mode, PrecisionRuntime) else PrecisionRuntime(mode, self.device)
        if self.mixed_precision != "no":
            raise ConfigurationError(
                f"accelerate is to run {self.mixed_precision} (mixed_precision={own!r}, its configuration, or an "
                f"Accelerator of this process) and the runtime {runtime.mode}: leave accelerate's at 'no'"
            )
        if self.device.type != runtime.device.type:
            raise ConfigurationError(
                f"accelerate places models on {self.device} and the runtime on {runtime.device}: make it with "
                f"PrecisionRuntime({runtime.mode.name!r}, accelerator={str(self.device)!r})"
            )
        self.runtime = runtime
        self.scaler = RuntimeScaler(runtime)

    def prepare(self, *objects: Any, **options: Any) -> Any:
        """Set models and their optimizers up, then let accelerate do the rest."""
        models = [o for o in objects if isinstance(o, nn.Module)]
        optimizers = [o for o in objects if isinstance(o, Optimizer)]
        for model in models:
            # With several models nobody says whose an optimizer is; the runtime then meets it at its first step.
            self.runtime.setup(model, *(optimizers if len(models) == 1 else ()))
        return super().prepare(*objects, **options)

    def prepare_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Set the model up, then let accelerate do the rest."""
        return super().prepare_model(self.runtime.setup(model), *args, **kwargs)

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """The runtime's backward pass of the loss over the number of accumulation steps."""
        self.runtime.backward(loss / self.gradient_accumulation_steps, **kwargs)

    @contextmanager
    def autocast(self, autocast_handler: Any = None) -> Iterator[None]:
        """The mode's autocast. A handler of accelerate's own would contradict the mode."""
        if autocast_handler is not None:
            raise ConfigurationError(f"{self.runtime.mode} decides on autocast: leave autocast_handler out")
        with self.runtime.autocast():
            yield

    def unscale_gradients(self, optimizer: Any = None) -> None:
        """Unscale the gradients of ``optimizer``, or of every one that was prepared, once for each step."""
        given = self._optimizers if optimizer is None else optimizer
        for each in given if isinstance(given, (tuple, list)) else (given,):
            self.runtime.scaler.unscale(unwrapped(each))

    def clip_grad_norm_(
        self, parameters: Iterable[torch.Tensor], max_norm: float, norm_type: float = 2
    ) -> torch.Tensor | None:
        """Clip by the norm of all ``parameters``; on a step that will be skipped nothing is clipped: inf."""
        parameters = list(parameters) if not isinstance(parameters, torch.Tensor) else [parameters]
        if not self.sync_gradients:
            return None
        if self._doomed(parameters):
            return torch.tensor(float("inf"), device=self.device)
        norm: torch.Tensor = super().clip_grad_norm_(parameters, max_norm, norm_type)
        return norm

    def clip_grad_value_(self, parameters: Iterable[torch.Tensor], clip_value: float) -> None:
        """Clip by value, after unscaling."""
        parameters = list(parameters) if not isinstance(parameters, torch.Tensor) else [parameters]
        if self.sync_gradients and not self._doomed(parameters):
            super().clip_grad_value_(parameters, clip_value)

    def _doomed(self, parameters: list[torch.Tensor]) -> bool:
        """Unscale the optimizers of these parameters, and say whether a step of theirs will be skipped."""
        wanted = {id(p) for p in parameters}
        doomed = False
        for optimizer in map(unwrapped, self._optimizers):
            if any(id(p) in wanted for group in optimizer.param_groups for p in group["params"]):
                doomed |= bool(self.runtime.scaler.unscale(optimizer))
        return doomed


class RuntimeScaler:
    """What accelerate calls where it has a gradient scaler: its optimizers step through the runtime.

    ``result`` is what the last step did. Saved in checkpoints as the scaler's state, it is the runtime's.
    """

    def __init__(self, runtime: PrecisionRuntime) -> None:
        self.runtime = runtime
        self.result: StepResult | None = None

    def get_scale(self) -> float:
        """What the next loss is multiplied by."""
        return self.runtime.scaler.scale

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss, scaled."""
        return self.runtime.scaler.scaled(loss)

    def unscale_(self, optimizer: Optimizer) -> None:
        """Unscale, once for each step."""
        self.runtime.scaler.unscale(optimizer)

    def step(self, optimizer: Optimizer, closure: Any = None) -> None:
        """Step or skip."""
        self.result = self.runtime.step(optimizer, closure)

    def update(self) -> None:
        """The runtime's scaler has closed the step already."""

    def state_dict(self) -> dict[str, Any]:
        """The runtime's state: mode and scaler."""
        return self.runtime.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse; another mode's state raises ``ConfigurationError``."""
        self.runtime.load_state_dict(state)


def unwrapped(optimizer: Any) -> Optimizer:
    """The torch optimizer inside accelerate's wrappers."""
    while AcceleratedOptimizer is not None and isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    found: Optimizer = optimizer
    return found
