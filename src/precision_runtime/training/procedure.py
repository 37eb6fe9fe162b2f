"""The judgement of a training: in the mode, in FP64, in disturbed FP64, and why they differ."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from precision_runtime import environment
from precision_runtime.accelerators import resolve
from precision_runtime.auditing.applied import not_applied
from precision_runtime.auditing.dispatch import LowWatch
from precision_runtime.auditing.failing import error_finding, no_reference
from precision_runtime.auditing.masking import Masking
from precision_runtime.auditing.noise import Noise
from precision_runtime.auditing.randomness import reseed, seeded
from precision_runtime.automatic import placed
from precision_runtime.capability import support
from precision_runtime.errors import ConfigurationError, UnsupportedError
from precision_runtime.formats import FORMATS
from precision_runtime.modes import Mode, parse_mode
from precision_runtime.optimizers import OptimizerWarning, hazards
from precision_runtime.record import Finding, Remark, Report
from precision_runtime.scaling import DynamicScaler
from precision_runtime.scaling.history import StallWarning
from precision_runtime.training.advice import advise
from precision_runtime.training.causes import Cause, Evidence, cause_of, finding, gone_finding, vanishes
from precision_runtime.training.course import Course, gradients
from precision_runtime.training.gatekeeper import clear
from precision_runtime.training.lesson import Lesson, lesson_of
from precision_runtime.training.sheet import MOST, WALKS, Entry, entries_of, rms, screen, settle, spread_of
from precision_runtime.training.trainings import LowRun, Trainings
from precision_runtime.training.watching import Stored, Watch

# Gradients below float32's normal range are lost in every mode.
FLOOR = FORMATS["float32"].smallest_normal
# FP8 layers round gradients to E5M2, which has a digit less than what they round the rest to.
_BACK = {"float8_e4m3fn": "float8_e5m2"}
# Trained weights, quantised in every forward pass: half a step of 1/127 of a row's largest value, 4 times its rms.
_QUANTIZED_IN_TRAINING = {"int8-training": 2.0**-6}


def audit_training(
    make_model: Callable[[], nn.Module],
    make_optimizer: Callable[[Any], Any],
    loss_fn: Callable[[Any, Any], torch.Tensor],
    batches: Iterable[Any],
    mode: object,
    accelerator: object = "cpu",
    *,
    steps: int | None = None,
    step_fn: Callable[[Any, Any, Any], Any] | None = None,
    scaler: object = None,
    islands: object = (),
    budget: float = 2.0,
    seed: int = 0,
    name: str | None = None,
) -> Report:
    """Train in ``mode`` and in FP64, and judge where it has led. There is no tolerance to choose.

    ``make_model()`` returns a new model, ``make_optimizer(model)`` its optimizer (torch's, or any object with
    ``step()``), ``loss_fn(model, batch)`` the loss; each is called again for every run, with the same random numbers.
    ``step_fn(model, optimizer, loss)`` stands for backward and step where given, with a scaler and clipping of its own;
    otherwise a ``PrecisionRuntime`` does both. Where ``step_fn`` does not step, gradients accumulate. ``batches`` are
    gone through once, or, with ``steps``, for so many steps and from the beginning again. ``scaler`` and ``islands``
    are as ``PrecisionRuntime`` takes them. State that lives outside of
    what these functions make is shared by all runs: make a ``GradScaler`` or a scheduler with the model or optimizer.

    Weights, buffers, optimizer state and losses are ranked among FP64 trainings that are disturbed by one unit
    roundoff: a chaotic training, where those are far apart, stays silent. ``budget`` is the number of bits that may be
    lost beyond what the mode must lose. Same seed, same verdict. Random state and default dtype are put back.

    Raises ``UnsupportedError`` where this machine cannot run the mode, ``ConfigurationError`` for what is no training,
    ``AuditError`` where the code runs in float32 but not in FP64, and what the code raises in float32, too.
    """
    lesson = lesson_of(make_model, make_optimizer, loss_fn, batches, steps, step_fn, seed)
    if not budget >= 0:
        raise ConfigurationError(f"budget={budget!r} is not allowed: the bits that may be lost are a number from 0 up")
    parsed = parse_mode(mode, "audit_training(mode=...)")
    lane = support(parsed, accelerator)
    if not lane.ok:
        raise UnsupportedError(f"{parsed} on {lane.accelerator} cannot be audited here: {lane.reason}")
    parsed, device = placed(parsed, lane.accelerator).mode, resolve(lane.accelerator)
    options = {"scaler": scaler, "islands": islands}
    trainings = Trainings(lesson, parsed, lane.accelerator, device, options, Masking(parsed.format))
    before = torch.get_default_dtype()
    with seeded(seed, device), torch.enable_grad(), _alone(), _quiet(), environment.ignored():
        try:
            examination = _Examination(lesson, parsed, trainings, budget, name)
            report = examination.report()
        finally:
            torch.set_default_dtype(before)
    return replace(report, accelerator=lane.accelerator, status=lane.status)


@contextmanager
def _alone() -> Iterator[None]:
    """An autocast around the audit is none of the mode's."""
    enabled = [device for device in ("cpu", "cuda", "mps", "xpu") if torch.is_autocast_enabled(device)]
    for device in enabled:
        torch.set_autocast_enabled(device, False)
    try:
        yield
    finally:
        for device in enabled:
            torch.set_autocast_enabled(device, True)


