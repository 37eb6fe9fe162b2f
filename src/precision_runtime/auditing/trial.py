"""One trial: the code runs in the mode and in FP64, and every module call and the whole are judged."""

from __future__ import annotations

import math

import torch

from precision_runtime.auditing.applied import not_applied
from precision_runtime.auditing.blaming.blame import findings_of
from precision_runtime.auditing.blaming.opblame import blame_op
from precision_runtime.auditing.blaming.proof import Stage, dithered
from precision_runtime.auditing.executing.calls import identical
from precision_runtime.auditing.executing.discover import as_written
from precision_runtime.auditing.executing.dispatch import LowWatch, TrueDouble, plain_double
from precision_runtime.auditing.executing.failing import error_finding, no_reference
from precision_runtime.auditing.executing.generators import Generators
from precision_runtime.auditing.executing.noise import Exact, Reach
from precision_runtime.auditing.executing.randomness import reseed
from precision_runtime.auditing.executing.recorder import Recorder
from precision_runtime.auditing.executing.references import Reference, Sample
from precision_runtime.auditing.executing.running import Runs
from precision_runtime.auditing.executing.runs import Run, execute
from precision_runtime.auditing.executing.storage import output_loss, rounded_layers, stored_layers
from precision_runtime.auditing.executing.uses import by_name
from precision_runtime.auditing.executing.worlds import Worlds, widen_tree
from precision_runtime.auditing.judging.again import Again, moved_inputs, moved_parameters
from precision_runtime.auditing.judging.borders import Borders
from precision_runtime.auditing.judging.judge import Judge
from precision_runtime.auditing.judging.replays import Yardstick
from precision_runtime.auditing.judging.replicas import Replicas
from precision_runtime.auditing.judging.screening import Screening
from precision_runtime.auditing.judging.sheet import Sheet, input_name, sample_of
from precision_runtime.errors import AuditError, ConfigurationError
from precision_runtime.record import Finding, Remark, Report
from precision_runtime.tree import leaves

# A parameter's gradient this much smaller than the largest one is what FP64's own rounding (2^-53 of the terms, sums of
# some hundred of them) leaves of an exact zero, such as a query's gradient where there is one key.
EXACT_ZERO = 2.0**-46
# Replicas of the run are disturbed by other draws than perturbed runs of the reference.
_REPLICAS = 1_000


