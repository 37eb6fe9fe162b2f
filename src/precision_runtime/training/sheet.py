"""Where a training has come to, beside where FP64 comes to, and how far disturbed FP64 trainings are apart.

A parameter or buffer is judged by how far it has moved: with the movement ``d`` in the mode and ``r`` in FP64, and
movements ``s_k`` of disturbed FP64 trainings,

- error    E = d - r
- spread   B = rms over k of (s_k - r), what one roundoff in weights, inputs, results and gradients comes to by then:
           as much as everything where training is chaotic, hardly anything where it forgets
- floor    R = hypot(u rms(r), n u_s rms(end)) / sqrt(3): the movement rounded once in the mode, the value in its
           storage: in half n is 1; where it is wider n is the number of steps, as long as most of the way is made
- walk     W, the rms over elements of the root of the sum of squares of the roundings that really happened when new
           values were stored (``watching``): errors of either sign add up so; a rounding that always goes the same
           way comes to more. Disturbed trainings that walk as far in each step say what comes of it elsewhere
- excess   rms(E) / sqrt(rms(B)^2 + R^2 + W^2), about 1 for a healthy training, as in ``auditing.excess``

Losses are one tensor over the steps, and an optimizer's state is judged as it is in the end. An average of weights that
an optimizer keeps is judged by how far it has come from where the weights began.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from precision_runtime.casting import HALF
from precision_runtime.formats import FORMATS
from precision_runtime.training.course import Course

# Disturbed trainings: none where the floor alone explains the error, one where the answer is clear then, more before
# anything is called a failure.
SAMPLES = (1, 5)
MARGINS = (0.5, 1.0)  # a score below this share of the limit is clear after so many trainings
CERTAIN = 16.0  # a score so many times the limit after those is a failure: no further training can change it
# A decision (a ReLU's side, the sign of a gradient near zero) that the mode takes otherwise may be taken otherwise in
# few trainings disturbed by u. So before anything is called a failure some are disturbed by WIDTH u, and their spread
# over WIDTH is granted where it is larger.
WIDTH = 4.0
WIDE_SAMPLES = 4
# Few numbers have heavy tails: a ReLU that stands on its kink in one of eight trainings (measured) moves one bias, but
# far. So tensors of fewer than FEW fail only beside so many disturbed trainings: (7/8)^24 = 4 % have not seen it then.
MANY = 24
# A disturbance that is the same in every step moves where a training goes to, and a training that forgets comes there
# calmly. What grows later (steps as long as the curvature allows, at a clipped gradient) is set off by roundings that
# are others in each step: a quadratic whose curvature outgrew its steps was 60 times as far off as five disturbed the
# same way (float32: 5,000 times its roundoff). So before anything is called a failure, these trainings are made, too.
FRESH_SAMPLES = 4  # as many as wide ones
WALKS = 4  # trainings that are disturbed by what was stored, too
# So many elements of a tensor of FEW and more may go elsewhere by chance before it means anything: the sign of a
# gradient near zero, a near tie. They are left out of the error.
FREE, FEW = 3, 64
# A training whose disturbed twins are this far apart, relative to the movement, says nothing about its values.
CHAOTIC = 0.5
# More than half of a norm, of the steps, of a movement.
MOST = 0.5
# Weights in float32 are all that a mixed or a full mode can have, so what they round away in each step is its price.
# Steps that are alike, as Adam's, are rounded the same way each time: N steps of lr 1e-6 lose N times as much as one.
# This share of the way is granted at most, which at a limit of 4 leaves MOST: who has lost more has lost the update.
STORED = MOST / 4.0


@dataclass
class Entry:
    """One tensor of a course beside its reference, flat, in float64."""

    name: str
    kind: str  # parameter, buffer, state, average, loss
    moved: torch.Tensor
    reference: torch.Tensor
    floor: float
    shape: torch.Size
    start: torch.Tensor | None = None  # the reference's first value, where a movement is judged
    walk: float = 0.0
    spread: float = 0.0
    owner: str = ""  # the parameter that an average is one of
    measured: bool = False  # whether disturbed trainings had a say; without, the excess is an upper bound

    @property
    def error(self) -> float:
        """rms(E), without the few elements that may be anywhere."""
        error = self.moved - self.reference
        if self.kind == "loss" or error.numel() < FEW or not bool(torch.isfinite(error).all()):
            return rms(error)
        most = error.abs().topk(FREE).values
        return math.sqrt(max(0.0, float(error.square().sum() - most.square().sum())) / error.numel())

    @property
    def common(self) -> float:
        """What the mode's rounding explains."""
        return math.sqrt(self.spread**2 + self.floor**2 + self.walk**2)

    @property
    def excess(self) -> float:
        """The excess; inf where something that is not finite was found, or where nothing can be explained at all."""
        error = self.error
        if error == 0.0:
            return 0.0
        if not math.isfinite(error):
            return math.inf
        return error / self.common if self.common else math.inf

    @property
    def stuck(self) -> bool:
        """Whether it has missed most of the way that it should have gone."""
        return self.error > MOST * rms(self.reference)

    @property
    def chaotic(self) -> bool:
        """Whether disturbed trainings have come apart as far as they have come."""
        return self.spread > CHAOTIC * rms(self.reference)


