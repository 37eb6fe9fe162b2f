"""Every mode of this package as a precision plugin of Lightning's Trainer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from precision_runtime.errors import UnsupportedError
from precision_runtime.integrations.fabric import MISSING
from precision_runtime.runtime import PrecisionRuntime, StepResult

try:
    from lightning.pytorch.plugins.precision import Precision
except ImportError:  # the class can then be imported, and says what to install when it is used
    Precision = None

Base: Any = object if Precision is None else Precision


class TrainerPrecision(Base):
    """``Trainer(plugins=TrainerPrecision("bf16-mixed", islands=...))``; arguments as ``FabricPrecision`` takes them.

    Checkpoints of the Trainer carry the runtime's state. Whatever ``training_step`` calls runs in the mode; in mixed
    modes a batch keeps its dtypes, in the others it is cast as the model is. Optimizers that compute their gradients
    themselves (LBFGS) work in scaled modes, too.
    """

    def __init__(self, mode: object = None, accelerator: object = "auto", **options: Any) -> None:
        if Precision is None:
            raise UnsupportedError(MISSING)
        super().__init__()
        self.runtime = mode if isinstance(mode, PrecisionRuntime) else PrecisionRuntime(mode, accelerator, **options)
        self.precision = self.runtime.mode.name
        self.result: StepResult | None = None
        self._module: nn.Module | None = None

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Set the module up."""
        self._module = self.runtime.setup(module)
        return self._module

    def connect(self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]) -> Any:
        """Take the optimizers over, which were made after the module was set up."""
        if self._module is not None and optimizers:
            self.runtime.setup(self._module, *optimizers)
        return super().connect(model, optimizers, lr_schedulers)

    def forward_context(self) -> AbstractContextManager[Any]:
        """For the steps of the module."""
        return self.runtime.autocast()

    def convert_input(self, data: Any) -> Any:
        """A batch, before any step sees it."""
        return data if self.runtime.mode.autocast else self.runtime.strategy.cast_inputs(data)

    def backward(self, tensor: torch.Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Run the module's own ``backward``, which users override, on the scaled loss. Hooks before it see it plain."""
        runtime = self.runtime
        runtime.scaler.open(runtime._optimizers)
        with runtime.strategy.backward():
            super().backward(runtime.scaler.scaled(tensor), model, optimizer, *args, **kwargs)
        runtime.masters.gather(runtime._optimizers)

    def optimizer_step(self, optimizer: Optimizer, model: Any, closure: Callable[[], Any], **kwargs: Any) -> Any:
        """Run the closure, unscale, run the hooks (which clip), and step or skip; return the closure's result."""
        results: list[Any] = []

        def evaluate() -> Any:
            results.append(closure())
            if results[-1] is None and model.automatic_optimization:
                return None  # training_step returned None: there was no backward pass
            self.runtime.scaler.unscale(optimizer)
            self._after_closure(model, optimizer)
            return results[-1]

        if _evaluates_again(optimizer) and not self.runtime.mode.masters:
            self.result = self.runtime.step(optimizer, evaluate, **kwargs)
        elif evaluate() is not None or not model.automatic_optimization:
            self.result = self.runtime.step(optimizer, **kwargs)
        return results[-1] if results else None

    def clip_gradients(
        self, optimizer: Optimizer, clip_val: float = 0.0, gradient_clip_algorithm: Any = "norm"
    ) -> None:
        """Clip as the runtime does: a step that will be skipped is left alone."""
        if clip_val <= 0:
            return
        by_value = str(getattr(gradient_clip_algorithm, "value", gradient_clip_algorithm)) == "value"
        clip = partial(self.runtime.clip_gradients, optimizer)
        clip(clip_value=clip_val) if by_value else clip(max_norm=clip_val)

    def state_dict(self) -> dict[str, Any]:
        """The runtime's state: mode and scaler."""
        return self.runtime.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse; another mode's state raises ``ConfigurationError``."""
        self.runtime.load_state_dict(state_dict)


def _evaluates_again(optimizer: Optimizer) -> bool:
    """Whether the optimizer may run its closure several times: LBFGS does, and nobody knows of foreign ones."""
    return isinstance(optimizer, torch.optim.LBFGS) or not type(optimizer).__module__.startswith("torch.optim.")
