"""What the fixture ``precision_ctx`` gives to a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from precision_runtime import PrecisionRuntime, Report, environment
from precision_runtime.auditing import Originals, References
from precision_runtime.errors import NothingToSwapError
from pytest_precision.values import Values

if TYPE_CHECKING:
    from precision_runtime import StepResult


class PrecisionContext(Values):
    """One test in one lane: inputs with the same values in every mode, the runtime's verbs, and the judgement.

    ``mode`` and ``accelerator`` are names; ``device`` is where everything is; ``dtype`` is what parameters and inputs
    are kept in; ``runtime`` is the ``PrecisionRuntime``.
    """

    def __init__(
        self,
        mode: str,
        accelerator: str,
        budget: float = 2.0,
        gradients: bool = True,
        references: Callable[[int], References] = lambda number: References(),
        record: Callable[[Report], None] = lambda report: None,
        asked: bool = True,
    ) -> None:
        self._asked = asked  # whether the test names this mode; a mode that only the matrix tries may not apply
        self.accelerator = accelerator
        self.budget = budget
        self.gradients = gradients
        with environment.ignored():  # the lane decides
            self.runtime = PrecisionRuntime(mode, accelerator=accelerator)
        self.mode: str = self.runtime.mode.name  # of "auto": what it became
        super().__init__(self.runtime.device)
        self.dtype: torch.dtype = getattr(torch, self.runtime.mode.params)
        self._originals = Originals()
        self._references = references
        self._record = record
        self._checks = 0

    def check(
        self,
        f: Callable[..., Any],
        *args: Any,
        gradients: bool | None = None,
        budget: float | None = None,
        kwargs: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> Report:
        """Run ``f(*args, **kwargs)`` in the mode and in FP64, forward and backward, and judge every module call in it.

        ``f`` is a module, a function or a lambda over modules. ``gradients`` and ``budget`` (bits that may be lost
        beyond what the mode must lose) come from the marker, and then the ini, where they are not given. Returns the
        report; raises ``AssertionError`` with its text where something is found.
        """
        __tracebackhide__ = True
        from precision_runtime.auditing import audit

        self._checks += 1
        with self._applicable():
            report = audit(
                f,
                *args,
                mode=self.mode,
                accelerator=self.accelerator,
                kwargs=None if kwargs is None else dict(kwargs),
                gradients=self.gradients if gradients is None else gradients,
                budget=self.budget if budget is None else budget,
                originals=self._originals,
                references=self._references(self._checks),
                name=name,
            )
        return self._judge(report)

    def compare(self, actual: Any, reference: Any, budget: float | None = None) -> Report:
        """Judge a tensor (or a nest of them) against a reference by the mode's own rounding.

        Returns the report; raises ``AssertionError`` with its text where ``actual`` is further away than that explains.
        """
        __tracebackhide__ = True
        from precision_runtime.auditing import compare

        return self._judge(compare(actual, reference, mode=self.mode, budget=self.budget if budget is None else budget))

    def setup(self, model: nn.Module, *optimizers: torch.optim.Optimizer) -> Any:
        """Put the model in the mode, as ``PrecisionRuntime.setup`` does; the audit keeps its values from before.

        Returns the same model, or the model and its optimizers.
        """
        self._originals.remember(model)
        with self._applicable():
            result = self.runtime.setup(model, *optimizers)
        self._originals.settle(model)
        return result

    def init_module(self) -> AbstractContextManager[None]:
        """Modules made inside are made in the mode; the values that they are made with are the truth."""
        return self.runtime.init_module()

    def autocast(self) -> AbstractContextManager[Any]:
        """The mode's autocast, for what runs outside a model's forward; null in the other modes."""
        return self.runtime.autocast()

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """``loss.backward()``, scaled where the mode scales."""
        self.runtime.backward(loss, **kwargs)

    def clip_gradients(self, optimizer: torch.optim.Optimizer, **limits: Any) -> Any:
        """Clip by norm or value, unscaled first."""
        return self.runtime.clip_gradients(optimizer, **limits)

    def step(self, optimizer: torch.optim.Optimizer, **kwargs: Any) -> StepResult:
        """Step the optimizer, unless the scaler skips it; the result says so."""
        return self.runtime.step(optimizer, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """The runtime's state (the loss scaler)."""
        return self.runtime.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a runtime's state."""
        self.runtime.load_state_dict(dict(state))

    @contextmanager
    def ambient(self) -> Iterator[None]:
        """Inside, plain torch code runs in the mode: autocast, default dtype, and new tensors on the accelerator."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with nullcontext() if self.device.type == "cpu" else self.device, self.runtime.autocast():
                yield
        finally:
            torch.set_default_dtype(before)

    def __repr__(self) -> str:
        return f"<precision_ctx {self.mode} on {self.accelerator}>"

    @contextmanager
    def _applicable(self) -> Iterator[None]:
        """Skip the test where the matrix alone chose a mode that swaps layers which this model does not have."""
        __tracebackhide__ = True
        try:
            yield
        except NothingToSwapError as error:
            if self._asked:
                raise
            pytest.skip(f"{self.mode} on {self.accelerator}: {error}")

    def _judge(self, report: Report) -> Report:
        __tracebackhide__ = True
        self._record(report)
        if not report.ok:
            raise AssertionError(str(report))
        return report
