"""Trainings that leave the finite numbers in the mode, or never make a step because of it."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from precision_runtime.auditing.executing.dispatch import LowWatch
from precision_runtime.modes import Mode
from precision_runtime.record import Finding, Remark
from precision_runtime.training.course import Course, Trouble, gradients
from precision_runtime.training.lesson import Lesson
from precision_runtime.training.notes import Notes
from precision_runtime.training.ranking import Ranking
from precision_runtime.training.trainings import LowRun, Trainings


class Broken:
    """Says where infinities were born; what was wrong in the steps before, ``ranking`` says."""

    def __init__(self, lesson: Lesson, mode: Mode, trainings: Trainings, notes: Notes, ranking: Ranking) -> None:
        self.lesson, self.mode, self.trainings, self.notes, self.ranking = lesson, mode, trainings, notes, ranking

    def findings(self, low: LowRun, course: Course, true: Course) -> list[Finding] | None:
        """Findings where the training in the mode has left the finite numbers; None where it is to be ranked."""
        trouble = course.trouble or course.loss_trouble
        if true.trouble is not None or (trouble is not None and true.loss_trouble is not None):
            self.notes.remarks.append(
                Remark("diverges", "this training leaves the finite numbers in FP64, too: nothing to judge")
            )
            return []
        if trouble is None:
            return self._never_stepped(low, course)
        spoilt = self._spoilt(course, trouble)
        where = {"loss": "forward", "gradient": "update" if spoilt else "backward", "update": "update"}[trouble.phase]
        who = {
            "loss": "the loss is not finite",
            "gradient": f"the gradient of {trouble.name!r} is not finite though {spoilt or 'the loss is'}",
            "update": f"the optimizer's step makes {trouble.name!r} inf or NaN though every gradient is finite",
        }[trouble.phase]
        told = "".join(f" {text}." for text in low.hazards) if trouble.phase == "update" else ""
        born = Finding(
            kind="range", where=where, module=trouble.name.rpartition(".")[0], op=None, lost_bits=math.inf,  # type: ignore[arg-type]
            excess=math.inf, message=f"in step {trouble.step + 1} {who}; in FP64 it is.{told}",
        )  # fmt: skip
        return [*(self._earlier(trouble.step) if trouble.phase != "update" else []), born]

    def _spoilt(self, course: Course, trouble: Trouble) -> str:
        """What was still finite before step_fn made a gradient of it, '' where it did not."""
        if self.lesson.step_fn is None or trouble.phase != "gradient":
            return ""
        left = course.left.get(trouble.name)
        if left is None:
            return "the loss is: step_fn has put it there"
        finite_yet = sum(course.taken) <= 1 and bool(torch.isfinite(left).all())  # noted before the first step only
        return "the backward pass left it so: what step_fn does to it in between leaves the range" if finite_yet else ""

    def _earlier(self, steps: int) -> list[Finding]:
        """What was wrong already in the steps before one that left the finite numbers."""
        if not steps:
            return []
        low = self.trainings.low(steps=steps)
        with LowWatch(getattr(torch, self.mode.compute), self.trainings.masking):
            course = low.runner.run()
        if not any(course.taken) or course.trouble is not None:
            return []
        return self.ranking.findings(low, course, self.trainings.double(course))

    def _never_stepped(self, low: LowRun, course: Course) -> list[Finding] | None:
        """None where the user's code steps in FP64 as rarely; otherwise every step was skipped."""
        free = self.trainings.double(replace(course, taken=[True] * course.steps))
        if not any(free.taken):
            return None
        culprits = [name for name, g in gradients(low.model).items() if not bool(torch.isfinite(g).all())]
        told = f"; not finite: the gradient of {', '.join(culprits[:3])}" if culprits else ""
        if self.lesson.step_fn is None:
            why = f"because scaled gradients overflowed, down to a scale of {low.runtime.scaler.scale:g}"
        else:
            scaled = "gradients that overflow while they are scaled, or " if self.mode.scaled else ""
            why = f"by step_fn, which steps in FP64: {scaled}what it decides by, such as a norm, leaves the range"
        return [
            Finding(
                kind="range", where="backward" if culprits or self.mode.scaled else "update",
                module=culprits[0].rpartition(".")[0] if culprits else "", op=None,
                lost_bits=math.inf, excess=math.inf,
                message=f"every one of {course.steps} steps was skipped {why}{told}",
            )
        ]  # fmt: skip
