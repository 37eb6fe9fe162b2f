"""Judge a low-precision run call by call: screen against a shared reference, replay only what does not pass.

A call whose output agrees with an FP64 run that started further upstream, to within the representability floor, cannot
be failing on its own inputs either: its own error would have to cancel the inherited one. So one FP64 run screens a
whole subtree, and only the calls that do not pass are replayed on their own actual inputs; a replay is then the
reference of everything inside that call. Perturbed runs are made only where a replay does not pass.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from precision_runtime.auditing.executing.calls import anchored, covers, is_wrapper, match
from precision_runtime.auditing.executing.failing import first_line
from precision_runtime.auditing.executing.noise import SINGLE, Reach
from precision_runtime.auditing.executing.recorder import Call
from precision_runtime.auditing.executing.references import Sample
from precision_runtime.auditing.executing.runs import Run
from precision_runtime.auditing.executing.uses import Place
from precision_runtime.auditing.executing.worlds import Worlds
from precision_runtime.auditing.judging.borders import Borders
from precision_runtime.auditing.judging.excess import Judgement, Pair
from precision_runtime.auditing.judging.replays import Replays, Yardstick
from precision_runtime.auditing.judging.replicas import FEW, Replicas, replicated
from precision_runtime.auditing.judging.screened import Screened, Site
from precision_runtime.auditing.judging.screening import Screening
from precision_runtime.auditing.judging.sheet import WIDE, Sheet, Verdict, input_name, values

# Perturbed runs: one where the answer is clear (the rms over many elements is as good from one run as from many), more
# before anything is called a failure.
SAMPLES = (1, 4, 16)
MARGINS = (0.5, 0.75, 1.0)  # a score below this share of the limit is clear after so many runs
# A decision (an expert, an argmax, the side of a ReLU) that the mode flips on a near tie may flip in one of a thousand
# runs disturbed by u: rounding errors have tails, and there are many near ties. So before anything is called a failure,
# runs disturbed by WIDE u are made, and their spread over WIDE is granted where it is larger. For everything smooth it
# is the same spread.
WIDE_SAMPLES = 12
# Under autocast an FP32 island costs nothing, so a function this much steeper than its operands' rounding is a
# finding there: every repaired or innocent module measured is at most 16.8, every steep defect at least 32.7.
AMPLIFICATION = 24.0
# A steep function is steep for the smallest disturbance, too; a decision that flips on a near tie is not. The excess
# has passed, so the error is at most 4 times what disturbance explains: runs disturbed by u / 256 must (in the median)
# move the result by a fourth of AMPLIFICATION. Healthy mixtures of experts: 2.3 to 3.0; a Gaussian process: 17.
NARROW = 1 / 256
NARROW_SAMPLES = 4
# An island in FP32 has to help. Where runs disturbed as FP32 rounds move the result by more than this share of the
# error, nearly all digits are lost in FP32, too: such a function is chaotic, and that is its nature. Measured: steep
# defects 2e-6 to 2e-4, a chaotic map 2e-3 after 20 steps (other rules let it pass), 0.11 after 30 and 0.9 after 60.
HELPLESS = 1 / 16
# The result of a norm, or of a module inside, is no operand of the function. Its rounding is granted, as a deep model
# has many and a norm's is the same for a whole row; but a formula that turns it into more than AMPLIFICATION roundings
# of its own result is unstable by definition (boxes beside an offset of 640 pixels a class, which is subtracted again;
# a total that runs far above what is left of it): the function is not as steep as that in what it was given.
BARE_SAMPLES = 4


class Sampler(Protocol):
    """Makes perturbed runs."""

    def __call__(self, number: int, width: float, reach: Reach = Reach.ALL) -> Sample:
        """The run of this number, disturbed by ``width`` u."""


def bare_excess(entry: Pair, bare: Judgement) -> float:
    """The excess where runs disturbed from outside only gave ``bare``: AMPLIFICATION roundings are granted besides."""
    if entry.decision or bare.settled or not 0.0 < bare.excess < math.inf:
        return 0.0
    return entry.rms_error / math.hypot(entry.rms_error / bare.excess, AMPLIFICATION * entry.u * entry.rms_reference)


class Judge:
    """Walks the calls of a low-precision run and collects verdicts (see the module's docstring)."""

    def __init__(
        self, worlds: Worlds, low: Run, yardstick: Yardstick, true_grads: dict[int, torch.Tensor],
        uses: Mapping[int, Collection[Place]],
    ) -> None:  # fmt: skip
        self.worlds, self.low, self.yardstick = worlds, low, yardstick
        self.verdicts: list[Verdict] = []
        self.doubtful = False  # whether a result moves so much that the code may not do twice what it did once
        self.remarks: dict[tuple[str, str], str] = {}
        self.replays = Replays(worlds, low, yardstick, uses)
        self._flipped: set[int] = set()  # calls, by id, with a decision that fell otherwise than in FP64
        self.cover: Call | None = None  # the call that is the whole function
        self.true_grads = true_grads  # of the whole reference, by id of the low run's parameter
        self.reference = Run([])  # of the whole function, with what makes its perturbed runs
        self.sampler: Sampler | None = None
        self.replicas: Replicas | None = None
        self.borders: Callable[[], Borders | None] | None = None  # makes the run that explains backward passes
        self.decides = False  # whether the function decides something by rounded values, outside of all calls
        self._explaining: Borders | None = None
        self._open_backward = 0  # calls in what has not passed so far

    # -- the walk ---------------------------------------------------------------------------------------------------

    def visit(self, call: Call, twins: dict[int, Call], enclosing: Sampler) -> set[str]:
        """Judge one call and everything inside it; return the directions in which something failed.

        ``twins`` are the calls' counterparts in an FP64 run that started further upstream, whose perturbed runs
        ``enclosing`` makes.
        """
        if call.end < 0:
            return set()
        twin = twins.get(id(call))
        if is_wrapper(call):
            return self._visit_all(call.children, twins, enclosing)
        back = not self._explained(call)
        seen = self._screened(call, twin, back) if twin is not None else None
        if seen is not None and back and not self._all_pass(seen) and self._explain(call):
            back, seen = False, Screened({s: j for s, j in seen.judged.items() if s[0] == "forward"}, seen.apart)
        if seen is not None and not seen.apart and self._all_pass(seen):
            failed = self._visit_all(call.children, twins, enclosing)
            self._note(call, seen.judged, Sheet(), failed)
            return failed
        if seen is not None and twin is not None and not seen.apart and anchored(call, twin, back):
            failed = self._visit_all(call.children, twins, enclosing)
            sheet = self.sheet(call, twin, gradients=back)

            def within(number: int, width: float, reach: Reach = Reach.ALL) -> Sample:
                return enclosing(number, width, reach).inner[twin.name, twin.index]

            judged = self.decide(sheet, within, failed, call)
            return failed | self._note(call, judged, sheet, failed, within)
        screening = Screening(self.low, call.subtree(), self.yardstick, kept=[call])
        replay = self.replays.true(call, gradients=back, screening=screening)
        if replay is None:
            return self._visit_all(call.children, twins, enclosing)
        root = replay.calls[0]
        inner = match(call.subtree()[1:], replay.calls[1:])
        sheet = self.sheet(call, root, replay)
        sampler = functools.lru_cache(None)(functools.partial(self.replays.sample, call, gradients=back))
        failed = self._visit_all(call.children, inner, sampler)
        for sentence in sheet.apart:
            self.remarks.setdefault((call.name, "shape"), f"shape depends on values: {sentence}; not judged")
        judged = self.decide(sheet, sampler, failed, call)
        return failed | self._note(call, judged, sheet, failed, sampler)

    def whole(self, reference: Run, sheet: Sheet, samples: Sampler) -> set[str]:
        """Judge the whole function, after everything in it; ``samples`` makes its perturbed runs."""
        self.reference, self.sampler = reference, samples
        tops = [c for c in self.low.calls if c.parent is None]
        self.cover = tops[0] if len(tops) == 1 and not tops[0].name and covers(tops[0], self.low) else None
        twins = match(self.low.calls, reference.calls)
        failed = self._tops(tops, twins, sheet, samples)
        inside = any(v.failed and v.where == "backward" and v.call is not None for v in self.verdicts)
        if "backward" in failed and not inside and self._explaining is not None:
            # Sound stretches have not added up to a sound whole: each call is asked for itself.
            self.borders = self._explaining = None
            self.verdicts.clear()
            failed = self._tops(tops, twins, sheet, samples)
        return failed

    def _tops(self, tops: Sequence[Call], twins: dict[int, Call], sheet: Sheet, samples: Sampler) -> set[str]:
        failed: set[str] = set()
        for top in tops:
            if top is self.cover:  # the function is that module: judged as a whole below
                failed |= self._visit_all(top.children, twins, samples)
            else:
                failed |= self.visit(top, twins, samples)
        for sentence in sheet.apart:
            self.remarks.setdefault(("", "shape"), f"shape depends on values: {sentence}; not judged")
        judged = self.decide(sheet, samples, failed, None, threshold=1.0)
        return failed | self._note(None, judged, sheet, failed, samples)

    def _explained(self, call: Call) -> bool:
        return self._explaining is not None and self._explaining.explains(call)

    def _explain(self, call: Call) -> bool:
        """Whether the call's backward pass, which has not passed by itself, is explained by its parts.

        The run that tells costs as much as the reference: it is made when as much as half of that has not passed.
        """
        plain = self.low.differentiable and not self.low.second_order and not self.low.recomputed
        if self._explaining is None and self.borders is not None and plain:
            self._open_backward += len(call.subtree())
            if 2 * self._open_backward > len(self.low.calls):
                self._explaining, self.borders = self.borders(), None
        return self._explained(call)

    def _visit_all(self, calls: Sequence[Call], twins: dict[int, Call], enclosing: Sampler) -> set[str]:
        failed: set[str] = set()
        for call in calls:
            failed |= self.visit(call, twins, enclosing)
        return failed

    # -- deciding ---------------------------------------------------------------------------------------------------

    def decide(
        self, sheet: Sheet, sample: Sampler, failed: set[str], call: Call | None, threshold: float | None = None
    ) -> dict[Site, Judgement]:
        """Judge with as few perturbed runs as settle it; a bound up to ``threshold`` needs none.

        Tensors of few numbers are judged by replicas of the run, too (``call`` says where they are found).

        Where a perturbed run raises (code that checks its values), what is open stays unjudged, and a remark says so.
        """
        judged = sheet.judge(self.yardstick.limit)
        threshold = self.yardstick.limit if threshold is None else threshold
        open_ = {s for s, j in judged.items() if not j.settled and j.score > threshold}
        if not open_:
            return judged
        try:
            self._sampled(judged, open_, sheet, sample, failed)
        except Exception as error:
            self._note_raised(error)
            for site in open_:
                if judged[site].bound:
                    del judged[site]
            return judged
        if self.replicas is not None:
            few = {s: judged[s] for s in open_ if s in judged and s[0] not in failed}
            judged.update(replicated(self.replicas, call, sheet.only(few), few, self.yardstick.limit))
        return judged

    def _sampled(
        self, judged: dict[Site, Judgement], open_: set[Site], sheet: Sheet, sample: Sampler, failed: set[str]
    ) -> None:
        samples: list[Sample] = []
        for count, margin in zip(SAMPLES, MARGINS, strict=True):
            while len(samples) < count:
                samples.append(sample(len(samples), 1.0))
            again = sheet.only(open_).judge(self.yardstick.limit, samples)
            judged.update(again)
            small = {s for s in open_ if count == 1 and sheet.pairs[s].reference.numel() < FEW}
            open_ = small | {s for s in open_ if again[s].score > margin * self.yardstick.limit}
            # The parent of a failing call fails with it; its own figure need not be exact.
            if not open_ or (all(s[0] in failed for s in open_) and count > 1):
                return
        wide = [sample(n, WIDE) for n in range(WIDE_SAMPLES)]
        judged.update(sheet.only(open_).judge(self.yardstick.limit, samples, wide))
        runs = [*samples, *wide]
        chosen = [
            s
            for s in open_
            if not self._passes(judged[s]) and sheet.pairs[s].is_choice(values(runs, s, sheet.pairs[s]))
        ]
        judged.update(sheet.only(chosen).judge(self.yardstick.limit, runs))
        for site in self._exact_zeros(sheet.only(s for s in open_ if s[0] == "backward"), sample):
            del judged[site]
        for site in [s for s in open_ if s in judged and judged[s].bound and not judged[s].settled]:
            del judged[site]
            text = f"{site[1]}: every run on disturbed operands gives NaN; not judged"
            self.remarks.setdefault(("", f"sample {site}"), text)

    def _note_raised(self, error: Exception) -> None:
        text = f"a perturbed run raised {type(error).__name__}: {first_line(error)}; not judged"
        self.remarks.setdefault(("", "sample"), text)

    def _exact_zeros(self, sheet: Sheet, sample: Sampler) -> set[Site]:
        """The gradients that only FP64's own rounding keeps from being 0: there is nothing to be right about.

        Disturbed by u / 256 such a gradient moves by its own size; for one that has a value this would mean that u
        moves it by hundreds of times its size, and then no error could fail it.
        """
        if not sheet.pairs:
            return set()
        narrow = [sample(n, NARROW) for n in range(NARROW_SAMPLES)]
        return {s for s, p in sheet.pairs.items() if p.spread(values(narrow, s, p)) > 0.5 * p.rms_reference}

    def _passes(self, judgement: Judgement) -> bool:
        return judgement.score <= self.yardstick.limit

    def _all_pass(self, seen: Screened) -> bool:
        return all(self._passes(j) for j in seen.judged.values())

    def _note(
        self,
        call: Call | None,
        judged: dict[Site, Judgement],
        sheet: Sheet,
        failed: set[str],
        sample: Sampler | None = None,
    ) -> set[str]:
        out: set[str] = set()
        for where in ("forward", "backward"):
            entries = [j for s, j in judged.items() if s[0] == where]
            if not entries:
                continue
            verdict = Verdict(call, where, entries, consequence=where in failed)
            verdict.failed = verdict.score > self.yardstick.limit
            flips = any(j.decision and j.error > 0 for j in entries)
            if flips and call is not None:
                self._flipped.add(id(call))
            # Where a decision fell the other way the error says how far the alternatives lie apart, not how steep.
            # So does a product whose operands are rounded to 8 bits: to u it is steep, whatever the function.
            coarse = self.yardstick.products or any(
                c.moved for c in (self.low.calls if call is None else call.subtree())
            )
            flips = flips or any(id(c) in self._flipped for c in (self.low.calls if call is None else call.subtree()))
            if where == "forward" and where not in failed and sample is not None and not verdict.failed and not coarse:
                self._tipped(verdict, sheet, sample)
            if where == "forward" and sample is not None and not verdict.failed and not flips and not coarse:
                verdict.amplification = self._amplification(judged, sheet, sample)
                if verdict.amplification > 0.0 and not self.yardstick.mixed:
                    self._bare(verdict, sheet, sample)
            self.verdicts.append(verdict)
            if verdict.failed or (self.yardstick.mixed and verdict.amplification > 0.0):
                out.add(where)
        return out

    def _amplification(self, judged: dict[Site, Judgement], sheet: Sheet, sample: Sampler) -> float:
        """How many times steeper than its operands' rounding the function is, 0 where that is nothing to speak of."""
        share = self.yardstick.limit / 4.0
        steep = {
            site: judgement.error / (sheet.pairs[site].u * judgement.scale)
            for site, judgement in judged.items()
            if site[0] == "forward" and judgement.scale > 0 and not judgement.bound and not judgement.decision
        }
        steep = {site: value for site, value in steep.items() if value > AMPLIFICATION * share}
        if not steep:
            return 0.0
        self.doubtful = True
        for site, moves in self._moves(sheet, steep, sample, NARROW):
            entry = sheet.pairs[site]
            if moves[len(moves) // 2] < AMPLIFICATION / 4.0 * share * NARROW * entry.u * entry.rms_reference:
                del steep[site]
        if self.yardstick.mixed:
            for site, moves in self._moves(sheet, steep, sample, SINGLE / self.yardstick.u):
                if moves[0] > HELPLESS * judged[site].error:  # in every run: a near tie flips in some
                    del steep[site]
        return max(steep.values(), default=0.0)

    @staticmethod
    def _moves(sheet: Sheet, sites: Iterable[Site], sample: Sampler, width: float) -> list[tuple[Site, list[float]]]:
        """How far runs disturbed by ``width`` u move each result, the least first."""
        out: list[tuple[Site, list[float]]] = []
        for site in list(sites):
            entry = sheet.pairs[site]
            runs = [sample(n, width) for n in range(NARROW_SAMPLES)]
            out.append((site, sorted(entry.spread([v]) for v in values(runs, site, entry)) or [0.0]))
        return out

    def _bare(self, verdict: Verdict, sheet: Sheet, sample: Sampler) -> None:
        """Fail a steep call whose error only disturbed results of modules and norms inside it explain."""
        limit = self.yardstick.limit
        again = sheet.only(("forward", j.tensor) for j in verdict.judgements)
        bare = again.judge(limit, [sample(n, 1.0, Reach.OUTSIDE) for n in range(BARE_SAMPLES)])
        for number, before in enumerate(verdict.judgements):
            entry = sheet.pairs["forward", before.tensor]
            excess = bare_excess(entry, bare["forward", before.tensor])
            # A full mode has no float32 to go to: what not even a format of twice the digits has any of is nothing.
            nothing = self.yardstick.full and entry.u * before.error > before.scale
            if excess > limit and not nothing:
                verdict.judgements[number] = replace(
                    before, excess=excess, worst=entry.farthest(limit * entry.rms_error / excess),
                    note=f"the error is {excess:.3g} times what rounding the operands must cost: the rounding of a "
                    "value inside, of a module or a norm, is magnified so much, and not that of what goes in",
                )  # fmt: skip
                verdict.failed, verdict.reach = True, Reach.OUTSIDE
        if verdict.failed:
            verdict.amplification = 0.0

    def _tipped(self, verdict: Verdict, sheet: Sheet, sample: Sampler) -> None:
        """Fail a call whose decisions only the rounding of what decides has tipped, and not that of what goes in."""
        call = verdict.call or self.cover
        parts = [c for c in self.low.calls if c.parent is None] if call is None else [call, *call.children]
        # Further up, a decision is as likely to fall otherwise as where it is made, or where that is called.
        decides = any(any(c.trace.decisions) for c in parts) or (call is None and self.decides)
        if self.yardstick.full or not decides:
            return
        counts = {("forward", j.tensor) for j in verdict.judgements if j.decision and j.error > 0.0}
        share = self.yardstick.limit / 4.0 * AMPLIFICATION
        far = {
            ("forward", j.tensor)
            for j in verdict.judgements
            if not j.decision and not j.bound and j.scale > 0.0
            and j.error > share * sheet.pairs["forward", j.tensor].u * j.scale
            and not sheet.pairs["forward", j.tensor].is_of_few()
        }  # fmt: skip
        # A float result counts what was tipped by its square root, so the limit grants it 16 times as many.
        for sites, factor in ((far, 1.0), (counts, self.yardstick.limit)):
            self._tipped_at(sites, factor, verdict, sheet.only(sites), sample)

    def _tipped_at(self, sites: set[Site], factor: float, verdict: Verdict, sheet: Sheet, sample: Sampler) -> None:
        if not sites:
            return

        def results(number: int, width: float, reach: Reach = Reach.RESULTS) -> Sample:
            return sample(number, factor * width, reach)

        judged = sheet.judge(self.yardstick.limit)
        try:
            self._sampled(judged, set(sites), sheet, results, set())
        except (
            Exception
        ) as error:  # code that checks its values: what it is beside the runs that it lets through stands
            self._note_raised(error)
            return
        for number, before in enumerate(verdict.judgements):
            after = judged.get(("forward", before.tensor))
            if after is None or self._passes(after) or after.bound:
                continue
            told = after.note if after.decision else "decisions fall otherwise that rounding what goes in does not tip"
            note = f"{told}: the values that decide have been rounded once more"
            verdict.judgements[number] = replace(after, note=note)
            verdict.failed, verdict.reach = True, Reach.RESULTS

    # -- sheets -----------------------------------------------------------------------------------------------------

    def _screened(self, call: Call, twin: Call, gradients: bool) -> Screened:
        """What the call is beside its twin, by the values that the twin has, or by what was found when it had them."""
        sheet, seen = self.sheet(call, twin, gradients=gradients), twin.screened or Screened()
        judged = {s: j for s, j in seen.judged.items() if gradients or s[0] == "forward"}
        now = sheet.screen(self.yardstick.limit)
        return Screened(judged | now.judged, [*now.apart, *seen.apart])

    def sheet(self, call: Call, twin: Call, replay: Run | None = None, gradients: bool = True) -> Sheet:
        """The call beside its twin; its parameters' gradients beside the replay's, or (to screen) the whole run's."""
        sheet, step, scale = Sheet(), self.yardstick.step, self.low.scale
        if twin.screened is None:
            sheet.add_outputs(call.outputs, twin.outputs, self.yardstick.own_u(call, "forward"), step)
        if not gradients:
            return sheet
        if self.low.second_order:
            self.remarks["", "backward"] = "the code differentiates by itself; gradients are judged for the whole only"
            return sheet
        if call.name in self.low.leaky:
            self.remarks[call.name, "backward"] = (
                "gradients pass from call to call through a cache; not judged backward"
            )
            return sheet
        back = self.yardstick.own_u(call, "backward")
        inputs = twin.input_grads if replay is None else replay.input_grads
        for path, low in call.input_grads.items():
            sheet.add_gradient(input_name(path), low, inputs.get(path), back, step, scale)
        true = self.true_grads if replay is None else replay.parameter_grads
        for key, name in self.replays.owned.get(id(call), {}).items() if call.output_grads else ():
            sheet.add_gradient(name, self.low.parameter_grads.get(key), true.get(key), back, step, scale)
        return sheet

    # -- for explanations -------------------------------------------------------------------------------------------

    def replay_with(self, call: Call, buffers: dict[tuple[int, str], torch.Tensor]) -> dict[Site, Judgement] | None:
        """The call's forward judgements when the reference, too, uses the given buffers (bounds, no samples)."""
        run = self.replays.true(call, buffers)
        if run is None:
            return None
        sheet = self.sheet(call, run.calls[0], run)
        return sheet.only([s for s in sheet.pairs if s[0] == "forward"]).judge(self.yardstick.limit)

    def in_single(self, call: Call, round_back: bool) -> float | None:
        """The call's forward score when its module runs in FP32 on the inputs that it really got; None if it cannot.

        ``round_back`` rounds the results to the dtypes that they had, as an FP32 island in the mode would.
        """
        run, true = self.replays.single(call), self.replays.true(call)
        if run is None or true is None:
            return None
        had = {path: t.dtype for path, t in call.outputs}
        results = [(p, t.to(had[p]) if round_back and p in had else t) for p, t in run.outputs]
        sheet = Sheet()
        sheet.add_outputs(results, true.calls[0].outputs, self.yardstick.own_u(call, "forward"), self.yardstick.step)
        return max((j.score for j in sheet.judge(self.yardstick.limit).values()), default=None)