@contextmanager
def _quiet() -> Iterator[None]:
    """What would be warned of is in the report."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OptimizerWarning)
        warnings.simplefilter("ignore", StallWarning)
        warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step\(\)`", UserWarning)  # after a skip
        yield


class _Examination:
    def __init__(self, lesson: Lesson, mode: Mode, trainings: Trainings, budget: float, name: str | None) -> None:
        self.lesson, self.mode, self.trainings = lesson, mode, trainings
        self.budget, self.limit, self.name = budget, 2.0**budget, name or ""
        self.remarks: list[Remark] = []
        self.figures: dict[str, float] = {}
        self.scores: list[float] = []
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
        findings = [*self._not_applied(), *self._judge(low, course, true)]
        told = " ".join(f.message for f in findings)
        self.remarks += [Remark("hazard", text) for text in self._hazards(low) if text.rstrip(".") not in told]
        if self.trainings.fallbacks:
            names = ", ".join(sorted(self.trainings.fallbacks))
            self.remarks.append(Remark("reference", f"no FP64 kernel for {names}: computed in FP32 in the reference"))
        return self._report(findings)

    def _report(self, findings: list[Finding]) -> Report:
        worst = max([*self.scores, *(f.excess for f in findings)], default=0.0)
        return Report(
            subject=f"training {self.name or 'a model'} for {self.lesson.steps} steps", mode=self.mode.name,
            accelerator="", status="", budget=self.budget, excess=worst, whole=worst, findings=tuple(findings),
            remarks=tuple(self.remarks), seed=self.lesson.seed, figures=self.figures,
        )  # fmt: skip

    # -- the mode ---------------------------------------------------------------------------------------------------

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
            run = self.trainings.low(scaler=scaler)
            with self.seen:
                run.runner.run()
        except Exception as error:
            number = 0 if run is None else run.runner.number
            note = f"while audit_training ran step {number + 1} of {self.lesson.steps} in {self.mode}"
            if isinstance(error, (ConfigurationError, UnsupportedError)) or self._plain_error(number + 1) is not None:
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
            self.figures["loss_scale"] = low.runtime.scaler.scale
        skipped = [n for n in range(len(course.taken) - 1) if not course.taken[n] and course.cleared[n + 1]]
        if skipped:
            self.figures["skipped_steps"] = float(len(skipped))
            moved = [n for n in skipped if course.rates[n] != (course.rates[n - 1] if n else course.rates[n])]
            if moved:
                self.remarks.append(
                    Remark(
                        "scheduler",
                        f"the learning rate changed in {len(moved)} of {len(skipped)} steps that a loss scaler skipped "
                        f"(first in step {moved[0] + 1}): the schedule runs ahead of the training. "
                        "PrecisionRuntime.gate(scheduler) waits",
                    )
                )
        if isinstance(low.optimizer, Optimizer):
            self.remarks += [Remark("hazard", text) for text in _idle_decay(low.optimizer)]

    def _not_applied(self) -> list[Finding]:
        found = not_applied(self.mode, self.seen)
        if isinstance(found, Remark):
            self.remarks.append(found)
        return [found] if isinstance(found, Finding) else []

    # -- judging ----------------------------------------------------------------------------------------------------

    def _judge(self, low: LowRun, course: Course, true: Course) -> list[Finding]:
        if (course.trouble or course.loss_trouble) is not None or not any(course.taken):
            broken = self._broken(low, course, true)
            if broken is not None:
                return broken
        if not any(course.taken):
            self.remarks.append(Remark("not-judged", "the optimizer was never stepped: there is no update to judge"))
        return self._rank(low, course, true)

    def _rank(self, low: LowRun, course: Course, true: Course) -> list[Finding]:
        """Findings on finite values, by their place among disturbed trainings; most upstream first."""
        parameters = {name for name, _ in low.model.named_parameters()}
        samples: dict[tuple[int, float], Course] = {}

        def sample(number: int, width: float) -> Course:
            if (number, width) not in samples:
                samples[number, width] = self.trainings.double(course, self._noise(number, width))
            return samples[number, width]

        entries = entries_of(course, true, self._u(), set(course.end) - parameters)
        vanished = self._vanished(course, true, sample)
        failed = screen(entries, self.limit, sample)
        stored: Mapping[str, Stored] = {}
        if failed:
            watch = self._watched(failed, course)
            stored = watch.stored
            failed = [e for e in failed if e.kind != "loss" or _local(e, watch)]
            failed = settle(self._walked(failed, course, stored), self.limit, sample)
        if any(e.chaotic for e in entries if e.kind == "parameter"):
            self.remarks.append(
                Remark("chaotic", "a disturbance of one roundoff grows to the size of the movement of some weights")
            )
        states = {e.name: e for e in failed if e.kind == "state"}
        moved = [e for e in failed if e.kind in ("parameter", "buffer")] or [e for e in failed if e.kind == "loss"]
        moved += [e for e in failed if e.kind == "average" and e.stuck]
        # Only measured figures: what passed on its bound has lost less than the budget, nobody knows how much.
        self.scores += [e.excess for e in entries if e.measured and e.excess <= self.limit]
        for entry in () if moved else states.values():
            self.remarks.append(
                Remark(
                    "state", f"the optimizer's {entry.name} is {entry.excess:.3g} times as far off as rounding it is"
                )
            )
        evidence = Evidence(
            course, true, list(samples.values()), stored, states, self._hazards(low), self._u(), self.limit
        )
        causes: dict[Cause, list[Entry]] = {}
        groups: dict[tuple[int, str, str], Cause] = {}
        for entry in sorted(moved, key=lambda e: -e.excess):
            cause = cause_of(entry, evidence)
            first = groups.setdefault((cause.order, cause.kind, cause.where), cause)
            causes.setdefault(first, []).append(entry)
        found = [
            finding(entries, cause, self.limit, self._tried(cause, entries, true))
            for cause, entries in sorted(causes.items(), key=lambda item: item[0].order)
        ]
        if vanished and all((f.kind, f.where) != ("underflow", "backward") for f in found):
            found.insert(0, gone_finding(vanished, course, true, self._scale_advice(true)))
        return found

    def _vanished(self, course: Course, true: Course, sample: Callable[[int, float], Course]) -> list[str]:
        """Parameters whose gradient is zero in most steps, because its true values are below the format's smallest.

        A finding however small the movement would have been: optimizers divide a gradient's size out.
        """
        smallest = self.mode.format.smallest_subnormal
        names = [n for n in true.norms if n in course.norms and vanishes(course.norms[n], true.norms[n])]
        names = [n for n in names if FLOOR < rms(true.first[n]) < smallest] if self.mode.low else []
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

        def observe(model: nn.Module, optimizer: Any) -> Watch:
            watches.append(Watch(self.lesson, model, optimizer, self.trainings.masking, forward))
            return watches[0]

        with LowWatch(getattr(torch, self.mode.compute), self.trainings.masking):
            self.trainings.low(observe, steps=course.steps).runner.run()
        return watches[0]

    # -- values that are not finite ---------------------------------------------------------------------------------

    def _broken(self, low: LowRun, course: Course, true: Course) -> list[Finding] | None:
        trouble = course.trouble or course.loss_trouble
        if true.trouble is not None or (trouble is not None and true.loss_trouble is not None):
            self.remarks.append(
                Remark("diverges", "this training leaves the finite numbers in FP64, too: nothing to judge")
            )
            return []
        if trouble is None:
            return self._never_stepped(low, course)
        where = {"loss": "forward", "gradient": "backward", "update": "update"}[trouble.phase]
        who = {
            "loss": "the loss is not finite",
            "gradient": f"the gradient of {trouble.name!r} is not finite though the loss is",
            "update": f"the optimizer's step makes {trouble.name!r} inf or NaN though every gradient is finite",
        }[trouble.phase]
        told = "".join(f" {text}." for text in self._hazards(low)) if trouble.phase == "update" else ""
        born = Finding(
            kind="range", where=where, module=trouble.name.rpartition(".")[0], op=None, lost_bits=math.inf,  # type: ignore[arg-type]
            excess=math.inf, message=f"in step {trouble.step + 1} {who}; in FP64 it is.{told}",
        )  # fmt: skip
        return [*(self._earlier(trouble.step) if trouble.phase != "update" else []), born]

    def _earlier(self, steps: int) -> list[Finding]:
        """What was wrong already in the steps before one that left the finite numbers."""
        if not steps:
            return []
        low = self.trainings.low(steps=steps)
        with LowWatch(getattr(torch, self.mode.compute), self.trainings.masking):
            course = low.runner.run()
        if not any(course.taken) or course.trouble is not None:
            return []
        return self._rank(low, course, self.trainings.double(course))

    def _never_stepped(self, low: LowRun, course: Course) -> list[Finding] | None:
        """None where the user's code steps in FP64 as rarely; otherwise a scaler has skipped every step."""
        free = self.trainings.double(replace(course, taken=[True] * course.steps))
        if not any(free.taken):
            return None
        culprits = [name for name, g in gradients(low.model).items() if not bool(torch.isfinite(g).all())]
        told = f"; not finite: the gradient of {', '.join(culprits[:3])}" if culprits else ""
        scale = low.runtime.scaler.scale
        return [
            Finding(
                kind="range", where="backward", module=culprits[0].rpartition(".")[0] if culprits else "", op=None,
                lost_bits=math.inf, excess=math.inf,
                message=f"every one of {course.steps} steps was skipped because scaled gradients overflowed"
                + (f", down to a scale of {scale:g}" if self.lesson.step_fn is None else "") + told,
            )
        ]  # fmt: skip

    # -- what helps -------------------------------------------------------------------------------------------------

    def _hazards(self, low: LowRun) -> list[str]:
        return [str(h) for h in hazards(low.optimizer)] if isinstance(low.optimizer, Optimizer) else []

    def _tried(self, cause: Cause, entries: list[Entry], true: Course) -> str | None:
        if (cause.kind, cause.where) == ("underflow", "backward"):
            return self._scale_advice(true)
        lost = (cause.kind, cause.where) == ("underflow", "update")
        if lost and self.mode.family == "true" and self.lesson.step_fn is None and entries[0].kind == "parameter":
            return self._kept_updates(entries, true)
        return None

    def _scale_advice(self, true: Course) -> str | None:
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
        self.figures |= {"loss_scale_needed": found.needed, "loss_scale_settles": found.settles}
        return str(found)

    def _kept_updates(self, entries: list[Entry], true: Course) -> str | None:
        """The same training with what rounding takes from each update kept beside the weight."""
        run = self.trainings.low(updates="kahan")
        if not isinstance(run.optimizer, Optimizer):
            return None
        course = run.runner.run()
        again = {e.name: e for e in entries_of(course, true, self._u(), set())}
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


def _local(entry: Entry, watch: Watch) -> bool:
    """Judge losses by what FP64 makes of the very same weights: where those have come to is judged apart.

    False where the model could not be copied in every step.
    """
    if len(watch.losses) < entry.moved.numel():
        return False
    entry.reference = torch.stack(watch.losses[: entry.moved.numel()]).to("cpu", torch.float64)
    return True


def _idle_decay(optimizer: Optimizer) -> list[str]:
    """Groups whose decoupled weight decay, ``p *= 1 - lr * weight_decay``, rounds to the weight itself."""
    told = []
    for number, group in enumerate(optimizer.param_groups):
        decay = group.get("weight_decay") or 0.0
        if not decay or not group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW)):
            continue
        step = float(group["lr"]) * float(decay)
        dtypes = {str(p.dtype).removeprefix("torch.") for p in group["params"]} & {"float16", "bfloat16"}
        told += [
            f"{type(optimizer).__name__}, group {number}, weight_decay={decay:g} in {dtype}: a step of it is "
            f"{step:.3g} of the weight, less than half a unit in its last place, and does nothing"
            for dtype in sorted(dtypes)
            if step < FORMATS[dtype].unit_roundoff / 2.0
        ]
    return told
