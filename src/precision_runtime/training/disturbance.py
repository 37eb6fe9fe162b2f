"""A training in FP64 disturbed by one unit roundoff wherever the mode rounds: what the mode must cost.

The disturbance of each place is the same in every step. Rounding is: a full batch, a weight that hardly moves and what
is computed from them are rounded alike step after step, so that errors add up; fresh noise would average out. But it is
not where weights move on, and a training that forgets what is always the same is moved by that: ``fresh`` is for both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.amp import GradScaler

from precision_runtime.auditing.executing.dispatch import TrueDouble, plain_double
from precision_runtime.auditing.executing.hooks import on_gradient
from precision_runtime.auditing.executing.masking import Masking
from precision_runtime.auditing.executing.noise import Exact, Noise
from precision_runtime.auditing.executing.recurrent import noisy_states
from precision_runtime.auditing.executing.unseen import transformed
from precision_runtime.training.constants import Site, constant
from precision_runtime.training.course import Observer, held
from precision_runtime.tree import map_tensors


@contextmanager
def unscaled() -> Iterator[None]:
    """Inside, every ``GradScaler`` is as one that is disabled: FP64 needs no loss scale.

    What is done to gradients while they are scaled is a defect of the mode; with a scaler, FP64 would have it, too. And
    a scaler that all runs share keeps the scale of the training in the mode.
    """
    setattr(GradScaler, "_enabled", property(lambda self: False, _keep))  # noqa: B010  # an instance's own, to mypy
    try:
        yield
    finally:
        delattr(GradScaler, "_enabled")


def _keep(scaler: GradScaler, value: bool) -> None:
    vars(scaler)["_enabled"] = value


class Double(Observer):
    """A true FP64 training."""

    def __init__(self, masking: Masking) -> None:
        self._masking = masking
        self.fallbacks: set[str] = set()

    def around(self, step: int) -> AbstractContextManager[Any]:
        """FP64, whatever the code asks for."""
        stack = ExitStack()
        stack.enter_context(plain_double())
        mode = self._mode()
        mode.fallbacks = self.fallbacks
        stack.enter_context(mode)
        stack.enter_context(unscaled())
        return stack

    def _mode(self) -> TrueDouble:
        return TrueDouble(masking=self._masking)


class Disturbed(Double):
    """One that is disturbed: starting weights, inputs, results of modules, gradients, states of recurrent layers.

    ``walks`` are disturbances by path, one standard deviation for each element, of what is stored after each step.
    These are fresh each time, as rounding is when a value has moved on. ``constants`` stay as they are.
    """

    def __init__(
        self, masking: Masking, noise: Noise, back: Noise, low: torch.dtype,
        walks: Mapping[str, torch.Tensor] | None = None, fresh: bool = False, constants: Collection[Site] = (),
    ) -> None:  # fmt: skip
        super().__init__(masking)
        self._fresh, self._constants = fresh, constants
        self._noise, self._back, self._low = noise, back, low
        self._walks = dict(walks or {})
        self._step = 0
        self._counts: dict[str, int] = {}
        self._modules: list[nn.Module] = []

    def prepare(self, model: nn.Module) -> None:
        """Disturb the starting weights of ``model``, and all that it will compute."""
        self._model, self._modules = model, list(model.modules())
        for name, p in model.named_parameters():
            if p.is_floating_point():
                p.data = self._noise.fixed(f"start of {name}").rounded(p.data)
            if p.requires_grad:
                on_gradient(p, self._gradient(name))
        for name, module in model.named_modules():
            module.register_forward_hook(self._result(name))

    def after_update(self) -> None:
        """See ``Observer.after_update``."""
        self._walk(dict(self._model.named_parameters()))

    def after_loss(self, model: nn.Module) -> None:
        """See ``Observer.after_loss``."""
        self._walk({name: t for name, t in held(model) if not isinstance(t, nn.Parameter)})

    def _walk(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, deviation in self._walks.items():
            if name in tensors:
                unit = self._noise.fixed(f"walk {self._step} of {name}").by(1.0, torch.ones_like(deviation)) - 1.0
                tensors[name].data += math.sqrt(3.0) * deviation * unit

    def inputs(self, place: int, batch: Any) -> Any:
        """See ``Observer.inputs``."""
        return self._noise.fixed(f"batch {place}").inputs(batch, Exact(batch, self._low))

    def around(self, step: int) -> AbstractContextManager[Any]:
        """See ``Observer.around``."""
        self._counts.clear()
        self._step = step
        stack = ExitStack()
        stack.enter_context(super().around(step))
        stack.enter_context(noisy_states(self._modules, self._at("states")))
        return stack

    def _at(self, place: str, noise: Noise | None = None) -> Noise:
        """The disturbance of a place: always the same, or, where it is fresh, that of this step."""
        return (noise or self._noise).fixed(f"{place} in step {self._step}" if self._fresh else place)

    def _mode(self) -> TrueDouble:
        return TrueDouble(self._at("ops"), masking=self._masking)

    def _gradient(self, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def hook(grad: torch.Tensor) -> torch.Tensor:
            return self._at(f"gradient of {name}", self._back)(grad)

        return hook

    def _result(self, name: str) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(module: nn.Module, args: Any, result: Any) -> Any:
            if transformed():
                return None
            number = self._counts[name] = self._counts.get(name, 0) + 1
            noise = self._at(f"result {number} of {name}")
            spared = constant(result, name, number, self._constants)
            return map_tensors(lambda t: t if id(t) in spared else noise.rounded(t), result, objects=False)

        return hook
