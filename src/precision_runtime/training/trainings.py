"""Makes the trainings of one examination: in the mode, in FP64, disturbed. All start from the same values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from precision_runtime.auditing.executing.dispatch import WIDE
from precision_runtime.auditing.executing.masking import Masking
from precision_runtime.auditing.executing.noise import Noise
from precision_runtime.auditing.executing.randomness import reseed
from precision_runtime.auditing.executing.worlds import widen_tree
from precision_runtime.casting import cast_module, cast_tree
from precision_runtime.errors import ConfigurationError
from precision_runtime.layers import QuantizedLayer
from precision_runtime.modes import Mode
from precision_runtime.runtime import PrecisionRuntime
from precision_runtime.stepping.updates import Updates
from precision_runtime.training.constants import Site
from precision_runtime.training.course import Course, Observer, Runner, Verbs, held, values
from precision_runtime.training.disturbance import Disturbed, Double
from precision_runtime.training.gatekeeper import Stand
from precision_runtime.training.hazards import hazards_of
from precision_runtime.training.lesson import Lesson
from precision_runtime.tree import map_tensors

_SINGLE = {torch.float64: torch.float32, torch.complex128: torch.complex64}


@dataclass(eq=False)
class LowRun:
    """A training in the mode, made ready, with what runs it."""

    runtime: PrecisionRuntime
    model: nn.Module
    optimizer: Any
    runner: Runner

    @property
    def hazards(self) -> list[str]:
        """What the optimizer's settings do in half; nothing where it steps on wider copies."""
        return [] if self.runtime.updates.wide else hazards_of(self.optimizer)


