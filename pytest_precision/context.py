"""What the fixture ``precision_ctx`` gives to a test."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from precision_runtime import PrecisionRuntime, Report, environment
from precision_runtime.auditing import Originals, References
from precision_runtime.errors import ConfigurationError, NothingToSwapError
from precision_runtime.modes import MODES
from precision_runtime.options import with_dtypes
from pytest_precision.pasting import Origin
from pytest_precision.values import Values

if TYPE_CHECKING:
    from precision_runtime import Headroom, Ledger, StepResult
    from precision_runtime.planning.plan import Plan
    from precision_runtime.stepping.gates import Gate
    from precision_runtime.stepping.lost import LostUpdates
    from pytest_precision.pristine import Picture


_TRAINED_WITH = ("islands", "scaler", "updates")


class PrecisionContext(Values):
    """One test in one lane: inputs with the same values in every mode, the runtime's verbs, and the judgement.

    ``mode`` and ``accelerator`` are names; ``device`` is where everything is; ``dtype`` is what parameters and inputs
    are kept in; ``runtime`` is the ``PrecisionRuntime``. ``budget`` and ``judges_gradients`` are what checks go by.
    """

    def __init__(
        self,
        mode: str,
        accelerator: str,
        budget: float = 2.0,
        gradients: bool = True,
        references: Callable[[int], References] = lambda number: References(),
        record: Callable[[Report], None] = lambda report: None,
        measured: Callable[[Headroom], None] = lambda found: None,
        asked: bool = True,
        runtime: Mapping[str, Any] | None = None,
        bisect: bool = False,
        shrink: bool = False,
        origin: Origin | None = None,
    ) -> None:
        self._bisect, self._shrink = bisect, shrink
        self._origin = origin or Origin()
        self._given = dict(runtime or {})
        self._before: dict[int, Picture] = {}
        self._asked = asked  # whether the test names this mode; a mode that only the matrix tries may not apply
        self.accelerator = accelerator
        self.budget = budget
        self.judges_gradients = gradients
        with environment.ignored():  # the lane decides
            self.runtime = PrecisionRuntime(mode, accelerator=accelerator, **(runtime or {}))
        self.mode: str = self.runtime.mode.name  # of "auto": what it became
        chosen = {key: (runtime or {}).get(key) for key in ("compute_dtype", "weights_dtype")}
        self._judged = with_dtypes(MODES[self.mode], **chosen)
        super().__init__(self.runtime.device)
        self.dtype: torch.dtype = getattr(torch, self.runtime.mode.params)
        self._originals = Originals()
        self._references = references
        self._record = record
        self._measured = measured
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
        asked: dict[str, Any] = {
            "mode": self._judged,
            "accelerator": self.accelerator,
            "kwargs": None if kwargs is None else dict(kwargs),
            "gradients": self.judges_gradients if gradients is None else gradients,
            "budget": self.budget if budget is None else budget,
            "references": self._references(self._checks),
            "name": name,
            "options": self.runtime.strategy.options,
        }
        with self._applicable():
            report = audit(f, *args, originals=self._originals, **asked)
        if self._bisect and not report.ok:
            from pytest_precision.bisect import repaired

            report = repaired(report, f, args, asked, self._before, self._originals)
        if self._shrink and not report.ok:
            from pytest_precision.shrinking import shrunk

            report = shrunk(report, f, args, self.mode, asked, self._originals, self._origin)
        return self._judge(report)

    def explore(
        self,
        f: Callable[..., Any],
        *inputs: Any,
        low: float = -8.0,
        high: float = 8.0,
        max_examples: int = 50,
        seed: int = 0,
        gradients: bool | None = None,
        budget: float | None = None,
        kwargs: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> Report:
        """Search for inputs on which ``f`` fails, by Hypothesis, and judge each as ``check`` does.

        Each of ``inputs`` is a Hypothesis strategy, a shape (a tuple of sizes, for tensors with awkward values in
        ``low`` … ``high``), or a value that stays as it is. The same ``seed`` looks at the same inputs.
        Returns the report of the one that came nearest to failing; raises ``AssertionError`` where one fails, with the
        report on the smallest input that was found to fail in the same way, and a test to paste. Raises
        ``UnsupportedError`` with what to install where Hypothesis is missing.
        """
        __tracebackhide__ = True
        from pytest_precision.exploring import explore

        asked = self._asked_of(gradients, budget)
        with self._applicable():
            report, text = explore(
                f, inputs, low, high, max_examples, seed, dict(kwargs or {}), self._judged, name, asked, self._origin
            )
        return self._judge(report, text)

    def headroom(self, f: Callable[..., Any], *args: Any, at_least: int | None = None, **options: Any) -> Headroom:
        """Bits of scale that are left in this lane until something fails; see ``precision_runtime.headroom``.

        The number stands in the run's reports, and a baseline holds it. ``at_least``: raises ``AssertionError`` with
        the table where there are fewer; ``ConfigurationError`` where it is more than ``limit``, which nobody can tell.
        """
        __tracebackhide__ = True
        from precision_runtime.asked import whole
        from precision_runtime.ranging import headroom
        from precision_runtime.ranging.sweeping import TRIED, limit_of

        limit = limit_of(options.setdefault("limit", TRIED))
        if at_least is not None:
            allowed = f"limit={limit} powers of two are tried, so 0 to {limit} can be asked for; give a larger limit"
            whole("at_least", at_least, 0, limit, allowed)
        asked = self._asked_of(options.pop("gradients", None), options.pop("budget", None))
        with self._applicable():
            found = headroom(f, *args, mode=self._judged, **asked, **options)
        self._measured(found)
        if at_least is not None and found.bits < at_least:
            raise AssertionError(f"{at_least} bits of headroom are asked for, and there are {found.bits}:\n{found}")
        return found

    def train(
        self,
        make_model: Callable[[], nn.Module],
        make_optimizer: Callable[[Any], Any],
        loss_fn: Callable[[Any, Any], torch.Tensor],
        batches: Iterable[Any],
        *,
        budget: float | None = None,
        **options: Any,
    ) -> Report:
        """Train in the mode and in FP64 and judge where it has led, as ``precision_runtime.audit_training`` does.

        Returns the report; raises ``AssertionError`` with its text where something is found. Of the marker's
        ``runtime`` it takes ``islands`` and ``scaler``, and raises ``ConfigurationError`` for what it would ignore.
        """
        __tracebackhide__ = True
        from precision_runtime import audit_training

        ignored = sorted(set(self._given) - set(_TRAINED_WITH))
        if ignored:
            raise ConfigurationError(
                f"precision_ctx.train takes {', '.join(_TRAINED_WITH)} of the marker's runtime, not "
                f"{', '.join(ignored)}: its runtimes would not be what was asked for. Leave them out for this test"
            )
        budget = self.budget if budget is None else budget
        with self._applicable():
            report = audit_training(
                make_model, make_optimizer, loss_fn, batches,
                **{"mode": self._judged, "accelerator": self.accelerator, "budget": budget, **self._given, **options},
            )  # fmt: skip
        return self._judge(report)

    def compare(self, actual: Any, reference: Any, budget: float | None = None) -> Report:
        """Judge a tensor (or a nest of them) against a reference by the mode's own rounding.

        Returns the report; raises ``AssertionError`` with its text where ``actual`` is further away than that explains.
        """
        __tracebackhide__ = True
        from precision_runtime.auditing import compare

        return self._judge(compare(actual, reference, mode=self.mode, budget=self.budget if budget is None else budget))

    def setup(self, model: nn.Module, *optimizers: torch.optim.Optimizer, **strictness: Any) -> Any:
        """Put the model in the mode, as ``PrecisionRuntime.setup`` does; the audit keeps its values from before.

        ``strictness``: ``strict`` and ``allow``. Returns the same model, or the model and its optimizers.
        """
        self._originals.remember(model)
        if self._bisect and id(model) not in self._before:
            from pytest_precision.pristine import Picture

            self._before[id(model)] = Picture(model)
        with self._applicable():
            result = self.runtime.setup(model, *optimizers, **strictness)
        self._originals.settle(model)
        return result

    def init_module(self) -> AbstractContextManager[None]:
        """Modules made inside are made in the mode; the values that they are made with are the truth."""
        return self.runtime.init_module()

    def autocast(self) -> AbstractContextManager[Any]:
        """The mode's autocast, for what runs outside a model's forward; null in the other modes."""
        return self.runtime.autocast()

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """``loss.backward()``, scaled where the mode scales."""
        self.runtime.backward(loss, *args, **kwargs)

    def clip_gradients(self, optimizer: torch.optim.Optimizer, **limits: Any) -> Any:
        """Clip by norm or value, unscaled first."""
        return self.runtime.clip_gradients(optimizer, **limits)

    def step(
        self, optimizer: torch.optim.Optimizer, closure: Callable[[], Any] | None = None, **kwargs: Any
    ) -> StepResult:
        """Step the optimizer, unless the scaler skips it; the result says so."""
        return self.runtime.step(optimizer, closure, **kwargs)

    def gate(self, scheduler: Any) -> Gate:
        """``scheduler``, whose steps do nothing where the optimizer's step was skipped."""
        return self.runtime.gate(scheduler)

    def gradients(
        self, outputs: torch.Tensor, inputs: Sequence[torch.Tensor], **kwargs: Any
    ) -> tuple[torch.Tensor | None, ...]:
        """The gradients of ``outputs`` with respect to ``inputs``, to compute a penalty from; scaled on the way."""
        return self.runtime.gradients(outputs, inputs, **kwargs)

    def lost_updates(self) -> LostUpdates:
        """Context that counts, for each parameter, the updates that rounding lost in the steps inside."""
        return self.runtime.lost_updates()

    def plan(self, model: nn.Module, *optimizers: torch.optim.Optimizer) -> Plan:
        """What ``setup`` would cast, lose, swap and keep, and why; changes nothing."""
        return self.runtime.plan(model, *optimizers)

    def ledger(self, *models: nn.Module) -> Ledger:
        """Context that records in which dtype each product, convolution and reduction inside really ran."""
        return self.runtime.ledger(*models)

    def verify(self, low_precision: float = 0.9) -> float:
        """The share of the recorded work that ran in low precision; raises ``PrecisionError`` where it is less."""
        return self.runtime.verify(low_precision)

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

    def _asked_of(self, gradients: bool | None, budget: float | None) -> dict[str, Any]:
        """What every audit of this test is asked: the marker's wishes where the call has none."""
        return {
            "accelerator": self.accelerator,
            "gradients": self.judges_gradients if gradients is None else gradients,
            "budget": self.budget if budget is None else budget,
            "originals": self._originals,
            "options": self.runtime.strategy.options,
        }

    def _judge(self, report: Report, more: str = "") -> Report:
        __tracebackhide__ = True
        self._record(report)
        if not report.ok:
            raise AssertionError(f"{report}\n{more}" if more else str(report))
        return report