class Trial(Runs):
    """One function on its inputs in one mode; ``report`` runs and judges it."""

    def report(self) -> Report:
        """Run and judge, and put everything back; raises what ``audit`` raises."""
        generators = Generators(self.function, self.args, self.kwargs, self.roots.values())
        with as_written(self.function, self.args, self.kwargs), generators.followed():
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
        self._something(low)
        with worlds.low():
            stored, figures = stored_layers(worlds)
        self._alike, self._calls, self._scale = low.recomputed, low.calls, low.scale
        self._roundings, self._spared = low.roundings, low.spared()
        # In 32-true every input is in the mode's dtype already: one that has more digits than half formats hold has
        # been rounded to it before. An input that is exact has few.
        exactly = "bfloat16" if self.mode.compute == "float32" else self.mode.compute
        self._exact = Exact(widen_tree((self.args, self.kwargs)), getattr(torch, exactly))
        self._yardstick = self._make_yardstick()
        try:
            reference = self._reference(worlds, low)
        except Exception as error:
            raise self._no_reference(worlds, error) from error
        judge = self._judge(worlds, low, reference)
        stage = self._stage(worlds, low, judge)
        search = (lambda verdict: blame_op(stage, verdict)) if self.explain else None
        findings, remarks = findings_of(judge, search)
        findings = [*self._not_applied(worlds), *findings]
        if findings or judge.doubtful:
            findings = self._differing(worlds, reference) or findings
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
        layers = (*stored, *rounded_layers(worlds.names, self.mode, self._shares))
        if self.mode.family == "float8" and not layers:
            none = f"no layer of it computes in {self.mode.products}: all of it ran in {self.mode.compute}"
            self.remarks.append(Remark("not-applied", none))
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
            layers=layers,
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

    def _reference(self, worlds: Worlds, low: Run) -> Reference:
        inputs = widen_tree((self.args, self.kwargs))
        found = self.references.find(
            self.name, self.seed, self.gradients, inputs, worlds.true_parameters, worlds.true_buffers, self._masking
        )
        if found is not None:
            return found
        # Values of calls that other modes will be held against have to stay; those of this mode alone need not.
        screening = None if self.references.size else Screening(low, low.calls, self._yardstick)
        run, mode = self._true(worlds, exchange=screening)
        names = _parameter_names(worlds)
        entry = Reference(
            self.name, self.seed, self.gradients, list(leaves(inputs)), list(worlds.true_parameters.values()),
            list(worlds.true_buffers.values()), run,
            {names[k]: g for k, g in run.parameter_grads.items() if k in names}, self._masking,
            frozenset(mode.fallbacks),
            by_name(run.uses, names),
        )  # fmt: skip
        self.references.keep(entry)
        return entry

    # -- judging ----------------------------------------------------------------------------------------------------

    def _make_yardstick(self) -> Yardstick:
        format_ = self.mode.format
        return Yardstick(
            format_.unit_roundoff,
            # Within one step of the subnormal numbers a value is as right as the format can hold it.
            format_.smallest_subnormal,
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

    def _judge(self, worlds: Worlds, low: Run, reference: Reference) -> Judge:
        yardstick = self._yardstick
        names = _parameter_names(worlds)
        true_grads = {k: reference.parameter_grads[n] for k, n in names.items() if n in reference.parameter_grads}
        uses = {key: reference.uses[name] for key, name in names.items() if name in reference.uses}
        judge = Judge(worlds, low, yardstick, true_grads, uses)
        sheet = self._sheet(low, reference.run, true_grads, names)
        forward_u = self._u_of(None)

        def sample(number: int, width: float, reach: Reach = Reach.ALL) -> Sample:
            # Decisions were rounded in other places in other modes.
            own = self.mode.name if self._products or any(c.moved for c in low.calls) else ""
            decisions = tuple(d for c in low.calls for d in c.trace.decisions)
            given = frozenset(names[k] for k in worlds.unrounded if k in names)
            tables = tuple((c.name, c.index, c.tables) for c in low.calls if c.tables)
            kept = self._spared, low.left()
            key = (
                width * forward_u, width * yardstick.step, own, self._exact.key, decisions, reach, given, tables, kept,
            )  # fmt: skip
            made = reference.samples.setdefault(key, [])
            while len(made) <= number:
                run, _ = self._true(worlds, yardstick.noise(forward_u, len(made), width, reach))
                made.append(sample_of(run, names))
            return made[number]

        stage = self._stage(worlds, low, judge)
        judge.decides = any(self._watch.frames[0].decisions)
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
            run, _ = self._true(worlds, exchange=borders, uses=False)
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
                run, _ = self._true(worlds, exchange=Screening(low, (), yardstick))  # its results count, not its calls
        except Exception:
            return None
        finally:
            self.args, self.kwargs, self._watch, self._shares = before
        sheet = self._sheet(low, run, run.parameter_grads, _parameter_names(worlds))
        return Again(Judge(worlds, low, yardstick, run.parameter_grads, run.uses), sheet, worlds, true_p, low_p)

    def _differing(self, worlds: Worlds, reference: Reference) -> list[Finding]:
        """The finding that stands for all others where the code does not do twice what it did once."""
        again, _ = self._true(worlds, uses=False)
        for (path, first), (_, second) in zip(reference.run.outputs, again.outputs, strict=False):
            if first.shape != second.shape or not identical(first, second):
                why = (
                    f"output{path} differs between two runs in FP64 on the same inputs and seeds, so nothing can be "
                    "said of its precision: it depends on the clock, on a count of calls, or on random numbers from "
                    "elsewhere than torch's, Python's and numpy's generators"
                )
                return [Finding("nondeterministic", "forward", "", None, math.inf, math.inf, why)]
        return []

    def _something(self, low: Run) -> None:
        """Say where there is nothing to judge, or only what happens inside."""
        if low.outputs:
            return
        hint = " (is a return missing?)" if low.gave == "NoneType" else ""
        gave = "None" if low.gave == "NoneType" else f"a {low.gave}"
        if not low.calls:
            raise ConfigurationError(
                f"audit() has nothing to judge: {self.name} gave {gave}{hint}, and no module ran. It judges tensors, "
                "numbers and arrays, in any nesting, that the function returns, and every call of a module"
            )
        self.remarks.append(
            Remark("not-judged", f"the function gave {gave}{hint}, so it is judged by the calls of modules in it alone")
        )

    def _not_applied(self, worlds: Worlds) -> list[Finding]:
        found = not_applied(self.mode, self._watch, worlds.low_parameters.values())
        if isinstance(found, Remark):
            self.remarks.append(found)
        return [found] if isinstance(found, Finding) else []

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

    def _no_reference(self, worlds: Worlds, error: Exception) -> Exception:
        return self._plain_error(worlds) or no_reference(self.name, self.mode, error)


def _rms(t: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(t)) / math.sqrt(max(1, t.numel()))


def _parameter_names(worlds: Worlds) -> dict[int, str]:
    names: dict[int, str] = {}
    for path, module in worlds.names.items():
        for name, p in module._parameters.items():
            if p is not None:
                names.setdefault(id(p), f"{path}.{name}" if path else name)
    return names
