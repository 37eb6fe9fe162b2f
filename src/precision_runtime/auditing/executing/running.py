"""The runs of one trial: the code in the mode, in FP64, and in FP64 disturbed, on the same modules and inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from precision_runtime.auditing.executing.calls import moved_weights
from precision_runtime.auditing.executing.discover import find_modules
from precision_runtime.auditing.executing.dispatch import LowWatch, TrueDouble, plain_double
from precision_runtime.auditing.executing.lane import lane
from precision_runtime.auditing.executing.masking import Masking
from precision_runtime.auditing.executing.noise import Exact, Noise
from precision_runtime.auditing.executing.originals import Originals
from precision_runtime.auditing.executing.randomness import reseed
from precision_runtime.auditing.executing.recorder import Call, Exchange, Recorder
from precision_runtime.auditing.executing.recurrent import noisy_states
from precision_runtime.auditing.executing.references import References
from precision_runtime.auditing.executing.roundings import Roundings
from precision_runtime.auditing.executing.runs import Run, execute, loss_gradient
from precision_runtime.auditing.executing.storage import watching
from precision_runtime.auditing.executing.uses import Uses
from precision_runtime.auditing.executing.worlds import Worlds, clone, widen_tree
from precision_runtime.casting import TO, cast_module, cast_tree
from precision_runtime.errors import ConfigurationError
from precision_runtime.formats import FORMATS
from precision_runtime.modes import Mode
from precision_runtime.record import Remark
from precision_runtime.setup import forwarding
from precision_runtime.setup.islands import keep
from precision_runtime.setup.lazy import lazy_layers
from precision_runtime.strategies import Strategy
from precision_runtime.tree import map_tensors
from precision_runtime.uncompiled import stance

# Without a scaler the incoming gradient of outputs that are no scalar loss is ours to choose, and users' means make it
# small: a gradient that only our sum over all outputs overflows is nobody's defect. What overflows inside and reaches
# no parameter and no input, as that of a padded row, asks for no smaller one: others would lose their last digits.
SUM_SCALES = (1.0, 2.0**-4, 2.0**-8, 2.0**-12)
# Loss scales in the order in which a dynamic scaler comes to them from GradScaler's start of 2^16, four halvings at a
# time: what lies between the first that keeps gradients finite and the one before is looked for then.
# GradScaler halves below 1, too, where a loss is as large as a sum over all outputs.
SCALES = (2.0**16, 2.0**12, 2.0**8, 2.0**4, *SUM_SCALES)


_DOUBLE_TO_SINGLE = {torch.float64: torch.float32, torch.complex128: torch.complex64}


class Runs:
    """What a trial is about, and its runs. Nothing is judged here."""

    _parameters: dict[int, nn.Parameter]  # by id
    # What the runs in FP64 need to know of the run in the mode.
    _alike: frozenset[str]
    _calls: list[Call]
    _scale: float
    _roundings: Roundings | None
    _spared: frozenset[str]  # the function's inputs that the mode leaves in float32
    _exact: Exact

    def __init__(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], mode: Mode,
        strategy: Strategy, status: str, accelerator: str, gradients: bool, budget: float, seed: int,
        originals: Originals, references: References, name: str, explain: bool = True,
    ) -> None:  # fmt: skip
        self.explain = explain
        self.function, self.args, self.kwargs = function, args, kwargs
        self.mode, self.strategy, self.status, self.accelerator = mode, strategy, status, accelerator
        self.gradients, self.budget, self.seed = gradients, budget, seed
        self.originals, self.references, self.name = originals, references, name
        self.limit = 2.0**budget
        self.roots = find_modules(function, args, kwargs)
        for root in self.roots.values():
            for path, kind in lazy_layers(root).items():
                raise ConfigurationError(
                    f"{name} cannot be judged yet: {path!r} ({kind}) is a lazy layer, which gets its weights from the "
                    "first batch. Run the model once before"
                )
        if strategy.device.type != "cpu":
            self.args, self.kwargs = map_tensors(lambda t: t.to(strategy.device), (args, kwargs))
        self.remarks: list[Remark] = []
        self._masking = Masking(mode.format)
        self._copying = False
        self._products = FORMATS[mode.products].unit_roundoff if mode.family == "tf32" else 0.0

    def _convert(self, root: nn.Module) -> None:
        found = {forwarding.strategy_of(m).mode.name for m in root.modules() if forwarding.is_set_up(m)}
        if found - {self.mode.name}:
            raise ConfigurationError(
                f"{self.name} cannot be judged in {self.mode}: {type(root).__name__} is set up in "
                f"{' and '.join(sorted(found))} already, and what a cast has lost does not come back. Judge it in that "
                "mode, or pass a fresh model"
            )
        if found:
            return
        keep(root, self.strategy, partly=len(self.roots) > 1)
        root._apply(lambda t: t.to(self.strategy.device))
        if self.mode.params != "float64":
            cast_module(root, _DOUBLE_TO_SINGLE)
        self.strategy.convert(root)

    def _low(self, worlds: Worlds) -> Run:
        spilt = self._masking.spilt
        try:
            run = self._low_once(worlds)
        except RuntimeError as error:
            # Code that differentiates by itself (forces, penalties) does not run under no_grad.
            if self.gradients or "does not require grad" not in str(error):
                raise
            worlds.grad = True
            run = self._low_once(worlds)
        if self._watch.snapshots.lost():  # code that shows no dispatch mode its ops (compiled) wrote to an input
            self._copying = True
            run = self._low_once(worlds)
        # Rows that were settled before it was known that none may be: once more, with none.
        return run if self._masking.spilt == spilt else self._low_once(worlds)

    def _low_once(self, worlds: Worlds) -> Run:
        self._watch = LowWatch(getattr(torch, self.mode.compute), self._masking, self._copying)
        # An autocast around the audit is none of the mode's.
        plain = torch.autocast(self.strategy.device.type, enabled=False)
        with worlds.low(), plain, watching(self.mode) as self._shares, self._watch:
            reseed(self.seed)
            args, kwargs = cast_tree(clone((self.args, self.kwargs)), TO[getattr(torch, self.mode.params)])
            # In a full mode a table in the mode's own dtype is an operand, and every parameter is rounded to it.
            provenance = self._watch.provenance = worlds.provenance() if self.mode.low else None
            roundings = self._watch.roundings = Roundings(list(worlds.names.values())) if self.mode.autocast else None
            recorder = Recorder(
                worlds.names, worlds, inputs=True, gradients=self.gradients, frames=self._watch.frames,
                snapshots=self._watch.snapshots, provenance=provenance, roundings=roundings,
            )  # fmt: skip
            run = execute(
                self.function, args, kwargs, recorder,
                cotangent=loss_gradient(self.seed) if self.gradients else None,
                parameters=self._parameters.values(),
                scales=SCALES if self.mode.scaled else SUM_SCALES if self.mode.low else (1.0,),
                forward_context=self._lane, backward_context=self.strategy.backward,
            )  # fmt: skip
            worlds.unrounded = provenance.unrounded if provenance is not None and self.mode.autocast else frozenset()
            return run

    def _lane(self) -> AbstractContextManager[None]:
        return lane(self.strategy, self._watch)

    def _true(
        self, worlds: Worlds, noise: Noise | None = None, exchange: Exchange | None = None, uses: bool = True
    ) -> tuple[Run, TrueDouble]:
        """One FP64 run, disturbed by ``noise`` or not; ``uses`` notes which calls read a parameter, op by op."""
        moved = moved_weights(self._calls) if noise else {}
        used = worlds.true_parameters.keys() if noise else set()
        buffers = noise.buffers(worlds.true_buffers) if noise and not self.mode.low else None
        with (
            worlds.disturbed(noise or Noise(0.0, 0, 0), used, moved) as parameters,
            worlds.true(parameters=parameters, buffers=buffers),
            plain_double(),
            TrueDouble(noise, self._watch.frames[0].decisions, self._masking, self._products) as mode,
        ):
            reseed(self.seed)
            inputs = widen_tree((self.args, self.kwargs))
            args, kwargs = noise.inputs(inputs, self._exact, self._spared) if noise else inputs
            skip = self.function if isinstance(self.function, nn.Module) else None
            recorder = Recorder(
                worlds.names, worlds, outputs=noise is None, gradients=self.gradients and noise is None,
                perturb=noise, skip=skip, alike=self._alike,
                marks=mode.marks if noise else None, twins=self._calls if noise else (), scale=self._scale,
                exchange=exchange, snapshots=mode.snapshots,
                roundings=self._roundings if noise else None,
            )  # fmt: skip
            seen: Uses | None = None
            if uses and noise is None and self.gradients:
                seen = Uses(self._parameters.values(), recorder)
                mode.seen = seen.note
            plain = loss_gradient(self.seed)

            def incoming(path: str, output: torch.Tensor) -> torch.Tensor | None:
                grad = plain(path, output)
                return noise(grad) if noise is not None and grad is not None and grad.numel() > 1 else grad

            with noisy_states(worlds.names.values() if noise else (), noise or Noise(0.0, 0, 0)):
                run = execute(
                    self.function, args, kwargs, recorder,
                    cotangent=incoming if self.gradients else None,
                    parameters=self._parameters.values(),
                )  # fmt: skip
        run.uses = seen.found if seen is not None else {}
        return run, mode

    def _u_of(self, call: Call | None, where: str = "forward") -> float:
        """What one op costs in this call, relative to its result.

        Half modes compute each op in FP32 and round once: the mode's unit roundoff. The full modes have no wider format
        to compute in: functions are right to one unit in the last place (2u, what vector libraries such as SLEEF
        promise), and K terms of either sign, added one after the other, leave u sqrt(K / 2): partial sums grow as
        sqrt(k), so the roundings' variances add up to K^2 / 2 against a result of variance K. In 64-true the narrowest
        dtype that the code itself chose counts.
        """
        own = self.mode.format.unit_roundoff
        if self.mode.low:
            return own
        # The sums of the backward pass (over rows, for a weight) are only in the whole run's trace.
        trace = self._watch.frames[0] if call is None or where == "backward" else call.trace
        names = [str(d).removeprefix("torch.") for d in trace.dtypes] if self.mode.params == "float64" else []
        u = max([own, *(FORMATS[n].unit_roundoff for n in names if n in FORMATS)])
        return 2.0 * u * math.sqrt(1.0 + trace.terms / 2.0)

    def _plain_error(self, worlds: Worlds) -> Exception | None:
        """What the code raises in plain float32, if anything."""
        single = {k: t.to(torch.float32) if t.dtype == torch.float64 else t for k, t in worlds.true_parameters.items()}
        buffers = {k: t.to(torch.float32) if t.dtype == torch.float64 else t for k, t in worlds.true_buffers.items()}
        try:
            with worlds.true(parameters=single, buffers=buffers), forwarding.suspended(), stance("default"):
                reseed(self.seed)
                args, kwargs = cast_tree(clone((self.args, self.kwargs)), TO[torch.float32])
                recorder = Recorder({}, worlds)
                execute(
                    self.function, args, kwargs, recorder,
                    cotangent=loss_gradient(self.seed) if self.gradients else None,
                    parameters=self._parameters.values(),
                )  # fmt: skip
        except Exception as error:
            return error
        return None
