"""Where a training has led, by its place among disturbed trainings in FP64, and why it is not among them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from precision_runtime.auditing.executing.dispatch import LowWatch
from precision_runtime.auditing.executing.noise import Noise
from precision_runtime.casting import HALF
from precision_runtime.formats import FORMATS
from precision_runtime.modes import Mode
from precision_runtime.record import Finding, Remark
from precision_runtime.stepping.updates import Updates
from precision_runtime.training.causes import Cause, Evidence, cause_of, finding, gone_finding, vanishes
from precision_runtime.training.course import Course
from precision_runtime.training.lesson import Lesson
from precision_runtime.training.notes import Notes
from precision_runtime.training.remedies import Remedies
from precision_runtime.training.sheet import (
    MOST,
    WALKS,
    Entry,
    Sampler,
    entries_of,
    in_domain,
    rms,
    roundoff,
    screen,
    settle,
    spread_of,
)
from precision_runtime.training.trainings import LowRun, Trainings
from precision_runtime.training.watching import Stored, Watch, watch_of

# Gradients below float32's normal range are lost in every mode.
FLOOR = FORMATS["float32"].smallest_normal
# FP8 layers round gradients to E5M2, which has a digit less than what they round the rest to.
_BACK = {"float8_e4m3fn": "float8_e5m2"}
# Trained weights, quantised in every forward pass: half a step of 1/127 of a row's largest value, 4 times its rms.
_QUANTIZED_IN_TRAINING = {"int8-training": 2.0**-6}


class Ranking:
    """Ranks trainings of one lesson; ``seen`` watched the one in the mode, and ``limit`` is that of the excess."""

    def __init__(
        self, lesson: Lesson, mode: Mode, trainings: Trainings, notes: Notes, seen: LowWatch, limit: float
    ) -> None:
        self.lesson, self.mode, self.trainings, self.notes = lesson, mode, trainings, notes
        self.seen, self.limit = seen, limit

    def findings(self, low: LowRun, course: Course, true: Course) -> list[Finding]:
        """Findings on finite values, by their place among disturbed trainings; most upstream first."""
        parameters = {name for name, _ in low.model.named_parameters()}
        samples: dict[tuple[int, float, bool], Course] = {}

        def sample(number: int, width: float, fresh: bool = False) -> Course:
            if (number, width, fresh) not in samples:
                noise = self._noise(number, width)
                samples[number, width, fresh] = self.trainings.double(course, noise, fresh=fresh)
            return samples[number, width, fresh]

        entries = entries_of(course, true, self._u(), set(course.end) - parameters)
        vanished = self._vanished(course, true, sample)
        failed = screen(entries, self.limit, sample)
        stored: Mapping[str, Stored] = {}
        if failed:
            watch = self._watched(failed, course)
            stored = watch.stored
            failed = [e for e in failed if e.kind != "loss" or _local(e, watch)]
            failed = settle(self._walked(failed, course, stored), self.limit, sample)
        if samples and not any(in_domain(course) for course in samples.values()):
            self.notes.remarks.append(
                Remark(
                    "not-judged",
                    "every disturbed training has a loss that is not finite in its first step: where the values come "
                    "to is not judged",
                )
            )
        elif any(e.chaotic for e in entries if e.kind == "parameter"):
            self.notes.remarks.append(
                Remark("chaotic", "a disturbance of one roundoff grows to the size of the movement of some weights")
            )
        states = {e.name: e for e in failed if e.kind == "state"}
        moved = [e for e in failed if e.kind in ("parameter", "buffer")] or [e for e in failed if e.kind == "loss"]
        moved += [e for e in failed if e.kind == "average" and _misled(e, course, self.limit)]
        if not moved:
            self._note_short(entries, low, course)
        # Only measured figures: what passed on its bound has lost less than the budget, nobody knows how much.
        self.notes.scores += [e.excess for e in entries if e.measured and e.excess <= self.limit]
        for entry in () if moved else states.values():
            self.notes.remarks.append(
                Remark(
                    "state", f"the optimizer's {entry.name} is {entry.excess:.3g} times as far off as rounding it is"
                )
            )
        within = [course for course in samples.values() if in_domain(course)]
        evidence = Evidence(course, true, within, stored, states, low.hazards, self._u(), self.limit,
            self.mode.format.smallest_normal, self.lesson.step_fn is not None,
        )  # fmt: skip
        remedies = Remedies(self.lesson, self.mode, self.trainings, self.notes, self._u())
        causes: dict[Cause, list[Entry]] = {}
        groups: dict[tuple[int, str, str], Cause] = {}
        for entry in sorted(moved, key=lambda e: -e.excess):
            cause = cause_of(entry, evidence)
            first = groups.setdefault((cause.order, cause.kind, cause.where), cause)
            causes.setdefault(first, []).append(entry)
        found = [
            finding(entries, cause, self.limit, remedies.tried(cause, entries, true))
            for cause, entries in sorted(causes.items(), key=lambda item: item[0].order)
        ]
        if vanished and all((f.kind, f.where) != ("underflow", "backward") for f in found):
            found.insert(0, gone_finding(vanished, course, true, remedies.loss_scale(true)))
        return found

    def _note_short(self, entries: list[Entry], low: LowRun, course: Course) -> None:
        """Say where most half weights have not moved as they should, by less than storing them once rounds."""
        if self.mode.masters or low.runtime.updates.wide:
            return
        half = [e for e in entries if e.kind == "parameter" and course.end[e.name].dtype in HALF]
        short = [e.name for e in half if e.stuck and not e.chaotic]
        if len(short) > MOST * len(half):  # single ones have gradients that are nothing but rounding (a key's bias)
            self.notes.remarks.insert(
                0,
                Remark(
                    "short",
                    f"{len(short)} of {len(half)} tensors of half weights have gone less than half of their way in "
                    f"{course.steps} steps ({short[0]!r}): all of it is about what storing them once rounds, and so "
                    "no failure yet. Whether their updates are lost shows in more steps",
                ),
            )

    def _vanished(self, course: Course, true: Course, sample: Sampler) -> list[str]:
        """Parameters whose gradient is zero in most steps, because its true values are below the format's smallest.

        A finding however small the movement would have been: optimizers divide a gradient's size out.
        """
        smallest = self.mode.format.smallest_subnormal
        names = [n for n in true.norms if n in course.norms and vanishes(course.norms[n], true.norms[n])]
        names = [n for n in names if FLOOR < rms(true.first[n]) < smallest] if self.mode.low else []
        # Those that were there when the backward pass was over have been lost by what came after.
        names = [n for n in names if n not in course.left or not bool(course.left[n].any())]
        if not names:
            return []
        other = sample(0, 1.0).first
        return [n for n in names if n in other and rms(other[n] - true.first[n]) <= MOST * rms(true.first[n])]

    def _u(self, back: bool = False) -> float:
        """What the mode's rounding costs one result, relative to it; as in ``audit``, a sum's terms in full modes."""
        name = self.mode.products or self.mode.compute
        u = FORMATS[_BACK.get(name, name) if back else name].unit_roundoff
        if self.mode.weights in _QUANTIZED_IN_TRAINING:
            return _QUANTIZED_IN_TRAINING[self.mode.weights]
        return u if self.mode.low or self.mode.products else 2.0 * u * math.sqrt(1.0 + self.seen.frames[0].terms / 2.0)

    def _noise(self, number: int, width: float) -> tuple[Noise, Noise]:
        """For what is computed forward, and for gradients."""
        step, seed = self.mode.format.smallest_subnormal, self.lesson.seed
        return Noise(self._u(), seed, number, step, width), Noise(self._u(back=True), seed + 1, number, step, width)

    def _walked(self, failed: list[Entry], course: Course, stored: Mapping[str, Stored]) -> list[Entry]:
        """Those that fail though what is stored walks by chance as far as its roundings were."""
        for entry in failed:
            if entry.name in stored:
                entry.walk = stored[entry.name].walk
        walks = {name: s.deviation for name, s in stored.items() if s.walks}
        failed = [e for e in failed if e.excess > self.limit]
        if not failed or not walks:
            return failed
        walking = [self.trainings.double(course, self._noise(n, 1.0), walks) for n in range(WALKS)]
        for entry in failed:
            entry.spread = max(entry.spread, spread_of(entry, walking))
        return [e for e in failed if e.excess > self.limit]

    def _watched(self, failed: list[Entry], course: Course) -> Watch:
        """What became of the values that were stored in half, in the same training once more."""
        watches: list[Watch] = []
        forward = any(
            e.kind in ("loss", "buffer") or (e.kind == "parameter" and e.name not in course.norms) for e in failed
        )

        def observe(model: nn.Module, optimizer: Any, updates: Updates) -> Watch:
            watches.append(watch_of(self.lesson, model, optimizer, self.trainings.masking, forward, updates))
            return watches[0]

        with LowWatch(getattr(torch, self.mode.compute), self.trainings.masking):
            self.trainings.low(observe, steps=course.steps).runner.run()
        return watches[0]


def _misled(entry: Entry, course: Course, limit: float) -> bool:
    """Whether an average that is kept in half is stuck, or farther off than if each step's rounding were chance."""
    kept = course.state[entry.name]
    if kept.dtype not in HALF or entry.start is None:
        return False
    size = max(rms(entry.start), rms(kept.to(torch.float64)))
    entry.walk = 0.0 if entry.stuck else math.sqrt(course.steps / 3.0) * roundoff(kept) * size
    return entry.excess > limit


def _local(entry: Entry, watch: Watch) -> bool:
    """Judge losses by what FP64 makes of the very same weights: where those have come to is judged apart.

    False where the model could not be copied in every step.
    """
    if len(watch.losses) < entry.moved.numel():
        return False
    entry.reference = torch.stack(watch.losses[: entry.moved.numel()]).to("cpu", torch.float64)
    return True