class Sampler(Protocol):
    """Makes disturbed trainings."""

    def __call__(self, number: int, width: float, fresh: bool = False) -> Course:
        """The training of this number, disturbed by ``width`` u; with ``fresh`` otherwise in each step."""


def entries_of(low: Course, true: Course, u: float, buffers: set[str]) -> list[Entry]:
    """One entry for each tensor that both courses have in one shape, losses last.

    A tensor that has not moved in either course is left out.
    """
    found = []
    for name, end in low.end.items():
        if name not in true.end or name not in low.start or true.end[name].shape != end.shape:
            continue
        if low.start[name].shape != end.shape or true.start[name].shape != end.shape:
            continue
        moved = _flat(end) - _flat(low.start[name])
        reference = _flat(true.end[name]) - _flat(true.start[name])
        floor = math.hypot(u * rms(reference) / math.sqrt(3.0), _storing(end, true.end[name], reference, low))
        kind = "buffer" if name in buffers else "parameter"
        start = _flat(true.start[name])
        found.append(Entry(name, kind, moved, reference, floor, end.shape, start))
    for name, value in low.state.items():
        if name in true.state and true.state[name].shape == value.shape:
            owner = _averaged(name, true.state[name], true)
            if owner:
                start = _flat(true.start[owner])
                reference = _flat(true.state[name]) - start
                floor = math.hypot(u * rms(reference) / math.sqrt(3.0), _storing(value, value, reference, low))
                moved = _flat(value) - _flat(low.start[owner])
                found.append(Entry(name, "average", moved, reference, floor, value.shape, start, owner=owner))
                continue
            reference = _flat(true.state[name])
            floor = max(u, roundoff(value)) * rms(reference) / math.sqrt(3.0)
            found.append(Entry(name, "state", _flat(value), reference, floor, value.shape))
    count = min(low.steps, true.steps)
    losses = torch.stack([t.reshape(()) for t in low.losses[:count]])
    reference = torch.stack([t.reshape(()) for t in true.losses[:count]])
    found.append(Entry("loss", "loss", losses, reference, u * rms(reference) / math.sqrt(3.0), losses.shape))
    return [e for e in found if bool(e.moved.any()) or bool(e.reference.any())]


def _storing(stored: torch.Tensor, value: torch.Tensor, way: torch.Tensor, low: Course) -> float:
    """What storing ``value`` as ``stored`` is costs in the whole course, which comes ``way`` from its beginning."""
    once = roundoff(stored) * rms(_flat(value)) / math.sqrt(3.0)
    return once if stored.dtype in HALF else max(once, min(low.steps * once, STORED * rms(way)))


def _averaged(name: str, state: torch.Tensor, true: Course) -> str:
    """The parameter whose average over the steps this state is, '' if of none.

    It lies no farther from where the weights began than they do now, and is near them, or was after one step; moments
    of gradients are not.
    """
    early = true.early.get(name)
    for owner, start in true.start.items():
        if start.shape != state.shape or owner not in true.norms:
            continue
        way, near = rms(_flat(state) - _flat(start)), rms(_flat(start)) / 2.0
        if early is not None and early.shape == start.shape and rms(_flat(early) - _flat(start)) <= near:
            near = math.inf
        if 0.0 < way <= min(rms(_flat(true.end[owner]) - _flat(start)), near):
            return owner
    return ""


