"""``PrecisionRuntime``: one object that puts models in a mode and trains them in it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import torch
from torch import nn
from torch.optim import Optimizer

from precision_runtime import forwarding
from precision_runtime.accelerators import resolve
from precision_runtime.capability import support
from precision_runtime.casting import HALF_TO_SINGLE
from precision_runtime.closures import step_with_closure
from precision_runtime.errors import ConfigurationError, PrecisionError, UnsupportedError
from precision_runtime.islands import islands_in, keep
from precision_runtime.keeping import Island
from precision_runtime.modes import Mode, parse_mode
from precision_runtime.options import Options, islands_of, mode_of, names_of, with_dtypes
from precision_runtime.scaling import NullScaler, Scaler, scaler_from
from precision_runtime.strategies import Strategy, strategy_for

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class StepResult:
    """What ``step`` did.

    ``skipped``: the optimizer did not step, because gradients overflowed (then no scheduler should step either).
    ``scale``: what the next loss will be multiplied by, 1.0 in modes without a scaler. ``culprits``: names of the
    parameters whose gradients were inf or NaN; looked for in modes with a scaler only.
    """

    skipped: bool
    scale: float
    culprits: tuple[str, ...] = ()


class PrecisionRuntime:
    """Runs models in a precision mode on an accelerator.

    ``scaler`` replaces the default loss scaler in a mode that scales its loss: a ``scaling.DynamicScaler`` or
    ``StaticScaler``, or torch's ``GradScaler`` or ``ShardedGradScaler``. ``ignore_modules``: exact names or globs of
    layers that quantised and FP8 modes leave as they are, with everything inside them. ``compute_dtype``: what
    bitsandbytes layers compute in, bfloat16 where not given. ``weights_dtype``, ``recipe``: transformer-engine's.
    ``islands``: parts that stay wide in every mode, by exact names or globs of modules, parameters or buffers, as in
    ``{"*.rope": "32", "loss": "64"}``; names alone mean "32", and "auto" protects tables that a cast would harm.
    ``amp_backend="apex", amp_level="O2"`` is the mode apex-O2. Attributes: ``mode``, ``device``, ``strategy``,
    ``scaler``, ``support``.

    Raises ``UnknownNameError`` for an unknown mode or accelerator, ``UnsupportedError`` with the reason where this
    machine cannot run the mode, ``ConfigurationError`` for arguments that the mode cannot use. A mode is never turned
    into another.
    """

    def __init__(
        self,
        mode: object = None,
        accelerator: object = "auto",
        scaler: object = None,
        *,
        ignore_modules: str | Iterable[str] = (),
        compute_dtype: object = None,
        weights_dtype: object = None,
        recipe: object = None,
        islands: object = (),
        amp_backend: object = None,
        amp_level: object = None,
    ) -> None:
        self.mode: Mode = with_dtypes(mode_of(mode, amp_backend, amp_level), compute_dtype, weights_dtype)
        options = Options(names_of(ignore_modules, "ignore_modules"), recipe, *islands_of(islands))
        self.device: torch.device = resolve(accelerator)
        self.support = support(self.mode, self.device)
        if not self.support.ok:
            raise UnsupportedError(f"{self.mode} cannot run on {self.support.accelerator}: {self.support.reason}")
        if scaler is not None and not self.mode.scaled:
            raise ConfigurationError(
                f"{self.mode} does not scale its loss, so scaler={type(scaler).__name__} has no meaning in it; "
                "leave it out, or use 16-mixed"
            )
        self.scaler: Scaler = scaler_from(scaler, self.device) if self.mode.scaled else NullScaler()
        self.strategy: Strategy = strategy_for(self.mode, self.device, options)
        self._models: list[weakref.ref[nn.Module]] = []
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()

    def __repr__(self) -> str:
        return f"PrecisionRuntime({self.mode.name!r}, accelerator={str(self.device)!r})"

    def init_module(self) -> AbstractContextManager[None]:
        """Context in which modules are made on the device; when it ends they are in the mode, as after ``setup``."""
        return self.strategy.init_context()

    @overload
    def setup(self, model: M) -> M: ...
    @overload
    def setup(self, model: M, *optimizers: Optimizer) -> tuple[Any, ...]: ...
    def setup(self, model: nn.Module, *optimizers: Optimizer) -> Any:
        """Put ``model`` in the mode, in place, and on the device; return it, or ``(model, *optimizers)``.

        It is the same object with the same parameter objects, so tied weights stay tied and optimizers made before
        stay valid; state that they have collected follows its parameters. Doing it again changes nothing; in another
        mode it raises ``ConfigurationError``, as does anything that is no module or optimizer.
        """
        _check_arguments(model, optimizers)
        forwarding.check(model, self.strategy)
        keep(model, self.strategy)
        self.strategy.convert(model)
        if any(t.device != self.device for t in (*model.parameters(), *model.buffers())):
            model.to(self.device)
        for optimizer in optimizers:
            _follow_parameters(optimizer)
            self._optimizers.add(optimizer)
        forwarding.install(model, self.strategy)
        if all(ref() is not model for ref in self._models):
            self._models.append(weakref.ref(model))
        return (model, *optimizers) if optimizers else model

    @property
    def islands(self) -> tuple[Island, ...]:
        """The parts of the models set up here that stay wide, and why each does."""
        models = [m for m in (ref() for ref in self._models) if m is not None]
        return tuple(island for model in models for island in islands_in(model))

    def autocast(self) -> AbstractContextManager[Any]:
        """The mode's autocast, for what runs outside forward; null in modes without it."""
        return self.strategy.autocast()

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Run backward from ``loss``, scaled where the mode scales; the rest as ``Tensor.backward`` takes it."""
        self.scaler.open(self._optimizers)
        with self.strategy.backward():
            self.scaler.scaled(loss).backward(*args, **kwargs)

    def clip_gradients(
        self,
        optimizer: Optimizer,
        max_norm: float | None = None,
        clip_value: float | None = None,
        norm_type: float = 2.0,
    ) -> torch.Tensor | None:
        """Unscale the gradients of ``optimizer`` (once) and clip them by norm or by value; the norm is returned.

        On a step that the scaler will skip nothing is clipped and nothing is raised; the norm is inf. In a mode without
        scaler a norm that is inf or NaN raises ``PrecisionError`` before any gradient is changed: clipping by it would
        make every gradient NaN. Exactly one of ``max_norm`` and ``clip_value`` is to be given.
        """
        if (max_norm is None) == (clip_value is None):
            raise ConfigurationError(f"clip_gradients needs max_norm or clip_value, got {max_norm=}, {clip_value=}")
        self._optimizers.add(optimizer)
        doomed = bool(self.scaler.unscale(optimizer))
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if clip_value is not None:
            if not doomed:
                torch.nn.utils.clip_grad_value_(parameters, clip_value)
            return None
        if doomed:
            return torch.tensor(float("inf"), device=self.device)
        assert max_norm is not None
        norm = _total_norm(parameters, norm_type)
        if not torch.isfinite(norm):
            names = self._names([p for p in parameters if p.grad is not None and not torch.isfinite(p.grad).all()])
            raise PrecisionError(
                f"the gradients' norm is {norm.item()} in {self.mode}; clipping by it leaves only NaN and 0. "
                + (f"Not finite: {', '.join(names)}" if names else "Every gradient is finite: the norm overflowed.")
            )
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def step(self, optimizer: Optimizer, closure: Callable[[], Any] | None = None, **kwargs: Any) -> StepResult:
        """Step ``optimizer``, or skip the step where scaled gradients overflowed, and say which.

        Several optimizers may step after one backward: the scale changes once. A ``closure``, which LBFGS needs and
        others take, computes the loss and calls the runtime's ``backward``; where one of its evaluations overflows the
        whole step is taken back.
        """
        if closure is None and isinstance(optimizer, torch.optim.LBFGS):
            raise ConfigurationError("LBFGS computes its gradients through a closure: step(optimizer, closure)")
        if not self.scaler.enabled:
            optimizer.step(*(() if closure is None else (closure,)), **kwargs)
            return StepResult(skipped=False, scale=self.scaler.scale)
        self._optimizers.add(optimizer)
        if closure is not None:
            inspection = step_with_closure(self.scaler, optimizer, closure, optimizer.step, kwargs)
        else:
            inspection = self.scaler.unscale(optimizer)
            if not inspection:
                optimizer.step(**kwargs)
        culprits = self._names(inspection.culprits) if inspection.culprits else ()
        if inspection.elsewhere:
            culprits = ("a parameter of another process",)
        self.scaler.close(optimizer, culprits)
        return StepResult(bool(inspection), self.scaler.scale, culprits)

    def state_dict(self) -> dict[str, Any]:
        """The mode and the scaler's state, as builtins."""
        return {"mode": self.mode.name, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of ``state_dict``. Raises ``ConfigurationError`` for another mode's state, or a foreign one."""
        if set(state) != {"mode", "scaler"}:
            raise ConfigurationError(
                f"this is no state of a PrecisionRuntime, which has mode and scaler; it has {sorted(map(str, state))}"
            )
        if parse_mode(state["mode"], "a saved state") != self.mode:
            raise ConfigurationError(
                f"this state was saved in {state['mode']} and cannot be loaded in {self.mode}; make the runtime with "
                f"PrecisionRuntime({state['mode']!r}), or train on from the model's and optimizer's states alone"
            )
        self.scaler.load_state_dict(state["scaler"])

    def _names(self, parameters: tuple[torch.Tensor, ...] | list[torch.Tensor]) -> tuple[str, ...]:
        """Paths in the models set up here; with several models each path begins with the model's class."""
        models = [m for m in (ref() for ref in self._models) if m is not None]
        known = {
            id(parameter): (f"{type(model).__name__}.{path}" if len(models) > 1 else path)
            for model in reversed(models)
            for path, parameter in model.named_parameters()
        }
        return tuple(known.get(id(p), f"a {tuple(p.shape)} parameter of no model set up here") for p in parameters)


def _check_arguments(model: object, optimizers: tuple[object, ...]) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"setup takes a torch.nn.Module first, got {type(model).__name__}")
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise ConfigurationError(f"setup takes optimizers after the model, got {type(optimizer).__name__}")


def _total_norm(parameters: list[torch.Tensor], norm_type: float) -> torch.Tensor:
    """The norm of all gradients as one vector, in float32 at least: squares of float16 overflow from 256 on."""
    gradients = [p.grad for p in parameters if p.grad is not None and p.grad.numel()]
    if not gradients:
        return torch.zeros(())
    device = gradients[0].device
    norms = [torch.linalg.vector_norm(g, norm_type, dtype=HALF_TO_SINGLE.get(g.dtype)).to(device) for g in gradients]
    total: torch.Tensor = torch.linalg.vector_norm(torch.cat([n.reshape(1) for n in norms]), norm_type)
    return total


def _follow_parameters(optimizer: Optimizer) -> None:
    """Bring state collected before setup (momentum) to the dtype and device of its parameter; counters stay."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if torch.is_tensor(value) and value.is_floating_point() and value.shape == parameter.shape and value.dim():
                state[key] = value.to(parameter.device, parameter.dtype)