@dataclass(eq=False)
class Trainings:
    """Where trainings come from. ``truth`` are the values that all start from, before any cast."""

    lesson: Lesson
    mode: Mode
    accelerator: str
    device: torch.device
    options: Mapping[str, Any]  # what else the runtime is given
    masking: Masking
    truth: dict[str, torch.Tensor] = field(default_factory=dict)
    frozen: dict[str, torch.Tensor] = field(default_factory=dict)  # what quantised layers multiply by, in FP64
    fallbacks: set[str] = field(default_factory=set)
    constants: set[Site] = field(default_factory=set)  # results of modules that nothing had to round
    _made: list[nn.Module] = field(default_factory=list)  # kept, so that no id is used again
    _spare: nn.Module | None = None

    def check(self) -> None:
        """Make two models. Raises where they share parameters: training one would train the user's other."""
        first = self._new()
        self._spare = self._new()
        self.truth = values(first)
        shared = {id(p) for p in first.parameters()} & {id(p) for p in self._spare.parameters()}
        if shared or first is self._spare:
            raise ConfigurationError(
                "make_model() returned the same parameters twice, and every run trains its own: make the model inside "
                "make_model, or return copy.deepcopy(model)"
            )
        self._made = [first]

    def _new(self) -> nn.Module:
        if self._made:
            return self._made.pop()
        reseed(self.lesson.seed)
        model = self.lesson.make_model()
        if not isinstance(model, nn.Module):
            raise ConfigurationError(f"make_model() returned {type(model).__name__}; it is to return a torch.nn.Module")
        return model

    def _start(self, wide: bool) -> nn.Module:
        """A new model with the values that all start from."""
        model = self._spare or self._new()
        self._spare = None
        for path, t in held(model):
            value = self.truth.get(path)
            if value is not None and value.shape == t.shape:
                t.data = value.to(t.device, WIDE.get(value.dtype, value.dtype) if wide else value.dtype, copy=True)
        return model

    def _here(self, batch: Any) -> Any:
        return batch if self.device.type == "cpu" else map_tensors(lambda t: t.to(self.device), batch)

    def _optimizer(self, model: nn.Module) -> Any:
        reseed(self.lesson.seed)
        optimizer = self.lesson.make_optimizer(model)
        if not callable(getattr(optimizer, "step", None)):
            raise ConfigurationError(
                f"make_optimizer(model) returned {type(optimizer).__name__}; it is to return an optimizer, with step()"
            )
        return optimizer

    def low(
        self, observe: Callable[[nn.Module, Any, Updates], Observer] | None = None, *, mode: object = None,
        scaler: object = None, steps: int | None = None, updates: object = None,
    ) -> LowRun:  # fmt: skip
        """A training in the mode, or another one; ``observe`` makes what looks on."""
        options = dict(self.options) if mode is None else {}
        options |= {name: value for name, value in (("scaler", scaler), ("updates", updates)) if value is not None}
        for name in {"scaler", "updates"} & options.keys():
            options[name] = copy.deepcopy(options[name])  # no run is to see another's scale, or another's residuals
        runtime = PrecisionRuntime(mode or self.mode, accelerator=self.accelerator, **options)
        double = runtime.mode.params == "float64"
        model = self._start(wide=False)
        if not double:
            cast_module(model, _SINGLE)
        if runtime.mode.autocast:
            cast_module(model, runtime.strategy.module_table)  # or setup would warn of it in each of the runs
        model = runtime.setup(model)
        optimizer = self._optimizer(model)
        stepped = self._meet(runtime, model, optimizer)
        verbs = Verbs(
            runtime.backward,
            lambda *args: runtime.step(stepped, *args),
            self._here if double else lambda batch: cast_tree(self._here(batch), _SINGLE),
        )
        observer = None if observe is None else observe(model, optimizer, runtime.updates)
        if mode is None:
            for path, module in model.named_modules():
                if isinstance(module, QuantizedLayer) and not module.weight.requires_grad:
                    name = f"{path}.weight" if path else "weight"
                    self.frozen[name] = module.dequantized().to(torch.float64)
        return LowRun(runtime, model, optimizer, Runner(self.lesson, model, optimizer, verbs, observer, steps=steps))

    def _meet(self, runtime: PrecisionRuntime, model: nn.Module, optimizer: Any) -> Any:
        """Acquaint the runtime with the optimizer; return what it is to step."""
        if isinstance(optimizer, Optimizer):
            runtime.setup(model, optimizer)
            if runtime.mode.masters and self.lesson.step_fn is not None:  # who steps by himself knows of no masters
                optimizer.register_step_pre_hook(lambda own, args, kwargs: runtime.masters.gather((own,)))
                optimizer.register_step_post_hook(lambda own, args, kwargs: runtime.masters.spread(own))
            return optimizer
        if runtime.mode.masters:
            raise ConfigurationError(
                f"{runtime.mode} updates float32 masters, which only a torch.optim.Optimizer can be given; "
                f"make_optimizer(model) returned {type(optimizer).__name__}"
            )
        if self.lesson.step_fn is not None:
            return optimizer
        stand = Stand(model, optimizer)
        runtime.setup(model, stand)
        return stand

    def double(
        self,
        like: Course,
        noise: tuple[Noise, Noise] | None = None,
        walks: Mapping[str, torch.Tensor] | None = None,
        fresh: bool = False,
    ) -> Course:
        """A training in FP64, for as many steps as ``like`` has and skipping what it skipped. With noise for what is
        computed forward, and for gradients, it is disturbed (``fresh``: otherwise in each step); with ``walks`` so is
        what it stores.
        """
        model = self._start(wide=True).to(self.device)
        for path, weight in self.frozen.items():
            parameter = model.get_parameter(path)
            parameter.data = weight.clone()
            parameter.requires_grad_(False)
        observer: Double
        if noise is None:
            observer = Double(self.masking)
        else:
            observer = disturbed = Disturbed(
                self.masking, *noise, getattr(torch, self.mode.compute), walks, fresh, self.constants
            )
            disturbed.prepare(model)
        with observer.around(0):
            optimizer = self._optimizer(model)

        def step(*args: Any) -> Any:
            return optimizer.step(*args)  # looked up late: a gatekeeper will stand there

        verbs = Verbs(lambda loss: loss.backward(), step, lambda batch: widen_tree(self._here(batch)))
        course = Runner(self.lesson, model, optimizer, verbs, observer, like, like.steps).run()
        self.fallbacks |= observer.fallbacks
        return course