def screen(entries: Sequence[Entry], limit: float, sample: Sampler) -> list[Entry]:
    """Those that the floor and a few disturbed trainings do not explain."""
    open_ = [e for e in entries if e.excess > limit]
    for count, margin in zip(SAMPLES, MARGINS, strict=True):
        if not open_:
            break
        samples = [sample(number, 1.0) for number in range(count)]
        for entry in open_:
            entry.spread, entry.measured = spread_of(entry, samples), True
        open_ = [e for e in open_ if e.excess > margin * limit]
    return open_


def settle(entries: Sequence[Entry], limit: float, sample: Sampler) -> list[Entry]:
    """Those of the open entries that fail for certain: wider disturbances do not explain them either."""
    failed = [e for e in entries if e.excess > limit]
    if not failed:
        return failed
    fresh = [sample(number, 1.0, fresh=True) for number in range(FRESH_SAMPLES)]
    for entry in failed:
        entry.spread = max(entry.spread, spread_of(entry, fresh))
    failed = [e for e in failed if e.excess > limit]
    if all(e.excess > CERTAIN * limit for e in failed):
        return failed
    wide = [course for course in (sample(number, WIDTH) for number in range(WIDE_SAMPLES)) if in_domain(course)]
    for entry in failed:
        entry.spread = max(entry.spread, spread_of(entry, wide) / WIDTH)
    failed = [e for e in failed if e.excess > limit]
    small = [e for e in failed if e.moved.numel() < FEW and e.excess <= CERTAIN * limit]
    if not small or len(small) < len(failed):  # what fails for certain is told of in any case
        return failed
    samples = [sample(number, 1.0) for number in range(MANY)]
    for entry in small:
        entry.spread = max(entry.spread, spread_of(entry, samples))
    return [e for e in failed if e.excess > limit]


def in_domain(course: Course) -> bool:
    """Whether a disturbed training computes at all: ``sqrt(1 - a)`` does not where ``a`` is moved above 1."""
    return not course.losses or bool(torch.isfinite(course.losses[0]).all())


def spread_of(entry: Entry, samples: Sequence[Course]) -> float:
    """The distance from the reference, rms over samples and elements; inf where a sample has diverged.

    Those that have left a function's domain at once say nothing, unless all have: then nothing can be said.
    """
    within = [course for course in samples if in_domain(course)]
    if samples and not within:
        return math.inf
    total = 0.0
    for course in within:
        value = _value(entry, course)
        if value is not None:
            distance = rms(value - entry.reference)
            total += distance * distance if math.isfinite(distance) else math.inf
    return math.sqrt(total / max(1, len(within)))


def _value(entry: Entry, course: Course) -> torch.Tensor | None:
    if entry.kind == "loss":
        found = torch.stack([t.reshape(()) for t in course.losses])
        if found.numel() < entry.reference.numel():  # it has diverged before
            return torch.full_like(entry.reference, math.inf)
        return found[: entry.reference.numel()]
    held = course.state if entry.kind in ("state", "average") else course.end
    if entry.name not in held or held[entry.name].numel() != entry.reference.numel():
        return None
    value = _flat(held[entry.name])
    return value if entry.kind == "state" else value - _flat(course.start[entry.owner or entry.name])


def roundoff(t: torch.Tensor) -> float:
    """The unit roundoff of the dtype that ``t`` is stored in."""
    form = FORMATS.get(str(t.dtype).removeprefix("torch."))
    return form.unit_roundoff if form is not None else 0.0


def rms(t: torch.Tensor) -> float:
    """The root of the mean square; 0 of nothing."""
    return float(torch.linalg.vector_norm(t)) / math.sqrt(t.numel()) if t.numel() else 0.0


def _flat(t: torch.Tensor) -> torch.Tensor:
    t = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
    return t.reshape(-1).to(torch.float64)
