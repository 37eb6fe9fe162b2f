"""An audit in a format that no dtype has: its numbers live in FP64 shadows beside a run in a half dtype.

The run is one of torch's own half modes, the carrier: it decides, as ever, what is cast to which dtype. But each op is
computed in FP64 on the shadows of its operands, and its result is rounded once to the format that stands for its
dtype: the emulated one for the carrier's half dtype, float32 for float32. That is what hardware does that multiplies in
half, adds in FP32 and rounds once. The judge then gets the shadows, and is the audit's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from precision_runtime.auditing.blaming.observer import Observer, Plan, Step
from precision_runtime.auditing.blaming.shadow import map_operands, written
from precision_runtime.auditing.executing.discover import find_modules
from precision_runtime.auditing.executing.dispatch import LowWatch, TrueDouble
from precision_runtime.auditing.executing.noise import Noise
from precision_runtime.auditing.executing.originals import Originals
from precision_runtime.auditing.executing.places import key_of, tensors_of
from precision_runtime.auditing.executing.randomness import reseed
from precision_runtime.auditing.executing.recorder import Call, Recorder
from precision_runtime.auditing.executing.references import Reference, References
from precision_runtime.auditing.executing.running import SCALES, SUM_SCALES
from precision_runtime.auditing.executing.runs import Run, execute, loss_gradient
from precision_runtime.auditing.executing.worlds import Worlds, clone, widen_tree
from precision_runtime.auditing.trial import Trial
from precision_runtime.casting import TO, cast_tree
from precision_runtime.errors import ConfigurationError
from precision_runtime.formats import FORMATS, Format
from precision_runtime.modes import MODES, Mode
from precision_runtime.ranging.grid import FULL_RANGE, round_to
from precision_runtime.ranging.quickly import run_trial
from precision_runtime.record import Report
from precision_runtime.setup.forwarding import is_set_up
from precision_runtime.tree import leaves, map_tensors

# What carries a format, by whether it has float32's range and by autocast: torch.finfo of the carrier's dtype, which
# code asks for the largest value that it may use as a mask, then has the range that is emulated.
_CARRIERS = MappingProxyType(
    {
        (True, False): "bf16-true",
        (True, True): "bf16-mixed",
        (False, False): "16-true",
        (False, True): "16-mixed",
    }
)
# Perturbed FP64 runs behind the expected error of an output.
_SAMPLES = 4


@dataclass(frozen=True)
class EmulatedMode(Mode):
    """A half mode whose half dtype stands for ``grid``, and which is judged as a mode of ``yardstick`` is."""

    grid: Format = FORMATS["float64"]
    yardstick: Format = FORMATS["float64"]

    @property
    def format(self) -> Format:
        """What the mode must lose goes by this format."""
        return self.yardstick


def carried(grid: Format, autocast: bool, yardstick: Format | None = None) -> EmulatedMode:
    """The mode that computes in ``grid``, everywhere or, with ``autocast``, where torch's autocast computes in half.

    It may lose what ``yardstick`` must lose, which is ``grid`` itself where nothing else is given.
    """
    carrier = _carrier(grid, autocast)
    values = {name: getattr(carrier, name) for name in Mode.__dataclass_fields__}
    return EmulatedMode(
        **{**values, "name": f"{grid.name}, {'mixed' if autocast else 'true'}"}, grid=grid, yardstick=yardstick or grid
    )


def emulate(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    grid: Format,
    *,
    autocast: bool,
    yardstick: Format | None = None,
    gradients: bool = True,
    budget: float = 2.0,
    seed: int = 0,
    originals: Originals | None = None,
    references: References | None = None,
    name: str | None = None,
) -> Report:
    """Audit ``function`` in ``grid``, emulated on the CPU; the report's status says so. ``yardstick``: see ``carried``.

    ``figures`` has "error", the relative error (L2) of the outputs, and "expected_error", what disturbed FP64 runs
    alone foretell of it. Raises as ``audit`` does, and ``ConfigurationError`` for
    models that are set up in a mode.
    """
    if any(is_set_up(part) for root in find_modules(function, args, kwargs).values() for part in root.modules()):
        raise ConfigurationError(
            "a model that is set up has a mode of its own, which no other format can be emulated in: pass the model as "
            "it was before PrecisionRuntime.setup"
        )
    mode = carried(grid, autocast, yardstick)
    return run_trial(
        _EmulatedTrial, function, args, kwargs, mode, _carrier(grid, autocast), "cpu", "emulated", gradients, budget,
        seed, originals, references, name,
    )  # fmt: skip


def _carrier(grid: Format, autocast: bool) -> Mode:
    return MODES[_CARRIERS[grid.emax >= FULL_RANGE, autocast]]


class _Emulating(Observer):
    """Computes every op in FP64 on shadows and rounds what it makes to the format that its dtype stands for."""

    def __init__(self, grids: Mapping[torch.dtype, Format]) -> None:
        super().__init__()
        self._grids = grids

    def give(self, t: torch.Tensor, exact: torch.Tensor) -> None:
        """Let ``t`` stand for ``exact``, rounded as its dtype says; its own values become the nearest that it has."""
        if t.is_floating_point() or t.is_complex():
            if t.is_complex() != exact.is_complex():
                return
            exact = self._rounded(exact, t.dtype)
            self.shadows.put(t, exact)
        if exact.is_complex() == t.is_complex() and exact.shape == t.shape:
            t.copy_(exact)

    def value(self, t: torch.Tensor) -> torch.Tensor:
        """What ``t`` stands for, as a copy: FP64 where it is floating."""
        with torch._C._DisableTorchDispatch():
            t = t.detach()
            return self.wide(t).clone() if t.is_floating_point() or t.is_complex() else t.clone()

    def follow(self, func: Any, plan: Plan, step: Step, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run one op as it is, for shapes and dtypes, and once in FP64 for the values."""
        targets = written(func, args, kwargs)
        if plan.fixed or plan.garbage:
            result = func(*args, **kwargs)
            with torch._C._DisableTorchDispatch():
                dropped = self.dropped_out(plan, args, result)
                for t in (*targets, *tensors_of(result)):
                    self.shadows.drop(t)
                if dropped is not None:
                    self.give(result[0], dropped)
            return result
        with torch._C._DisableTorchDispatch():
            copies = {id(t): self.wide(t).clone() for t in targets}
            exact = self.compute(func, *map_operands(lambda t: copies.get(id(t), self.wide(t)), args, kwargs))
        result = func(*args, **kwargs)
        with torch._C._DisableTorchDispatch():
            if exact is None:  # no FP64 kernel: the carrier's own values count
                for t in (*targets, *tensors_of(result)):
                    self.shadows.drop(t)
                return result
            for t in targets:
                if t.shape == copies[id(t)].shape:
                    self.give(t, copies[id(t)])
            mine = {key_of(t) for t in tensors_of((args, kwargs))}
            for t, value in zip(tensors_of(result), tensors_of(exact), strict=False):
                if key_of(t) not in mine and t.shape == value.shape:
                    self.give(t, value)
        return result

    def _rounded(self, exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        grid = self._grids.get(dtype)
        return exact if grid is None else round_to(exact, grid)


class _EmulatedRecorder(Recorder):
    """Keeps what tensors stand for instead of what they hold."""

    def __init__(self, emulating: _Emulating, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._emulating = emulating

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        known = len(self.calls)
        result = super()._before(module, args, kwargs)
        for call in self.calls[known:]:
            call.args, call.kwargs = map_tensors(self._emulating.value, (args, kwargs))
        return result

    def _results(self, call: Call, output: Any) -> list[tuple[str, torch.Tensor]]:
        return [(path, self._emulating.value(t)) for path, t in leaves(output)]


class _EmulatedTrial(Trial):
    mode: EmulatedMode

    def _low_once(self, worlds: Worlds) -> Run:
        half = getattr(torch, self.mode.compute)
        self._watch = LowWatch(half, self._masking)
        grids = {torch.float16: FORMATS["float16"], torch.bfloat16: FORMATS["bfloat16"], half: self.mode.grid}
        grids |= {torch.float32: FORMATS["float32"], torch.complex64: FORMATS["float32"]}
        emulating = _Emulating(grids)
        plain = torch.autocast(self.strategy.device.type, enabled=False)
        self._shares = None
        with worlds.low(), plain, self._watch, emulating:
            reseed(self.seed)
            args, kwargs = cast_tree(clone((self.args, self.kwargs)), TO[getattr(torch, self.mode.params)])
            self._seed_shadows(emulating, worlds, args, kwargs)
            recorder = _EmulatedRecorder(
                emulating, worlds.names, worlds, inputs=True, gradients=self.gradients, frames=self._watch.frames
            )
            emulating.begin(self._watch.frames, TrueDouble(masking=self._masking))
            run = execute(
                self.function, args, kwargs, recorder,
                cotangent=loss_gradient(self.seed) if self.gradients else None,
                parameters=self._parameters.values(),
                scales=SCALES if self.mode.scaled else SUM_SCALES,
                forward_context=self._lane, backward_context=self.strategy.backward,
            )  # fmt: skip
            emulating.active = False
        return _standing_for(run, emulating.value)

    def _seed_shadows(self, emulating: _Emulating, worlds: Worlds, args: Any, kwargs: Any) -> None:
        """The carrier's cast may have lost more than the emulated one would: start from the truth."""
        truth = widen_tree((self.args, self.kwargs))
        given = zip(leaves((args, kwargs)), leaves(truth), strict=True)
        pairs = [(low, true) for (_, low), (_, true) in given]
        pairs += [
            (worlds.low_parameters[k], true) for k, true in worlds.true_parameters.items() if k in worlds.low_parameters
        ]
        by_id = {id(m): m for m in worlds.names.values()}
        for (key, name), true in worlds.true_buffers.items():
            low = by_id[key]._buffers.get(name)
            if low is not None:
                pairs.append((low, true))
        with torch._C._DisableTorchDispatch(), torch.no_grad():
            for low, true in pairs:
                if (low.is_floating_point() or low.is_complex()) and low.shape == true.shape:
                    emulating.give(low.detach(), true)

    def _figures(self, worlds: Worlds, low: Run, reference: Reference) -> dict[str, float]:
        grid = self.mode.grid
        figures = super()._figures(worlds, low, reference)
        runs = [
            self._true(worlds, Noise(grid.unit_roundoff, self.seed, i, grid.smallest_subnormal))[0]
            for i in range(_SAMPLES)
        ]
        spread = [relative_error(run.outputs, reference.run.outputs) for run in runs]
        floor = grid.unit_roundoff / math.sqrt(3.0)
        figures["expected_error"] = math.sqrt(sum(s * s for s in spread) / _SAMPLES + floor * floor)
        figures["error"] = relative_error(low.outputs, reference.run.outputs)
        return figures


def relative_error(
    low: Sequence[tuple[str, torch.Tensor]], true: Sequence[tuple[str, torch.Tensor]]
) -> float:  # fmt: skip
    """The error of all floating outputs together, relative to the reference (L2); inf where one is not finite."""
    theirs = dict(true)
    off = size = 0.0
    for path, t in low:
        reference = theirs.get(path)
        if reference is None or reference.shape != t.shape or not reference.is_floating_point():
            continue
        off += float((t.to(torch.float64) - reference).square().sum())
        size += float(reference.square().sum())
    if not math.isfinite(off):
        return math.inf
    return math.sqrt(off / size) if size > 0.0 else 0.0


def _standing_for(run: Run, value: Callable[[torch.Tensor], torch.Tensor]) -> Run:
    """The run with its results and gradients replaced by what they stand for."""
    for call in run.calls:
        for grads in (call.input_grads, call.output_grads):
            grads.update({path: value(g) for path, g in grads.items()})
    return replace(
        run,
        outputs=[(path, value(t)) for path, t in run.outputs],
        input_grads={path: value(g) for path, g in run.input_grads.items()},
        parameter_grads={key: value(g) for key, g in run.parameter_grads.items()},
    )
