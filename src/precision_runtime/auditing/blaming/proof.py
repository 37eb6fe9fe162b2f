"""Run one failing call again in the mode, with a part of it computed otherwise, and judge it by the same yardstick."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from precision_runtime.auditing.blaming.dithering import Dithering
from precision_runtime.auditing.blaming.observer import Observer
from precision_runtime.auditing.executing.dispatch import LowWatch, TrueDouble
from precision_runtime.auditing.executing.lane import lane
from precision_runtime.auditing.executing.noise import Reach
from precision_runtime.auditing.executing.randomness import reseed
from precision_runtime.auditing.executing.recorder import Call, Recorder
from precision_runtime.auditing.executing.references import Sample
from precision_runtime.auditing.executing.runs import Run, execute, loss_gradient
from precision_runtime.auditing.executing.worlds import Worlds, clone
from precision_runtime.auditing.judging.judge import AMPLIFICATION, Judge, bare_excess
from precision_runtime.auditing.judging.screened import Site
from precision_runtime.auditing.judging.sheet import Sheet, Verdict, input_name
from precision_runtime.casting import TO, cast_tree
from precision_runtime.modes import Mode
from precision_runtime.strategies import Strategy
from precision_runtime.uncompiled import stance

# Perturbed runs that a proof is judged by: it must only tell a repaired call from a failing one.
SAMPLES = 8


@dataclass
class Stage:
    """What a run of the mode needs, and the judge that has judged one.

    ``watch`` and ``double`` make the dispatch modes of the low-precision run and of FP64.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mode: Mode
    strategy: Strategy
    seed: int
    worlds: Worlds
    parameters: Iterable[nn.Parameter]
    names: dict[int, str]  # of the parameters, by id
    low: Run
    judge: Judge
    watch: Callable[[], LowWatch]
    double: Callable[[], TrueDouble]

    @contextmanager
    def run(self, observer: Observer | None, autocast: bool) -> Iterator[tuple[LowWatch, Callable[[], Any]]]:
        """The low world with its canonical draws; yields the watch, and the context of the forward pass."""
        device = self.strategy.device.type
        watch = self.watch()

        @contextmanager
        def forward() -> Iterator[None]:
            with lane(self.strategy, watch) if autocast else ExitStack():
                if observer is not None:
                    observer.begin(watch.frames, self.double())
                yield

        with ExitStack() as stack:
            stack.enter_context(stance("force_eager"))  # compiled code shows no dispatch mode its ops
            stack.enter_context(self.worlds.low())
            stack.enter_context(torch.autocast(device, enabled=False))
            stack.enter_context(watch)
            if observer is not None:
                stack.enter_context(observer)
            yield watch, forward


def dithered(stage: Stage, where: str, number: int) -> Sheet | None:
    """The whole function once more, with roundings drawn by chance, beside FP64; None where it raises then."""
    scene = Scene(stage, Verdict(None, where, []))
    try:
        return scene.sheet(scene.run(Dithering(stage.seed, number)))
    except Exception:
        return None


