"""One training examined: done in the mode and in FP64, and judged."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.optim import Optimizer

from precision_runtime.auditing.applied import not_applied
from precision_runtime.auditing.executing.dispatch import LowWatch
from precision_runtime.auditing.executing.failing import error_finding, no_reference
from precision_runtime.errors import ConfigurationError, UnknownNameError, UnsupportedError
from precision_runtime.modes import Mode
from precision_runtime.record import Finding, Remark, Report
from precision_runtime.scaling import DynamicScaler
from precision_runtime.training.broken import Broken
from precision_runtime.training.constants import Constants
from precision_runtime.training.course import Course, Observer
from precision_runtime.training.hazards import idle_decay
from precision_runtime.training.lesson import Lesson
from precision_runtime.training.notes import Notes
from precision_runtime.training.ranking import Ranking
from precision_runtime.training.trainings import LowRun, Trainings

# Errors on what audit_training was given: no verdict on a training.
_THE_CALLER_S = (ConfigurationError, UnsupportedError, UnknownNameError)


class Examination:
    """Trains a lesson in ``mode``, and judges with ``budget`` bits to lose; ``report`` is asked once."""

    def __init__(self, lesson: Lesson, mode: Mode, trainings: Trainings, budget: float, name: str | None) -> None:
        self.lesson, self.mode, self.trainings = lesson, mode, trainings
        self.budget, self.name = budget, name or ""
        self.notes = Notes()
        self.seen = LowWatch(getattr(torch, mode.compute), trainings.masking)

    def report(self) -> Report:
        """Train, judge, explain."""
        self.trainings.check()
        low = self._low()
        if isinstance(low, Finding):
            return self._report([low])
        course = low.runner.course
        self.name = self.name or type(low.model).__name__
        self._note_lane(low, course)
        try:
            true = self.trainings.double(course)
        except Exception as error:
            raise self._no_reference(error, course.steps) from error
        findings = [*self._not_applied(low), *self._judge(low, course, true)]
        told = " ".join(f.message for f in findings)
        self.notes.remarks += [Remark("hazard", text) for text in low.hazards if text.rstrip(".") not in told]
        if self.trainings.fallbacks:
            names = ", ".join(sorted(self.trainings.fallbacks))
            self.notes.remarks.append(
                Remark("reference", f"no FP64 kernel for {names}: computed in FP32 in the reference")
            )
        return self._report(findings)

    def _report(self, findings: list[Finding]) -> Report:
        worst = max([*self.notes.scores, *(f.excess for f in findings)], default=0.0)
        return Report(
            subject=f"training {self.name or 'a model'} for {self.lesson.steps} steps", mode=self.mode.name,
            accelerator="", status="", budget=self.budget, excess=worst, whole=worst, findings=tuple(findings),
            remarks=tuple(self.notes.remarks), seed=self.lesson.seed, figures=self.notes.figures,
        )  # fmt: skip

    def _low(self) -> LowRun | Finding:
        """The training in the mode, done; or the finding that it does not run."""
        run = self._run()
        # Where every step was skipped there is nothing to judge yet: begin where a scaler comes to in time.
        while (
            isinstance(run, LowRun) and self.trainings.options["scaler"] is None and self.mode.scaled
            and self.lesson.step_fn is None and not any(run.runner.course.taken) and run.runtime.scaler.scale > 1.0
        ):  # fmt: skip
            run = self._run(scaler=DynamicScaler(run.runtime.scaler.scale))
        return run

    def _run(self, scaler: object = None) -> LowRun | Finding:
        run: LowRun | None = None
        try:
            # In full modes such a table, too, is what the mode rounds: there is no wider one to make it in.
            constants = Constants(self.seen, self.trainings.constants) if self.mode.low else Observer()
            run = self.trainings.low(lambda *_: constants, scaler=scaler)
            with self.seen:
                run.runner.run()
        except Exception as error:
            number = 0 if run is None else run.runner.number
            note = f"while audit_training ran step {number + 1} of {self.lesson.steps} in {self.mode}"
            if isinstance(error, _THE_CALLER_S) or self._plain_error(number + 1) is not None:
                if hasattr(error, "add_note"):
                    error.add_note(note)
                raise
            names = {} if run is None else dict(run.model.named_modules())
            where = "update" if run is None else run.runner.phase
            found = error_finding(error, names)
            return replace(found, where=where, message=f"{found.message}, {note}")  # type: ignore[arg-type]
        return run

    def _plain_error(self, steps: int) -> Exception | None:
        """What the training raises in plain float32, if anything."""
        try:
            self.trainings.low(mode="32-true", steps=steps).runner.run()
        except Exception as error:
            return error
        return None

    def _no_reference(self, error: Exception, steps: int) -> Exception:
        return self._plain_error(steps) or no_reference("the training", self.mode, error)

    def _note_lane(self, low: LowRun, course: Course) -> None:
        if self.mode.scaled and self.lesson.step_fn is None:
            self.notes.figures["loss_scale"] = low.runtime.scaler.scale
        skipped = [n for n in range(len(course.taken) - 1) if not course.taken[n] and course.cleared[n + 1]]
        if skipped:
            self.notes.figures["skipped_steps"] = float(len(skipped))
            moved = [n for n in skipped if course.rates[n] != (course.rates[n - 1] if n else course.rates[n])]
            if moved:
                self.notes.remarks.append(
                    Remark(
                        "scheduler",
                        f"the learning rate changed in {len(moved)} of {len(skipped)} steps that a loss scaler skipped "
                        f"(first in step {moved[0] + 1}): the schedule runs ahead of the training. "
                        "PrecisionRuntime.gate(scheduler) waits",
                    )
                )
        if isinstance(low.optimizer, Optimizer) and not low.runtime.updates.wide:
            self.notes.remarks += [Remark("hazard", text) for text in idle_decay(low.optimizer)]

    def _not_applied(self, low: LowRun) -> list[Finding]:
        found = not_applied(self.mode, self.seen, low.model.parameters())
        if isinstance(found, Remark):
            self.notes.remarks.append(found)
        return [found] if isinstance(found, Finding) else []

    def _judge(self, low: LowRun, course: Course, true: Course) -> list[Finding]:
        ranking = Ranking(self.lesson, self.mode, self.trainings, self.notes, self.seen, 2.0**self.budget)
        if (course.trouble or course.loss_trouble) is not None or not any(course.taken):
            broken = Broken(self.lesson, self.mode, self.trainings, self.notes, ranking).findings(low, course, true)
            if broken is not None:
                return broken
        if not any(course.taken):
            moved = any(not torch.equal(t, course.start[n]) for n, t in course.end.items() if n in course.start)
            told = (
                "step() of what make_optimizer returned was never called, and yet weights have moved: which updates "
                "are lost cannot be told. Return the optimizer that steps"
                if moved and self.lesson.step_fn is not None
                else "the optimizer was never stepped: there is no update to judge"
            )
            self.notes.remarks.append(Remark("not-judged", told))
        return ranking.findings(low, course, true)
