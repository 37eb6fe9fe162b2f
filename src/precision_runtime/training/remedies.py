"""What would have helped a training, tried before it is proposed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.optim import Optimizer

from precision_runtime.auditing.executing.randomness import reseed
from precision_runtime.modes import Mode
from precision_runtime.training.advice import advise
from precision_runtime.training.causes import Cause
from precision_runtime.training.course import Course, gradients
from precision_runtime.training.gatekeeper import clear
from precision_runtime.training.lesson import Lesson
from precision_runtime.training.notes import Notes
from precision_runtime.training.sheet import Entry, entries_of
from precision_runtime.training.trainings import Trainings


class Remedies:
    """Tries remedies on the training of one lesson; ``u`` is what the mode's rounding costs one result."""

    def __init__(self, lesson: Lesson, mode: Mode, trainings: Trainings, notes: Notes, u: float) -> None:
        self.lesson, self.mode, self.trainings, self.notes, self.u = lesson, mode, trainings, notes, u

    def tried(self, cause: Cause, entries: list[Entry], true: Course) -> str | None:
        """A sentence on what helps, tried in a training; None where nothing is known to."""
        if (cause.kind, cause.where) == ("underflow", "backward"):
            return self.loss_scale(true)
        lost = (cause.kind, cause.where) == ("underflow", "update") and entries[0].kind == "parameter"
        wide = self.trainings.options["updates"].wide
        if lost and self.mode.family == "true" and self.lesson.step_fn is None and not wide:
            return self._kept_updates(entries, true)
        return None

    def loss_scale(self, true: Course) -> str | None:
        """The loss scale that would have kept the gradients, and what a scaler settles at."""
        form = self.mode.format

        run = self.trainings.low(steps=1)

        def at(scale: float) -> Mapping[str, torch.Tensor]:
            clear(run.model, run.optimizer)
            _, batch = self.lesson.batch(0)
            reseed(self.lesson.seed + 1)
            loss = self.lesson.loss_fn(run.model, run.runner.verbs.cast(batch))
            with run.runtime.strategy.backward():
                (loss.float() * scale).backward()
            return {name: g.detach() for name, g in gradients(run.model).items()}

        found = advise(true.first, form, at)
        if found is None:
            return None
        self.notes.figures |= {"loss_scale_needed": found.needed, "loss_scale_settles": found.settles}
        return str(found)

    def _kept_updates(self, entries: list[Entry], true: Course) -> str | None:
        """The same training with what rounding takes from each update kept beside the weight."""
        run = self.trainings.low(updates="kahan")
        if not isinstance(run.optimizer, Optimizer):
            return None
        course = run.runner.run()
        again = {e.name: e for e in entries_of(course, true, self.u, set())}
        worst = 0.0
        for entry in entries:
            if entry.name in again:
                again[entry.name].spread = entry.spread
                worst = max(worst, again[entry.name].excess)
        before = max(e.excess for e in entries)
        return (
            f"with PrecisionRuntime({self.mode.name!r}, updates='kahan') it is {worst:.3g} times as far off as "
            f"rounding explains, without {before:.3g} times"
        )