@dataclass
class Scene:
    """One failing call (None: the whole function) in one direction."""

    stage: Stage
    verdict: Verdict
    autocast: bool = True
    _true: tuple[Run, dict[int, torch.Tensor]] | None = None
    _samples: list[Sample] = field(default_factory=list)

    @property
    def steep(self) -> bool:
        """Whether the call did not fail, but is too steep for autocast."""
        return not self.verdict.failed

    @property
    def line(self) -> float:
        """The largest figure that passes."""
        limit = self.stage.judge.yardstick.limit
        alone = self.verdict.worst.alone
        if alone is not None and not self.steep:  # found by replicas; the judged run by itself may be below the limit
            return min(limit, alone / 2.0)
        return AMPLIFICATION * limit / 4.0 if self.steep else limit

    def figure(self, observer: Observer | None = None) -> float:
        """How bad the call is: its score (its steepness, for a steep one) when ``observer`` interferes.

        Infinite where the run raises.
        """
        try:
            run = self.run(observer)
        except Exception:
            return math.inf
        return self._judged(run, observer)

    def run(self, observer: Observer | None = None) -> Run:
        """Run the call again, with ``observer`` looking on or interfering; raises what the code raises."""
        return self._whole(observer) if self.verdict.call is None else self._call(self.verdict.call, observer)

    # -- the runs ---------------------------------------------------------------------------------------------------

    def _whole(self, observer: Observer | None) -> Run:
        stage = self.stage
        with stage.run(observer, True) as (watch, forward):
            reseed(stage.seed)
            args, kwargs = cast_tree(clone((stage.args, stage.kwargs)), TO[getattr(torch, stage.mode.params)])
            if observer is not None:
                observer.depth = 1 if stage.judge.cover is None else 2
            recorder = Recorder(stage.worlds.names, stage.worlds, outputs=False, frames=watch.frames)
            return execute(
                stage.function, args, kwargs, recorder,
                cotangent=loss_gradient(stage.seed) if self._backward else None,
                parameters=stage.parameters, scales=(stage.low.scale,),
                forward_context=forward, backward_context=stage.strategy.backward,
            )  # fmt: skip

    def _call(self, call: Call, observer: Observer | None) -> Run:
        stage = self.stage
        with stage.run(observer, self.autocast) as (watch, forward):
            for (key, name), value in call.state.items():
                module = next(m for m in call.module.modules() if id(m) == key)
                (module._buffers if name in module._buffers else vars(module))[name] = clone(value)
            assert call.rng is not None
            call.rng.restore()
            args, kwargs = clone((call.args, call.kwargs))
            if observer is not None:
                observer.depth = 2
            inside = {id(m) for m in call.module.modules()}
            parts = {n: m for n, m in stage.worlds.names.items() if id(m) in inside}
            recorder = Recorder(parts, stage.worlds, outputs=False, frames=watch.frames)

            def incoming(path: str, output: torch.Tensor) -> torch.Tensor | None:
                grad = call.output_grads.get(path)
                return None if grad is None or grad.shape != output.shape else grad

            return execute(
                call.module, args, kwargs, recorder,
                cotangent=incoming if self._backward else None,
                parameters=call.module.parameters(),
                forward_context=forward, backward_context=stage.strategy.backward,
            )  # fmt: skip

    @property
    def _backward(self) -> bool:
        return self.verdict.where == "backward"

    # -- the judgement ----------------------------------------------------------------------------------------------

    def _judged(self, run: Run, observer: Observer | None) -> float:
        def value(t: torch.Tensor) -> torch.Tensor:
            """A result as wide as it was made: in FP64 it may fit where the mode's own dtype cannot hold it."""
            shadow = observer.shadows.get(t) if observer is not None else None
            return t if shadow is None else shadow

        sheet, where, yardstick = self.sheet(run, value), self.verdict.where, self.stage.judge.yardstick
        if sheet is None:
            return math.inf
        u = yardstick.own_u(self.verdict.call, where)
        wanted = {(where, j.tensor) for j in self.verdict.judgements if self.steep or j.score > yardstick.limit}
        sheet = sheet.only(wanted & set(sheet.pairs))
        if set(sheet.pairs) != wanted:
            return math.inf
        judged = sheet.judge(yardstick.limit)
        if self.steep:
            return max(j.error / (u * j.scale) if j.scale > 0 else 0.0 for j in judged.values())
        open_ = {site for site, j in judged.items() if not j.settled and j.score > 1.0}
        if open_:
            judged.update(sheet.only(open_).judge(yardstick.limit, self._perturbed(open_)))
        if self.verdict.reach is Reach.OUTSIDE:
            return max(bare_excess(sheet.pairs[site], judged[site]) for site in wanted)
        return max((j.score for j in judged.values()), default=math.inf)

    def sheet(self, run: Run, value: Callable[[torch.Tensor], torch.Tensor] = lambda t: t) -> Sheet | None:
        """The results of ``run`` beside FP64, in this scene's direction; None where there is no FP64 run."""
        truth = self._truth()
        if truth is None:
            return None
        true, gradients = truth
        stage, yardstick, sheet = self.stage, self.stage.judge.yardstick, Sheet()
        u = yardstick.own_u(self.verdict.call, self.verdict.where)
        if self.verdict.where == "forward":
            sheet.add_outputs([(path, value(t)) for path, t in run.outputs], true.outputs, u, yardstick.step)
            return sheet
        for path, grad in run.input_grads.items():
            sheet.add_gradient(
                input_name(path), value(grad), true.input_grads.get(path), u, yardstick.step, stage.low.scale
            )
        for key, name in self._owned().items():
            low = run.parameter_grads.get(key)
            low = None if low is None else value(low)
            sheet.add_gradient(name, low, gradients.get(key), u, yardstick.step, stage.low.scale)
        return sheet

    def _truth(self) -> tuple[Run, dict[int, torch.Tensor]] | None:
        if self._true is None:
            judge, call = self.stage.judge, self.verdict.call
            run = judge.reference if call is None else judge.replays.true(call)
            if run is None:
                return None
            self._true = run, judge.true_grads if call is None else run.parameter_grads
        return self._true

    def _owned(self) -> dict[int, str]:
        call = self.verdict.call
        return self.stage.names if call is None else self.stage.judge.replays.owned.get(id(call), {})

    def _perturbed(self, sites: set[Site]) -> list[Sample]:
        judge, call = self.stage.judge, self.verdict.call
        while len(self._samples) < SAMPLES:
            number = len(self._samples)
            if call is not None:
                self._samples.append(judge.replays.sample(call, number, 1.0, self.verdict.reach))
            else:
                assert judge.sampler is not None
                self._samples.append(judge.sampler(number, 1.0, self.verdict.reach))
        return self._samples
