"""Every mode of this package as a precision plugin of Lightning Fabric."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from precision_runtime.errors import UnsupportedError
from precision_runtime.runtime import PrecisionRuntime, StepResult

try:
    from lightning.fabric.plugins import Precision
except ImportError:  # the class can then be imported, and says what to install when it is used
    Precision = None

Base: Any = object if Precision is None else Precision
MISSING = "this takes Lightning: pip install 'pytest-precision[lightning]'"


class FabricPrecision(Base):
    """``Fabric(plugins=FabricPrecision("bf16-mixed", islands=...))``; arguments are those of ``PrecisionRuntime``, or
    a runtime itself.

    The runtime is ``runtime``: for its plan, ledger and gate. ``result`` is what the last optimizer step did, which
    ``optimizer.step()`` also returns. The state for checkpoints is the runtime's: ``fabric.save(path, {"model": model,
    "precision": plugin})``. Where several GPUs take part, name this process's: ``accelerator="cuda:1"``.

    Raises ``UnsupportedError`` without Lightning, and what ``PrecisionRuntime`` raises: a mode is never replaced.
    """

    def __init__(self, mode: object = None, accelerator: object = "auto", **options: Any) -> None:
        if Precision is None:
            raise UnsupportedError(MISSING)
        super().__init__()
        self.runtime = mode if isinstance(mode, PrecisionRuntime) else PrecisionRuntime(mode, accelerator, **options)
        self.precision = self.runtime.mode.name
        self.result: StepResult | None = None
        self._doomed: set[int] = set()

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Set the module up."""
        return self.runtime.setup(module)

    def module_init_context(self) -> AbstractContextManager[None]:
        """For ``fabric.init_module()``."""
        return self.runtime.init_module()

    def forward_context(self) -> AbstractContextManager[Any]:
        """For forward, for methods marked as forward, and for ``fabric.autocast()``."""
        return self.runtime.autocast()

    def convert_input(self, data: Any) -> Any:
        """As the mode casts forward's arguments. Mixed modes keep values in float32, targets too."""
        return self.runtime.strategy.cast_inputs(data)

    def convert_output(self, data: Any) -> Any:
        """As the mode casts what forward returns."""
        return self.runtime.strategy.cast_outputs(data)

    def backward(self, tensor: torch.Tensor, model: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """Run backward, scaled where the mode scales."""
        self.runtime.backward(tensor, *args, **kwargs)

    def optimizer_step(self, optimizer: Optimizer, **kwargs: Any) -> StepResult:
        """Step, or skip the step where scaled gradients overflowed; with a closure as without."""
        self._doomed.discard(id(optimizer))
        self.result = self.runtime.step(optimizer, **kwargs)
        return self.result

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Before clipping. Once for each step."""
        self.runtime.masters.gather((optimizer,))
        if self.runtime.scaler.unscale(optimizer):
            self._doomed.add(id(optimizer))

    def main_params(self, optimizer: Optimizer) -> list[torch.Tensor]:
        """What is clipped: nothing where the step will be skipped, for the norm of inf would raise on it."""
        if id(optimizer) in self._doomed:
            return []
        return [p for group in optimizer.param_groups for p in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """The runtime's state: mode and scaler."""
        return self.runtime.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse; another mode's state raises ``ConfigurationError``."""
        self.runtime.load_state_dict(state_dict)
