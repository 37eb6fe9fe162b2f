"""Optimizers that compute their gradients themselves, through a closure, while the loss is scaled.

torch's own scaler refuses them, and only where the closure is passed by name: passed by position it slips through, and
the weights move by gradients that are still multiplied by the scale. Here each evaluation is unscaled and checked
before the optimizer sees its gradients, and an overflow takes the whole step back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import LBFGS, Optimizer

from precision_runtime.errors import ConfigurationError
from precision_runtime.scaling.contract import CLEAN, Inspection, Scaler


def step_with_closure(
    scaler: Scaler, optimizer: Optimizer, closure: Callable[[], Any], step: Callable[..., Any], kwargs: dict[str, Any]
) -> Inspection:
    """Call ``step(closure, **kwargs)`` of ``optimizer`` with a closure that unscales, and say which gradients were not
    finite. Then parameters and optimizer are as they were before.

    Raises ``ConfigurationError`` for a closure that does not run the runtime's ``backward``, for its gradients carry no
    scale, and for an optimizer that ignores its closure.
    """
    evaluation = _Evaluation(scaler, optimizer, closure)
    before = None if _evaluates_first(optimizer) else _Snapshot(optimizer)
    try:
        step(evaluation, **kwargs)
    except _OverflowError as overflow:
        if before is not None:
            before.restore()
        return overflow.inspection
    if not evaluation.called:
        if before is not None:
            before.restore()
        raise ConfigurationError(
            f"{type(optimizer).__name__} did not call its closure, so that it stepped on gradients that nobody had "
            "unscaled; the step was taken back. Call backward() and step(optimizer) without a closure."
        )
    return CLEAN


class _OverflowError(Exception):
    """Leaves the optimizer's step from inside its closure."""

    def __init__(self, inspection: Inspection) -> None:
        super().__init__()
        self.inspection = inspection


class _Evaluation:
    """The user's closure, after which the gradients are unscaled."""

    def __init__(self, scaler: Scaler, optimizer: Optimizer, closure: Callable[[], Any]) -> None:
        self.scaler, self.optimizer, self.closure = scaler, optimizer, closure
        self.called = False

    def __call__(self) -> Any:
        self.called = True
        losses = self.scaler.losses
        with torch.enable_grad():
            loss = self.closure()
        if self.scaler.losses == losses:
            raise ConfigurationError(
                f"the closure given to {type(self.optimizer).__name__} ran no backward() of the runtime, so that its "
                "gradients are not scaled as this mode scales them: call runtime.backward(loss) in it"
            )
        inspection = self.scaler.unscale(self.optimizer)
        if inspection:
            raise _OverflowError(inspection)
        return loss


def _evaluates_first(optimizer: Optimizer) -> bool:
    """Whether the optimizer evaluates its closure once, before it changes anything: all of torch.optim but LBFGS."""
    return type(optimizer).__module__.startswith("torch.optim.") and not isinstance(optimizer, LBFGS)


class _Snapshot:
    """Parameters and state of an optimizer, to be put back."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.values = [(p, p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]
        self.state = {p: copy.deepcopy(state) for p, state in optimizer.state.items()}

    def restore(self) -> None:
        """Put them back."""
        with torch.no_grad():
            for parameter, value in self.values:
                parameter.copy_(value)
        self.optimizer.state.clear()
        self.optimizer.state.update(self.state)
