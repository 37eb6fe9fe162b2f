"""The audit itself: run the code in the mode, run it in FP64, judge every module call and the whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from precision_runtime import forwarding
from precision_runtime.accelerators import resolve
from precision_runtime.auditing.again import Again, moved_inputs, moved_parameters
from precision_runtime.auditing.blame import findings_of
from precision_runtime.auditing.borders import Borders
from precision_runtime.auditing.calls import moved_weights
from precision_runtime.auditing.discover import as_written, find_modules, name_of
from precision_runtime.auditing.dispatch import LowWatch, TrueDouble, plain_double
from precision_runtime.auditing.failing import error_finding, no_reference
from precision_runtime.auditing.judge import Judge
from precision_runtime.auditing.lane import lane
from precision_runtime.auditing.masking import Masking
from precision_runtime.auditing.noise import Exact, Noise
from precision_runtime.auditing.opblame import blame_op
from precision_runtime.auditing.originals import Originals
from precision_runtime.auditing.proof import Stage, dithered
from precision_runtime.auditing.randomness import reseed, seeded
from precision_runtime.auditing.recorder import Call, Exchange, Recorder
from precision_runtime.auditing.recurrent import noisy_states
from precision_runtime.auditing.references import Reference, References, Sample
from precision_runtime.auditing.repair import find_repair
from precision_runtime.auditing.replays import Yardstick
from precision_runtime.auditing.replicas import Replicas
from precision_runtime.auditing.runs import Run, execute, loss_gradient
from precision_runtime.auditing.sheet import Sheet, input_name, sample_of
from precision_runtime.auditing.storage import output_loss, rounded_layers, stored_layers, watching
from precision_runtime.auditing.worlds import Worlds, clone, widen_tree
from precision_runtime.automatic import placed
from precision_runtime.capability import support
from precision_runtime.casting import TO, cast_module, cast_tree
from precision_runtime.errors import AuditError, ConfigurationError, UnsupportedError
from precision_runtime.formats import FORMATS
from precision_runtime.islands import keep
from precision_runtime.modes import Mode, parse_mode
from precision_runtime.options import Options, islands_of
from precision_runtime.record import Finding, Remark, Report
from precision_runtime.strategies import Strategy, strategy_for
from precision_runtime.tree import leaves, map_tensors

# Without a scaler the incoming gradient of outputs that are no scalar loss is ours to choose, and users' means make it
# small: a gradient that only our sum over all outputs overflows is nobody's defect.
SUM_SCALES = (1.0, 2.0**-4, 2.0**-8, 2.0**-12, 1.0)
# Loss scales in the order in which a dynamic scaler comes to them from GradScaler's start of 2^16, four halvings at a
# time: which of them is the first that keeps gradients finite does not matter to within those 4 bits of range.
# GradScaler halves below 1, too, where a loss is as large as a sum over all outputs.
SCALES = (2.0**16, 2.0**12, 2.0**8, 2.0**4, *SUM_SCALES)

# A parameter's gradient this much smaller than the largest one is what FP64's own rounding (2^-53 of the terms, sums of
# some hundred of them) leaves of an exact zero, such as a query's gradient where there is one key.
EXACT_ZERO = 2.0**-46
# Replicas of the run are disturbed by other draws than perturbed runs of the reference.
_REPLICAS = 1_000


def audit(
    function: Callable[..., Any],
    *args: Any,
    mode: object,
    accelerator: object = "cpu",
    kwargs: Mapping[str, Any] | None = None,
    gradients: bool = True,
    budget: float = 2.0,
    seed: int = 0,
    originals: Originals | None = None,
    references: References | None = None,
    name: str | None = None,
    islands: object = (),
    repair: bool = False,
    options: Options | None = None,
) -> Report:
    """Run ``function`` in ``mode`` and in FP64, and judge what the precision cost. There is no tolerance to choose.

    ``function`` is a module, or any callable over modules and tensors; ``args`` and ``kwargs`` are its inputs, any
    nesting, of any dtype: they are the truth, and are cast as the mode casts. Modules come back as they were, also
    when user code raises. ``gradients`` judges the backward pass, too, where outputs carry gradients. ``budget`` is the
    number of bits that may be lost beyond what the mode must lose. Same seed, same verdict.

    ``originals`` are values from before a cast that has already happened; ``references`` share FP64 runs between modes.
    ``islands`` are parts kept wide, as ``PrecisionRuntime`` takes them; ``options`` is the rest of what a runtime was
    given (``runtime.strategy.options``), and has the islands where none are named here. ``repair`` looks, where the
    mode fails, for the smallest set of modules to keep in FP32 so that it holds (``report.repair``); each proposal
    costs an audit.

    Raises ``UnsupportedError`` where this machine cannot run the mode, ``AuditError`` where the code runs in float32
    but has no FP64 reference, and whatever the code itself raises when it does not even run in float32.
    """
    if not callable(function):
        raise ConfigurationError(
            f"audit() got {type(function).__name__} as the function to judge; pass a module or a callable, and its "
            "inputs after it"
        )
    if not budget >= 0:
        raise ConfigurationError(f"budget={budget!r} is not allowed: the bits that may be lost are a number from 0 up")
    parsed = parse_mode(mode, "audit(mode=...)")
    options = options or Options()
    lane = support(parsed, accelerator, options.recipe)
    if not lane.ok:
        raise UnsupportedError(f"{parsed} on {lane.accelerator} cannot be audited here: {lane.reason}")
    place, device = placed(parsed, lane.accelerator), resolve(lane.accelerator)
    parsed = place.mode
    pairs, automatic = islands_of(islands) if islands else (options.islands, options.auto_islands)
    originals, references = originals or Originals(), references or References(1)

    def judge(kept: Sequence[str] = (), explain: bool = True) -> Report:
        wide = tuple(sorted({**dict(pairs), **dict.fromkeys(kept, "float32")}.items()))
        strategy = strategy_for(parsed, device, replace(options, islands=wide, auto_islands=automatic))
        with seeded(seed, device):
            trial = _Trial(
                function, args, dict(kwargs or {}), parsed, strategy, lane.status, lane.accelerator,
                gradients, budget, seed, originals, references, name or name_of(function), explain,
            )  # fmt: skip
            if place.runs:
                trial.remarks.append(Remark("lane", place.reason))
            return trial.report()

    report = judge()
    if not repair or report.ok:
        return report
    roots = find_modules(function, args, dict(kwargs or {}))
    if len(roots) != 1:
        raise ConfigurationError(f"a repair is looked for in one model, and this function runs {len(roots)}")
    ((root, model),) = roots.items()
    found = find_repair(report, root, model, parsed, device.type, lambda kept: judge(kept, explain=False))
    return replace(report, repair=found)


class _Trial:
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
        if strategy.device.type != "cpu":
            self.args, self.kwargs = map_tensors(lambda t: t.to(strategy.device), (args, kwargs))
        self.remarks: list[Remark] = []
        self._masking = Masking(mode.format)
        self._copying = False
        self._products = FORMATS[mode.products].unit_roundoff if mode.family == "tf32" else 0.0

    def report(self) -> Report:
        with as_written(self.function, self.args, self.kwargs):
            worlds = Worlds(self.roots, self.originals)
            try:
                return self._report(worlds)
            finally:
                worlds.restore()

    def _report(self, worlds: Worlds) -> Report:
        for root in self.roots.values():
            self._convert(root)
        worlds.note_low()
        self._parameters = {id(p): p for m in worlds.names.values() for p in m._parameters.values() if p is not None}
        try:
            low = self._low(worlds)
        except Exception as error:
            return self._does_not_run(worlds, error)
        with worlds.low():
            stored, figures = stored_layers(worlds)
        self._alike, self._calls, self._scale = low.recomputed, low.calls, low.scale
        self._exact = Exact(widen_tree((self.args, self.kwargs)), getattr(torch, self.mode.compute))
        try:
            reference = self._reference(worlds)
        except Exception as error:
            raise self._no_reference(worlds, error) from error
        judge = self._judge(worlds, low, reference)
        stage = self._stage(worlds, low, judge)
        search = (lambda verdict: blame_op(stage, verdict)) if self.explain else None
        findings, remarks = findings_of(judge, search)
        findings = [*self._not_applied(low), *findings]
        self.remarks += remarks
        self.remarks += [Remark("not-judged", text, module) for (module, _), text in judge.remarks.items()]
        self.remarks += [Remark("not-judged", text, module) for module, text in judge.replays.failed.items()]
        self.remarks += [
            Remark(
                "known-defect",
                f"{d.summary} (torch {d.torch_versions}); computed rightly here, {factor:.0f} times "
                "one rounding otherwise",
                op=d.op,
            )
            for d, factor in self._watch.defects.values()
        ]  # fmt: skip
        fallbacks = reference.fallbacks | judge.replays.fallbacks
        if fallbacks:
            self.remarks.append(
                Remark(
                    "reference", f"no FP64 kernel for {', '.join(sorted(fallbacks))}: computed in FP32 in the reference"
                )
            )
        whole = max((v.score for v in judge.verdicts if v.call is None), default=0.0)
        # Only measured figures: a call that passed on its bound has lost less than the budget, nobody knows how much.
        # What failed counts through its finding, or not at all where it turned out to be harmless.
        scores = [v.measured for v in judge.verdicts if not v.failed] + [whole] + [f.excess for f in findings]
        return Report(
            subject=self.name,
            mode=self.mode.name,
            accelerator=self.accelerator,
            status=self.status,
            budget=self.budget,
            excess=max(scores, default=0.0),
            whole=whole,
            findings=tuple(findings),
            remarks=tuple(self.remarks),
            calls=len(low.calls),
            seed=self.seed,
            figures=figures | self._figures(worlds, low, reference),
            layers=tuple(stored + rounded_layers(worlds.names, self.mode, self._shares)),
        )

    def _figures(self, worlds: Worlds, low: Run, reference: Reference) -> dict[str, float]:
        figures = {"loss_scale": low.scale} if self.mode.scaled and low.differentiable else {}
        if worlds.unquantized:
            with worlds.true(worlds.unquantized), plain_double(), TrueDouble(masking=self._masking):
                reseed(self.seed)
                args, kwargs = widen_tree((self.args, self.kwargs))
                plain = execute(self.function, args, kwargs, Recorder({}, worlds))
            loss = output_loss(reference.run, plain)
            if loss is not None:
                figures["quantization_loss"] = loss
        return figures

    def _convert(self, root: nn.Module) -> None:
        if any(forwarding.is_set_up(m) for m in root.modules()):
            return
        keep(root, self.strategy, partly=len(self.roots) > 1)
        root._apply(lambda t: t.to(self.strategy.device))
        if self.mode.params != "float64":
            cast_module(root, _DOUBLE_TO_SINGLE)
        self.strategy.convert(root)

    # -- the runs ---------------------------------------------------------------------------------------------------

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
            recorder = Recorder(
                worlds.names, worlds, inputs=True, gradients=self.gradients, frames=self._watch.frames,
                snapshots=self._watch.snapshots,
            )  # fmt: skip
            return execute(
                self.function, args, kwargs, recorder,
                cotangent=loss_gradient(self.seed) if self.gradients else None,
                parameters=self._parameters.values(),
                scales=SCALES if self.mode.scaled else SUM_SCALES if self.mode.low else (1.0,),
                forward_context=self._lane, backward_context=self.strategy.backward,
            )  # fmt: skip

    def _lane(self) -> AbstractContextManager[None]:
        return lane(self.strategy, self._watch)

    def _true(
        self, worlds: Worlds, noise: Noise | None = None, exchange: Exchange | None = None
    ) -> tuple[Run, TrueDouble]:
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
            args, kwargs = noise.inputs(inputs, self._exact) if noise else inputs
            skip = self.function if isinstance(self.function, nn.Module) else None
            recorder = Recorder(
                worlds.names, worlds, outputs=noise is None, gradients=self.gradients and noise is None,
                perturb=noise, skip=skip, alike=self._alike,
                marks=mode.marks if noise else None, twins=self._calls if noise else (), scale=self._scale,
                exchange=exchange, snapshots=mode.snapshots,
            )  # fmt: skip
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
        return run, mode

    def _reference(self, worlds: Worlds) -> Reference:
        inputs = widen_tree((self.args, self.kwargs))
        found = self.references.find(
            self.name, self.seed, self.gradients, inputs, worlds.true_parameters, worlds.true_buffers
        )
        if found is not None:
            return found
        run, mode = self._true(worlds)
        names = _parameter_names(worlds)
        entry = Reference(
            self.name, self.seed, self.gradients, list(leaves(inputs)), list(worlds.true_parameters.values()),
            list(worlds.true_buffers.values()), run,
            {names[k]: g for k, g in run.parameter_grads.items() if k in names}, frozenset(mode.fallbacks),
        )  # fmt: skip
        self.references.keep(entry)
        return entry

    # -- judging ----------------------------------------------------------------------------------------------------

    def _judge(self, worlds: Worlds, low: Run, reference: Reference) -> Judge:
        format_ = self.mode.format
        # Within one step of the subnormal numbers a value is as right as the format can hold it.
        step = format_.smallest_subnormal
        yardstick = Yardstick(
            format_.unit_roundoff,
            step,
            self.limit,
            self.mode.autocast,
            self.seed,
            self._u_of,
            self._exact,
            self._alike,
            not self.mode.low,
            self._masking,
            self._products,
        )
        names = _parameter_names(worlds)
        true_grads = {k: reference.parameter_grads[n] for k, n in names.items() if n in reference.parameter_grads}
        judge = Judge(worlds, low, yardstick, true_grads)
        sheet = self._sheet(low, reference.run, true_grads, names)
        forward_u = self._u_of(None)

        def sample(number: int, width: float, norms: bool = True) -> Sample:
            # Decisions were rounded in other places in other modes.
            own = self.mode.name if self._products or any(c.moved for c in low.calls) else ""
            decisions = tuple(d for c in low.calls for d in c.trace.decisions)
            key = (width * forward_u, width * step, own, self._exact.key, decisions, norms)
            made = reference.samples.setdefault(key, [])
            while len(made) <= number:
                run, _ = self._true(worlds, yardstick.noise(forward_u, len(made), width, norms))
                made.append(sample_of(run, names))
            return made[number]

        stage = self._stage(worlds, low, judge)
        judge.borders = lambda: self._borders(worlds, judge)
        judge.replicas = Replicas(
            lambda number: self._again(worlds, yardstick, number), lambda where, number: dithered(stage, where, number)
        )
        judge.whole(reference.run, sheet, sample)
        return judge

    def _stage(self, worlds: Worlds, low: Run, judge: Judge) -> Stage:
        return Stage(
            self.function, self.args, self.kwargs, self.mode, self.strategy, self.seed, worlds,
            list(self._parameters.values()), _parameter_names(worlds), low, judge,
            lambda: LowWatch(getattr(torch, self.mode.compute), self._masking),
            lambda: TrueDouble(masking=self._masking),
        )  # fmt: skip

    def _sheet(self, low: Run, true: Run, true_grads: dict[int, torch.Tensor], names: dict[int, str]) -> Sheet:
        """The whole function's results and gradients beside the reference's."""
        sheet, step, back = Sheet(), self.mode.format.smallest_subnormal, self._u_of(None, "backward")
        sheet.add_outputs(low.outputs, true.outputs, self._u_of(None), step)
        for path, grad in low.input_grads.items():
            other = true.input_grads.get(path)
            if other is not None and other.shape == grad.shape:
                sheet.add_gradient(input_name(path), grad, other, back, step, low.scale)
        noise_floor = EXACT_ZERO * max((_rms(g) for g in true_grads.values()), default=0.0)
        for key, grad in low.parameter_grads.items():
            other = true_grads.get(key)
            if other is not None and (_rms(other) > noise_floor or noise_floor == 0.0):
                sheet.add_gradient(names[key], grad, other, back, step, low.scale)
        return sheet

    def _borders(self, worlds: Worlds, judge: Judge) -> Borders | None:
        """The FP64 run that goes on with the low-precision run's values at each border; None where it raises."""
        borders = Borders(judge.low, judge.yardstick)
        try:
            run, _ = self._true(worlds, exchange=borders)
        except Exception:  # it stands in for replays, which are made then
            return None
        borders.settle(run, judge.replays.owned)
        return borders

    def _again(self, worlds: Worlds, yardstick: Yardstick, number: int) -> Again | None:
        """The run once more on operands a little smaller; None where nothing can be moved, or the code raises."""
        noise = yardstick.noise(self._u_of(None), _REPLICAS + number, 1.0)
        before = self.args, self.kwargs, self._watch, self._shares
        given = moved_inputs((self.args, self.kwargs), noise, self._exact)
        true_p, low_p = moved_parameters(worlds, noise, getattr(torch, self.mode.compute))
        if not low_p and all(a is b for (_, a), (_, b) in zip(leaves(given), leaves(before[:2]), strict=True)):
            return None
        try:
            with worlds.standing(true_p, low_p):
                self.args, self.kwargs = given
                low = self._low(worlds)
                run, _ = self._true(worlds)
        except Exception:
            return None
        finally:
            self.args, self.kwargs, self._watch, self._shares = before
        sheet = self._sheet(low, run, run.parameter_grads, _parameter_names(worlds))
        return Again(Judge(worlds, low, yardstick, run.parameter_grads), sheet, worlds, true_p, low_p)

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

    def _not_applied(self, low: Run) -> list[Finding]:
        if not self.mode.low or not self._watch.products:
            return []
        target = getattr(torch, self.mode.compute)
        if target in self._watch.frames[0].dtypes:
            return []
        ran = ", ".join(sorted(str(d).removeprefix("torch.") for d in self._watch.products))
        if self.mode.autocast and self._watch.products == {torch.float32}:
            self.remarks.append(
                Remark(
                    "not-applied",
                    f"no op ran in {self.mode.compute}: the code switches autocast off around all of its products",
                )
            )
            return []
        if not self.mode.autocast and not self._parameters:
            return []  # a function that upcasts its inputs by itself
        return [
            Finding(
                kind="not-applied", where="forward", module="", op=None, lost_bits=0.0, excess=0.0,
                message=f"the mode was not applied: no op produced {self.mode.compute}, "
                f"every matrix product ran in {ran}",
            )
        ]  # fmt: skip

    # -- code that does not run -------------------------------------------------------------------------------------

    def _does_not_run(self, worlds: Worlds, error: Exception) -> Report:
        """The code raised in the mode: a finding where float32 works, otherwise the code's own error."""
        if isinstance(error, AuditError) or (self.mode.params == "float32" and not self.mode.autocast):
            raise error
        if self._plain_error(worlds) is not None:
            raise error
        finding = error_finding(error, worlds.names)
        return Report(
            self.name, self.mode.name, self.accelerator, self.status, self.budget, float("inf"), float("inf"),
            (finding,), tuple(self.remarks), 0, self.seed,
        )  # fmt: skip

    def _plain_error(self, worlds: Worlds) -> Exception | None:
        """What the code raises in plain float32, if anything."""
        single = {k: t.to(torch.float32) if t.dtype == torch.float64 else t for k, t in worlds.true_parameters.items()}
        buffers = {k: t.to(torch.float32) if t.dtype == torch.float64 else t for k, t in worlds.true_buffers.items()}
        try:
            with worlds.true(parameters=single, buffers=buffers), forwarding.suspended():
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

    def _no_reference(self, worlds: Worlds, error: Exception) -> Exception:
        return self._plain_error(worlds) or no_reference(self.name, self.mode, error)


def _rms(t: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(t)) / math.sqrt(max(1, t.numel()))


_DOUBLE_TO_SINGLE = {torch.float64: torch.float32, torch.complex128: torch.complex64}


def _parameter_names(worlds: Worlds) -> dict[int, str]:
    names: dict[int, str] = {}
    for path, module in worlds.names.items():
        for name, p in module._parameters.items():
            if p is not None:
                names.setdefault(id(p), f"{path}.{name}" if path else name)
    return names
