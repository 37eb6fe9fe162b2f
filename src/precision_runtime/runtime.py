"""``PrecisionRuntime``: one object that puts models in a mode and trains them in it."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from torch import nn
from torch.optim import Optimizer

from precision_runtime.accelerators import name_of, resolve
from precision_runtime.automatic import placed
from precision_runtime.capability import support
from precision_runtime.casting import HALF_TO_SINGLE
from precision_runtime.checkpoints.description import KEYS, describe, refuse_other
from precision_runtime.counting.ledger import Entry, Ledger
from precision_runtime.environment import chosen_accelerator
from precision_runtime.errors import ConfigurationError, PrecisionError, UnsupportedError
from precision_runtime.modes import AUTO, Mode, parse_mode
from precision_runtime.options import Options, islands_of, mode_of, names_of, recipe_of, with_dtypes
from precision_runtime.planning.plan import Plan
from precision_runtime.scaling import NullScaler, Scaler, scaler_from
from precision_runtime.scaling.agreement import refuse_flat
from precision_runtime.setup import forwarding
from precision_runtime.setup.islands import islands_in, keep
from precision_runtime.setup.keeping import Island
from precision_runtime.setup.lazy import refuse_lazy
from precision_runtime.setup.moving import move, refuse_meta
from precision_runtime.setup.sentinel import answer_of, watch
from precision_runtime.setup.upcasting import warn_of_upcast
from precision_runtime.stepping.bypass import NoWatch, watch_for
from precision_runtime.stepping.closures import step_with_closure
from precision_runtime.stepping.gates import Gate
from precision_runtime.stepping.lost import LostUpdates
from precision_runtime.stepping.master import Masters, NoMasters
from precision_runtime.stepping.optimizers import warn_of_fatal
from precision_runtime.stepping.updates import Updates, updates_from
from precision_runtime.strategies import Strategy, strategy_for

if TYPE_CHECKING:
    from precision_runtime.checkpoints.changes import Changes
    from precision_runtime.checkpoints.probe import Probe

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
    bitsandbytes layers compute in, bfloat16 where not given; ``quantize_embeddings``: nn.Embedding is swapped, too, and
    frozen. ``weights_dtype``, ``recipe``: transformer-engine's.
    ``updates``: how half weights take small updates, "nearest" as torch does it, "stochastic" or "kahan" (``updates``).
    ``islands``: parts that stay wide in every mode, by exact names or globs of modules, parameters or buffers, as in
    ``{"*.rope": "32", "loss": "64"}``; names alone mean "32", and "auto" protects tables that a cast would harm.
    ``inputs``: "warn" or "raise" names each input that overflows or flushes to 0 when forward casts it (``sentinel``);
    "keep" does not look, and costs nothing.
    ``amp_backend="apex", amp_level="O2"`` is the mode apex-O2. Attributes: ``mode``, ``device``, ``strategy``,
    ``scaler``, ``support``.

    Raises ``UnknownNameError`` for an unknown mode or accelerator, ``UnsupportedError`` with the reason where this
    machine cannot run the mode, ``ConfigurationError`` for arguments that the mode cannot use. A mode is never turned
    into another; the mode "auto" is a question, whose answer is in ``mode`` and ``support.reason``.
    """

    def __init__(
        self,
        mode: object = None,
        accelerator: object = "auto",
        scaler: object = None,
        *,
        ignore_modules: str | Iterable[str] = (),
        compute_dtype: object = None,
        quantize_embeddings: bool = False,
        weights_dtype: object = None,
        recipe: object = None,
        updates: object = None,
        islands: object = (),
        inputs: str = "keep",
        amp_backend: object = None,
        amp_level: object = None,
    ) -> None:
        asked = mode_of(mode, amp_backend, amp_level)
        accelerator = chosen_accelerator(accelerator)
        name = name_of(accelerator)
        place = placed(asked, name)
        self.mode: Mode = with_dtypes(place.mode, compute_dtype, weights_dtype)
        options = Options(
            names_of(ignore_modules, "ignore_modules"),
            recipe_of(self.mode, recipe),
            *islands_of(islands),
            quantize_embeddings,
        )
        if quantize_embeddings and self.mode.weights in ("", "int8-training"):
            raise ConfigurationError(
                f"{self.mode} stores no weights in 4 or 8 bits: quantize_embeddings has no meaning in it; leave it out"
            )
        self.device: torch.device = resolve(accelerator)
        self.support = support(asked if self.mode is place.mode else self.mode, name, options.recipe)
        if not self.support.ok:
            raise UnsupportedError(f"{self.mode} cannot run on {self.support.accelerator}: {self.support.reason}")
        if scaler is not None and not self.mode.scaled:
            raise ConfigurationError(
                f"{self.mode} does not scale its loss, so scaler={type(scaler).__name__} has no meaning in it; "
                "leave it out, or use 16-mixed"
            )
        self.scaler: Scaler = scaler_from(scaler, self.device) if self.mode.scaled else NullScaler()
        self.strategy: Strategy = strategy_for(self.mode, self.device, options)
        self.masters = Masters() if self.mode.masters else NoMasters()
        self._models: list[weakref.ref[nn.Module]] = []
        self.updates: Updates = updates_from(updates, self.mode)
        self.inputs = answer_of(inputs)
        alone = self.scaler.enabled and self.scaler.alone
        self._watch: NoWatch = watch_for(alone, self.mode.masters, self.updates.name)
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._recorded: tuple[tuple[Entry, ...] | None, tuple[str, ...]] = None, ()
        self._meter: LostUpdates | None = None
        self._probe: Probe | None = None

    def __repr__(self) -> str:
        chosen = f" chosen by {self.support.mode}" if self.support.mode != self.mode.name else ""
        return f"PrecisionRuntime({self.mode.name!r}, accelerator={str(self.device)!r}){chosen}"

    def init_module(self) -> AbstractContextManager[None]:
        """Context in which modules are made on the device; when it ends their tensors are as ``setup`` leaves them.

        How forward runs is left to ``setup``, which the whole model needs as well: without it nothing is autocast, and
        inputs and outputs are not cast.

        With one seed weights are the same in every mode, but for its roundings. In 64-true the default dtype is float64
        inside, so that tables and complex tensors, also those that are no buffers, are made with all their digits.
        """
        return self.strategy.init_context()

    def plan(self, model: nn.Module, optimizer: Optimizer | None = None, *optimizers: Optimizer) -> Plan:
        """What ``setup`` would do to ``model`` and its optimizers: what is cast, lost, swapped, kept, and why.

        Changes nothing, makes no copy of the model; on the meta device it says which values are unknown. Raises as
        ``setup`` does for arguments that are none, islands that match nothing, or a model set up in another mode.
        """
        from precision_runtime.planning.rules import plan_for

        given = (*(() if optimizer is None else (optimizer,)), *optimizers)
        _check_arguments(model, given)
        refuse_lazy(model, self.mode)
        lane = self.mode.name, str(self.device)
        return plan_for(model, given, self.strategy, lane, scaled=self.scaler.enabled, wide=self.updates.wide)

    @overload
    def setup(self, model: M, *, strict: bool = False, allow: str | Iterable[str] = ()) -> M: ...
    @overload
    def setup(
        self, model: M, *optimizers: Optimizer, strict: bool = False, allow: str | Iterable[str] = ()
    ) -> tuple[Any, ...]: ...
    def setup(
        self, model: nn.Module, *optimizers: Optimizer, strict: bool = False, allow: str | Iterable[str] = ()
    ) -> Any:
        """Put ``model`` in the mode, in place, and on the device; return it, or ``(model, *optimizers)``.

        It is the same object with the same parameter objects, so tied weights stay tied and optimizers made before
        stay valid; state that they have collected follows its parameters. Only weights that are stored in 4 or 8 bits
        are new objects, frozen, and no longer the optimizers'. Doing it again changes nothing; in another
        mode it raises ``ConfigurationError``, as does anything that is no module or optimizer.

        A mode with autocast turns half parameters and buffers into float32 and warns of it (``PrecisionWarning``).

        ``strict`` refuses to lose more than roundings: every lossy row of the plan that no name or glob of ``allow``
        matches is listed in a ``LossyError``, and nothing has been changed.
        """
        _check_arguments(model, optimizers)
        refuse_lazy(model, self.mode)
        if strict:
            self.plan(model, *optimizers).refuse(allow)
        elif allow:
            raise ConfigurationError(f"allow={allow!r} names what strict=True may lose; give strict=True with it")
        forwarding.check(model, self.strategy)
        refuse_meta(model, self.device)
        if self.device.type == "xla":  # a move makes new parameters there, and what follows belongs to those
            move(model, self.device, optimizers)
        held = list(model.parameters()) if optimizers else []
        keep(model, self.strategy)
        warn_of_upcast(model, self.strategy)
        with self.masters.keeping(model):
            self.strategy.convert(model)
        swapped = {id(p) for p in held} - {id(p) for p in model.parameters()}
        move(model, self.device, optimizers)
        self.masters.attach(model)
        for optimizer in optimizers:
            _forget(optimizer, swapped)
            self.masters.adopt(optimizer, strictly=True)
            _follow_parameters(optimizer, self.updates.wide)
            self._meet(optimizer)
        forwarding.install(model, self.strategy)
        watch(model, self.strategy, self.inputs)
        if all(ref() is not model for ref in self._models):
            self._models.append(weakref.ref(model))
        return (model, *optimizers) if optimizers else model

    @property
    def islands(self) -> tuple[Island, ...]:
        """The parts of the models set up here that stay wide, and why each does."""
        return tuple(island for model in self._alive() for island in islands_in(model))

    def autocast(self) -> AbstractContextManager[Any]:
        """The mode's autocast, for what runs outside forward; null in modes without it."""
        return self.strategy.autocast()

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Run backward from ``loss``, scaled where the mode scales; the rest as ``Tensor.backward`` takes it.

        The step that follows is the runtime's: where ``optimizer.step()`` would do something else, it warns
        (``PrecisionWarning``), once.
        """
        if not isinstance(loss, torch.Tensor):
            raise ConfigurationError(
                f"backward takes the loss as a tensor with its graph, got {type(loss).__name__}; leave .item() to logs"
            )
        self._watch.backward(self._weights)
        self.scaler.open(self._optimizers)
        with self.strategy.backward():
            self.scaler.scaled(loss).backward(*args, **kwargs)
        self.masters.gather(self._optimizers)

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
        if optimizer not in self._optimizers:
            self._meet(optimizer)
        self.masters.gather((optimizer,))
        doomed = bool(self.scaler.unscale(optimizer))
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if clip_value is not None:
            if not doomed:
                torch.nn.utils.clip_grad_value_(parameters, clip_value)
            return None
        if doomed:
            return torch.tensor(float("inf"), device=self.device)
        assert max_norm is not None
        refuse_flat(parameters)
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

        Raises ``ConfigurationError`` where the mode scales its loss and nothing has been scaled since the last step.
        """
        if closure is None and isinstance(optimizer, torch.optim.LBFGS):
            raise ConfigurationError("LBFGS computes its gradients through a closure: step(optimizer, closure)")
        self.masters.refuse(closure)
        if optimizer not in self._optimizers:
            self._meet(optimizer)
        with self._watch.stepping():
            return self._step(optimizer, closure, kwargs)

    def _step(self, optimizer: Optimizer, closure: Callable[[], Any] | None, kwargs: dict[str, Any]) -> StepResult:
        self.masters.gather((optimizer,))
        if not self.scaler.enabled:
            self._advance(optimizer, *(() if closure is None else (closure,)), **kwargs)
            self.masters.spread(optimizer)
            self.strategy.stepped()
            return StepResult(skipped=False, scale=self.scaler.scale)
        if closure is not None:
            inspection = step_with_closure(self.scaler, optimizer, closure, partial(self._advance, optimizer), kwargs)
        else:
            inspection = self.scaler.unscale(optimizer)
            if not inspection:
                self._advance(optimizer, **kwargs)
        culprits = self._names(inspection.culprits) if inspection.culprits else ()
        if inspection.elsewhere:
            culprits = ("a parameter of another process",)
        self.scaler.close(optimizer, culprits)
        self.masters.spread(optimizer)
        return StepResult(bool(inspection), self.scaler.scale, culprits)

    def _advance(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        if self._meter is None:
            self.updates.step(optimizer, args, kwargs)
        else:
            self._meter.step(self.updates, optimizer, args, kwargs)

    def _meet(self, optimizer: Optimizer) -> None:
        if not hasattr(optimizer, "param_groups"):
            raise ConfigurationError(f"step and clip_gradients take an optimizer, got {type(optimizer).__name__}")
        self._optimizers.add(optimizer)
        self.updates.adopt(optimizer)
        self._watch.meet(optimizer)
        if not self.scaler.enabled and not self.updates.wide:
            warn_of_fatal(optimizer)

    def gate(self, scheduler: Any) -> Gate:
        """``scheduler`` behind a gate: its ``step`` does nothing where the optimizer's step was skipped."""
        return Gate(scheduler)

    def lost_updates(self) -> LostUpdates:
        """Context that counts, for each parameter, the updates that rounding lost in the steps inside."""
        return LostUpdates(self._names, partial(setattr, self, "_meter"))

    def gradients(
        self, outputs: torch.Tensor, inputs: Sequence[torch.Tensor], create_graph: bool = True, **kwargs: Any
    ) -> tuple[torch.Tensor | None, ...]:
        """The gradients of ``outputs`` with respect to ``inputs``, to compute a loss from: a gradient penalty.

        As ``torch.autograd.grad``, scaled on the way where the mode scales, so that none vanishes in half, and
        unscaled in float32 at least. Where they overflow so does the loss made from them, and its step is skipped.
        """
        scale = self.scaler.scale
        if scale != 1.0:
            outputs = _single(outputs) * scale
        with self.strategy.backward():
            found = torch.autograd.grad(outputs, inputs, create_graph=create_graph, **kwargs)
        return tuple(g if g is None or scale == 1.0 else _single(g) / scale for g in found)

    def ledger(self, *models: nn.Module) -> Ledger:
        """A ledger of the models set up here, or of ``models``: ``with rt.ledger() as ledger:`` around a step records
        in which dtype each product, convolution and reduction really ran.

        Outside of ``with`` it shows what was recorded last. It may be used on one step in a thousand; a step without it
        costs nothing.
        """
        return Ledger(
            *(models or self._alive()),
            lane=f"{self.mode} on {self.device}",
            tf32=self.mode.products == "tf32",
            before=self._recorded[0],
            unknown=self._recorded[1],
            done=self._keep_ledger,
        )

    def verify(self, low_precision: float = 0.9) -> float:
        """Raise ``PrecisionError`` where the step recorded last ran less than this share of its work in low precision,
        and name the modules that ran in float32; otherwise return the share. Declared islands do not count.

        Raises ``ConfigurationError`` where no step has been recorded.
        """
        return self.ledger().verify(low_precision)

    def _keep_ledger(self, ledger: Ledger) -> None:
        self._recorded = ledger.entries, ledger.unknown  # not the ledger, which keeps its models alive

    def _alive(self) -> tuple[nn.Module, ...]:
        return tuple(m for m in (ref() for ref in self._models) if m is not None)

    def probe(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Have checkpoints carry the outputs of ``model(*args, **kwargs)``, to be checked where they are loaded.

        The outputs are those of the weights at the time of saving, in ``eval()`` and without gradients. Raises whatever
        the model raises, and ``ConfigurationError`` where it returns no tensor.
        """
        from precision_runtime.checkpoints.probe import Probe

        probe = Probe(model, args, kwargs)
        probe.state(self.device)
        self._probe = probe

    def save(self, path: str | os.PathLike[str], model: nn.Module, *optimizers: Optimizer) -> None:
        """Write model, optimizers and runtime to the folder ``path`` (``checkpoints``); nothing is pickled."""
        from precision_runtime.checkpoints.carrying import save

        save(self, path, model, optimizers)

    def load(self, path: str | os.PathLike[str], model: nn.Module, *optimizers: Optimizer) -> Changes:
        """The inverse of ``save``, in the same mode, after ``setup``: the run goes on as if it had not stopped.

        Raises ``ConfigurationError`` for another mode's checkpoint or one that does not fit, before anything has been
        changed; ``ProbeError`` where the probe's outputs do not come out again.
        """
        from precision_runtime.checkpoints.carrying import load

        return load(self, path, model, optimizers)

    def load_across(
        self, path: str | os.PathLike[str], model: nn.Module, *optimizers: Optimizer, check: bool = True
    ) -> Changes:
        """Load a checkpoint that was saved in any mode into a model that is set up in this one; say what changed.

        Codes are dequantised where the model has none, FP8 scales and float32 masters go or begin, optimizers' state
        follows the parameters. The probe must come out within what the coarser of the two modes costs; ``check=False``
        does without. Raises as ``load`` does, but for the mode.
        """
        from precision_runtime.checkpoints.carrying import load_across

        return load_across(self, path, model, optimizers, check)

    def state_dict(self) -> dict[str, Any]:
        """Mode, recipe, switches, islands and the scaler's state, as builtins; where ``updates`` keep something beside
        weights, that, too, and the probe with its present outputs.
        """
        state = {"mode": self.mode.name, "scaler": self.scaler.state_dict(), **describe(self)}
        updates = self.updates.state_dict(self._named())
        if updates:
            state["updates"] = updates
        if self._probe is not None:
            state["probe"] = self._probe.state(self.device)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of ``state_dict``; the probe is left to ``load``. Raises as ``check_state`` does."""
        self.check_state(state)
        self.scaler.load_state_dict(state["scaler"])
        self.load_updates(state.get("updates", {}))

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ``ConfigurationError`` for the state of another mode or of other arguments, or a foreign one."""
        if not {"mode", "scaler"} <= set(state) <= {"mode", "scaler", "updates", "probe", *KEYS}:
            raise ConfigurationError(
                f"this is no state of a PrecisionRuntime, which has mode and scaler; it has {sorted(map(str, state))}"
            )
        if parse_mode(state["mode"], "a saved state").name != self.mode.name:
            chosen = f" ({self.support.reason})" if self.support.mode == AUTO.name else ""
            raise ConfigurationError(
                f"this state was saved in {state['mode']} and cannot be loaded in {self.mode}{chosen}; "
                f"make the runtime with PrecisionRuntime({state['mode']!r}), or train on from the model's and "
                "optimizer's states alone; load_across carries a saved checkpoint over"
            )
        refuse_other(state, self)

    def load_updates(self, state: Mapping[str, Any]) -> None:
        """Load what ``updates`` kept beside the weights of the models set up here."""
        self.updates.load_state_dict(state, self._named())

    def take_probe(self, probe: Probe | None) -> None:
        """Carry ``probe`` on from a checkpoint."""
        self._probe = probe

    def _names(self, parameters: Iterable[torch.Tensor]) -> tuple[str, ...]:
        """Paths in the models set up here."""
        known = {id(parameter): path for path, parameter in reversed(self._named().items())}
        return tuple(
            known.get(id(self.masters.behind(p)), f"a {tuple(p.shape)} parameter of no model set up here")
            for p in parameters
        )

    def _weights(self) -> Iterator[torch.Tensor]:
        return (parameter for model in self._alive() for parameter in model.parameters())

    def _named(self) -> dict[str, torch.Tensor]:
        """Parameters by path in the models set up here; with several models each path begins with the model's class."""
        models = self._alive()
        return {
            (f"{type(model).__name__}.{path}" if len(models) > 1 else path): parameter
            for model in models
            for path, parameter in model.named_parameters()
        }


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
    half = [g for g in gradients if g.dtype in HALF_TO_SINGLE]
    rest = [g for g in gradients if g.dtype not in HALF_TO_SINGLE]
    norms = [
        *(torch._foreach_norm(half, norm_type, dtype=torch.float32) if half else ()),
        *(torch._foreach_norm(rest, norm_type) if rest else ()),
    ]
    total: torch.Tensor = torch.linalg.vector_norm(torch.cat([n.to(device).reshape(1) for n in norms]), norm_type)
    return total


def _single(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in float32 at least."""
    return tensor.float() if tensor.dtype in HALF_TO_SINGLE else tensor


def _forget(optimizer: Optimizer, swapped: set[int]) -> None:
    """Take weights that quantised layers have replaced away: nothing trains them any more, and they are large."""
    for group in optimizer.param_groups if swapped else ():
        for parameter in [p for p in group["params"] if id(p) in swapped]:
            optimizer.state.pop(parameter, None)
        group["params"] = [p for p in group["params"] if id(p) not in swapped]


def _follow_parameters(optimizer: Optimizer, wide: bool) -> None:
    """Bring state collected before setup (momentum) to the dtype and device of its parameter; counters stay.

    ``wide``: the optimizer will compute in float32, and its state stays as wide as it is.
    """
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if torch.is_tensor(value) and value.is_floating_point() and value.shape == parameter.shape and value.dim():
                state[key] = value.to(parameter.device, value.dtype if wide else parameter.dtype)
