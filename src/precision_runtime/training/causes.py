"""Why a training has gone elsewhere than FP64: from the gradients, the updates and what was stored."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from precision_runtime.casting import HALF
from precision_runtime.formats import FORMATS
from precision_runtime.record import Finding, Kind, Where, Worst, lost_bits
from precision_runtime.training.course import Course
from precision_runtime.training.sheet import MOST, Entry, rms
from precision_runtime.training.watching import Stored

_LOSSES = "FP64 computes other losses from the very same weights: they are summed or computed in too few digits"
# One factor for all gradients: their directions agree to this cosine (or, where each value was clipped, their signs do
# in this share of the elements), and they are this many times too large or small.
_PARALLEL, _FACTOR = 0.99, 2.0


@dataclass(frozen=True)
class Evidence:
    """All that is known: the training in the mode, the true one, disturbed ones, and what became of stored values.

    ``u`` is what the mode's rounding costs a gradient, ``limit`` the excess that is allowed, ``smallest`` the smallest
    normal number of the mode's format. ``own_step``: a function of the user's calls backward and steps.
    """

    low: Course
    true: Course
    samples: Sequence[Course]
    stored: Mapping[str, Stored]
    states: Mapping[str, Entry]  # optimizer state that has failed, by "name of parameter"
    hazards: Sequence[str]
    u: float
    limit: float
    smallest: float
    own_step: bool

    def trained(self, name: str) -> bool:
        """Whether a step was ever taken with a gradient of this one."""
        return name in self.low.norms or name in self.true.norms


@dataclass(frozen=True)
class Cause:
    """A kind, a place and a sentence. ``order`` says how far upstream it is."""

    order: int
    kind: Kind
    where: Where
    message: str


def cause_of(entry: Entry, evidence: Evidence) -> Cause:
    """Why this parameter, buffer or loss has failed: the first explanation that the evidence supports."""
    if entry.kind == "loss":
        return Cause(
            0,
            "instability",
            "forward",
            _LOSSES,
        )
    if entry.kind == "average":
        return Cause(
            3, "underflow", "update",
            f"this average of {entry.owner!r} has gone {_way(entry):.0%} of its way: what it is to move in a step is "
            f"{'below half a unit in its last place' if entry.stuck else 'rounded always the same way'}. "
            "Keep it in float32",
        )  # fmt: skip
    for look in (_stuck, _scaled, _changed, _underflow, _gradient, _broken, _lost, _state, _written):
        found = look(entry, evidence)
        if found is not None:
            return found
    return Cause(
        4, "instability", "update",
        "the gradients of the first step are right: what is made of them in the optimizer's steps is not",
    )  # fmt: skip


def _stuck(entry: Entry, evidence: Evidence) -> Cause | None:
    """A buffer that stands still."""
    if entry.kind != "buffer":
        return None
    stored = evidence.stored.get(entry.name)
    if stored is not None and not stored.mastered and stored.share > MOST:
        return Cause(
            3, "underflow", "update",
            f"{stored.share:.0%} of what was to be added to it over the steps left no trace: {_count(stored)} were "
            "below half a unit in its last place. Keep it, or a master of it, in float32",
        )  # fmt: skip
    return None


def _written(entry: Entry, evidence: Evidence) -> Cause | None:
    """What no gradient moves: a buffer, or an average of weights in the model."""
    if entry.kind == "parameter" and evidence.trained(entry.name):
        return None
    kept = evidence.low.end[entry.name].dtype
    if kept in HALF and entry.stuck and bool(entry.reference.any()):
        return Cause(
            3, "underflow", "update",
            f"it has gone {_way(entry):.0%} of its way: what it is to move in a step is below half a unit in its last "
            "place. Keep it in float32",
        )  # fmt: skip
    if entry.kind == "parameter" and not evidence.low.norms:
        return None  # steps were taken where nobody could look on
    return Cause(
        4, "instability", "update",
        "values written into it in each step are rounded always the same way. "
        + ("Keep it in float32" if kept in HALF else "Compute them in float32, too"),
    )  # fmt: skip


def _underflow(entry: Entry, evidence: Evidence) -> Cause | None:
    low, true = evidence.low.norms.get(entry.name, []), evidence.true.norms.get(entry.name, [])
    pairs = [(float(a), float(b)) for a, b in zip(low, true, strict=False) if float(b) > 0.0]
    vanished = sum(a == 0.0 for a, _ in pairs)
    gone = gone_share(evidence.low.first.get(entry.name), evidence.true.first.get(entry.name))
    if _exact_zero(entry.name, evidence) or (vanished <= MOST * len(pairs) and gone <= MOST):
        return None
    size = max((b for _, b in pairs), default=0.0)
    told = f"it is zero in {vanished} of {len(pairs)} steps" if vanished else f"{gone:.0%} of its norm is zero"
    if evidence.smallest <= FORMATS["float32"].smallest_normal <= size:
        return Cause(
            1, "instability", "backward",
            f"its gradient, whose norm is {size:.3g} at most, is lost: {told}, though the format holds values far "
            "smaller: what it is made of is a difference of terms that were rounded to the same value, in a cast or "
            "after they had grown large. audit() of one step names the op",
        )  # fmt: skip
    return Cause(
        1, "underflow", "backward",
        f"its gradient, whose norm is {size:.3g} at most, vanishes: {told}. A loss scale (16-mixed) or bfloat16 keeps "
        "it",
    )  # fmt: skip


def _scaled(entry: Entry, evidence: Evidence) -> Cause | None:
    """All gradients together are too large or small by one factor: they were clipped or normed while scaled."""
    common = [n for n in evidence.true.first if n in evidence.low.first]
    if not common or entry.kind != "parameter":
        return None
    low = torch.cat([evidence.low.first[n].reshape(-1).to(torch.float64) for n in common])
    true = torch.cat([evidence.true.first[n].reshape(-1).to(torch.float64) for n in common])
    sizes = float(torch.linalg.vector_norm(low)), float(torch.linalg.vector_norm(true))
    if not sizes[0] or not sizes[1] or not math.isfinite(sizes[0]):
        return None
    cosine = float(low @ true) / (sizes[0] * sizes[1])
    factors = []
    for name in evidence.low.norms:
        pairs = zip(evidence.low.norms[name], evidence.true.norms.get(name, []), strict=False)
        factors += [float(a) / float(b) for a, b in pairs if float(b) > 0.0 and float(a) > 0.0]
    factor = sizes[0] / sizes[1]
    alike = float((low.sign() == true.sign()).double().mean())
    if max(cosine, alike) < _PARALLEL or 1.0 / _FACTOR < factor < _FACTOR or not factors:
        return None
    return Cause(
        2, "instability", "update",
        f"the optimizer got gradients that point the right way but are {_times(factor)} (median over all steps and "
        f"parameters: {_times(statistics.median(factors))}): they were clipped, normed or stepped with while the loss "
        "scale was still in them. Unscale first, as PrecisionRuntime.clip_gradients does",
    )  # fmt: skip


def _changed(entry: Entry, evidence: Evidence) -> Cause | None:
    """A gradient that the backward pass left right, but for a loss scale, and that the step was not taken with."""
    name = entry.name
    low, true = evidence.low.first.get(name), evidence.true.first.get(name)
    if low is None or true is None or low.shape != true.shape or not _left_right(name, evidence):
        return None
    low, true = low.to(torch.float64).reshape(-1), true.to(torch.float64).reshape(-1)
    sizes = float(torch.linalg.vector_norm(low)), float(torch.linalg.vector_norm(true))
    common = math.hypot(evidence.u * rms(true) / math.sqrt(3.0), _spread(name, evidence))
    if not sizes[1] or rms(low - true) <= evidence.limit * common:
        return None
    factor = sizes[0] / sizes[1]
    if not sizes[0]:
        how = "zero"
    elif not _parallel(low, true, sizes) or 1.0 / _FACTOR < factor < _FACTOR:
        how = f"{lost_bits(rms(low - true) / common):.1f} bits off" if common else "another"
    else:
        how = _times(factor)
    return Cause(
        2, "instability", "update",
        f"the backward pass leaves its gradient right (but for a loss scale), and the one that the first step is taken "
        f"with is {how}: what is done to it in between (a sum, unscaling, clipping, decay, a norm that overflows) is "
        "wrong",
    )  # fmt: skip


def _left_right(name: str, evidence: Evidence) -> bool:
    """Whether the backward pass left this gradient right, whatever factor all of it has."""
    low, true = evidence.low.left.get(name), evidence.true.left.get(name)
    if low is None or true is None or low.shape != true.shape or not bool(true.any()):
        return False
    low, true = low.to(torch.float64).reshape(-1), true.to(torch.float64).reshape(-1)
    factor = float(low @ true) / float(true @ true)
    if not math.isfinite(factor) or factor <= 0.0:
        return False
    spread = _distance(evidence.true.left[name], [s.left[name] for s in evidence.samples if name in s.left])
    common = math.hypot(evidence.u * rms(true) / math.sqrt(3.0), spread)
    return rms(low / factor - true) <= evidence.limit * common


def _parallel(low: torch.Tensor, true: torch.Tensor, sizes: tuple[float, float]) -> bool:
    return float(low @ true) > _PARALLEL * sizes[0] * sizes[1]


def _gradient(entry: Entry, evidence: Evidence) -> Cause | None:
    low, true = evidence.low.first.get(entry.name), evidence.true.first.get(entry.name)
    if low is None or true is None or low.shape != true.shape or _exact_zero(entry.name, evidence):
        return None
    floor = evidence.u * rms(true) / math.sqrt(3.0)
    common = math.hypot(floor, _spread(entry.name, evidence))
    error = rms(low.to(torch.float64) - true.to(torch.float64))
    if not common or error / common <= evidence.limit:
        return None
    told = f"already the gradient of the first step is {lost_bits(error / common):.1f} bits off"
    if evidence.own_step and entry.name not in evidence.low.left:
        return Cause(
            2, "instability", "update",
            f"{told}, and step_fn has put it there: what it is summed, scaled or cast in has too few digits, "
            "unless audit() of one step names an op of the model's",
        )  # fmt: skip
    return Cause(1, "instability", "backward", f"{told}; audit() of one step names the op")


def _lost(entry: Entry, evidence: Evidence) -> Cause | None:
    stored = evidence.stored.get(entry.name)
    if stored is None or stored.mastered or stored.share <= MOST:
        return None
    told = "".join(f". {text.rstrip('.')}" for text in evidence.hazards)
    return Cause(
        3, "underflow", "update",
        f"{min(1.0, stored.share):.0%} of the movement that the optimizer meant left no trace: {_count(stored)} were "
        f"below half a unit in the last place of their weight{told}",
    )  # fmt: skip


def _state(entry: Entry, evidence: Evidence) -> Cause | None:
    own = [s for name, s in evidence.states.items() if name.endswith(f" of {entry.name}")]
    if not own:
        return None
    worst = max(own, key=lambda s: s.excess)
    told = "".join(f". {text.rstrip('.')}" for text in evidence.hazards)
    gone = gone_share(worst.moved, worst.reference)
    if gone > MOST:
        return Cause(
            4, "underflow", "update",
            f"{gone:.0%} of the norm of the optimizer's state {worst.name!r} is zero: squares of gradients are below "
            f"the smallest value of its dtype{told}",
        )  # fmt: skip
    kept = evidence.low.state.get(worst.name)
    if kept is not None and kept.dtype not in HALF and not _early(worst.name, evidence):
        return None  # it has followed gradients of other weights
    why = (
        "it is kept in too few digits"
        if kept is None or kept.dtype in HALF
        else (
            "it is kept in float32: what is added to it (a rate, a power of beta, a count of steps) has too few digits"
        )
    )
    return Cause(
        4, "instability", "update",
        f"the optimizer's state {worst.name!r} is {lost_bits(worst.excess):.1f} bits off: {why}{told}",
    )  # fmt: skip


def _early(name: str, evidence: Evidence) -> bool:
    """Whether this state was off already after the first step, when all gradients were those of the same weights."""
    low, true = evidence.low.early.get(name), evidence.true.early.get(name)
    if low is None or true is None or low.shape != true.shape:
        return False
    spread = _distance(true, [s.early[name] for s in evidence.samples if name in s.early])
    common = math.hypot(evidence.u * rms(true.to(torch.float64)) / math.sqrt(3.0), spread)
    return rms(low.to(torch.float64) - true.to(torch.float64)) > evidence.limit * common


def _broken(entry: Entry, evidence: Evidence) -> Cause | None:
    broken = [path for path in evidence.low.broken if path not in evidence.true.broken]
    if not broken or entry.kind != "parameter":
        return None
    return Cause(
        4, "range", "update", f"the optimizer keeps values that are not finite any more: {', '.join(broken[:3])}"
    )


def vanishes(low: Sequence[torch.Tensor], true: Sequence[torch.Tensor]) -> bool:
    """Whether a gradient with these norms is zero in most of the steps in which the true one is not."""
    pairs = [(float(a), float(b)) for a, b in zip(low, true, strict=False) if float(b) > 0.0]
    return sum(a == 0.0 for a, _ in pairs) > MOST * len(pairs)


def gone_finding(names: Sequence[str], low: Course, true: Course, suggestion: str | None) -> Finding:
    """The finding for gradients that vanish, although the movement would not have been seen yet."""
    most = max(names, key=lambda n: float(true.norms[n][0]))
    gradient = true.first[most]
    place = int(gradient.abs().argmax())
    worst = Worst(
        f"grad of {most}",
        tuple(int(i) for i in torch.unravel_index(torch.tensor(place), gradient.shape)),
        0.0,
        float(gradient.reshape(-1)[place]),
        0.0,
        1.0,
    )
    others = f" ({len(names) - 1} more for the same reason)" if len(names) > 1 else ""
    return Finding(
        kind="underflow", where="backward", module=most.rpartition(".")[0], op=None, lost_bits=math.inf,
        excess=math.inf,
        message=f"the gradient of {most!r} is zero in most steps: its true values are below the smallest that the "
        f"dtype holds{others}. A loss scale (16-mixed) or bfloat16 keeps them",
        worst=worst, suggestion=suggestion,
    )  # fmt: skip


def gone_share(low: torch.Tensor | None, true: torch.Tensor | None) -> float:
    """The share of the true gradient's norm in elements that are zero in the mode."""
    if low is None or true is None or low.shape != true.shape or not bool(true.any()):
        return 0.0
    wide = true.to(torch.float64)
    return float(torch.linalg.vector_norm(wide[low == 0])) / float(torch.linalg.vector_norm(wide))


def finding(entries: Sequence[Entry], cause: Cause, limit: float, suggestion: str | None = None) -> Finding:
    """One finding for the tensors that failed for one reason; the worst of them is named."""
    worst = max(entries, key=lambda e: e.excess)
    others = f" ({len(entries) - 1} more for the same reason)" if len(entries) > 1 else ""
    module = "" if worst.kind == "loss" else (worst.owner or worst.name).rpartition(".")[0]
    what = "the loss" if worst.kind == "loss" else f"{worst.kind} {worst.name!r}"
    return Finding(
        kind=cause.kind, where=cause.where, module=module, op=None, lost_bits=lost_bits(worst.excess),
        excess=worst.excess,
        message=f"{what} is not where FP64 trainings with the mode's rounding come to: {cause.message}{others}",
        worst=_worst(worst, limit), suggestion=suggestion,
    )  # fmt: skip


def _worst(entry: Entry, limit: float) -> Worst:
    error = (entry.moved - entry.reference).abs()
    place = int(error.nan_to_num(math.inf, math.inf).argmax())
    start = 0.0 if entry.start is None else float(entry.start[place])
    allowed = limit * entry.common
    index, rest = [], place
    for size in reversed(entry.shape):
        index.append(rest % size)
        rest //= size
    beyond = float((~(error <= allowed)).sum()) / max(1, error.numel())
    value, reference = start + float(entry.moved[place]), start + float(entry.reference[place])
    return Worst(entry.name, tuple(reversed(index)), value, reference, allowed, beyond)


def _spread(name: str, evidence: Evidence) -> float:
    return _distance(evidence.true.first[name], [s.first[name] for s in evidence.samples if name in s.first])


def _distance(true: torch.Tensor, found: Sequence[torch.Tensor]) -> float:
    """The rms distance of disturbed trainings' gradients; 0 of none."""
    wide = true.to(torch.float64)
    squares = [rms(f.to(torch.float64) - wide) ** 2 for f in found if f.shape == true.shape]
    return math.sqrt(sum(squares) / len(squares)) if squares else 0.0


def _exact_zero(name: str, evidence: Evidence) -> bool:
    """Whether disturbed trainings move the gradient by its own size: terms that cancel (a key's bias)."""
    true = evidence.true.first.get(name)
    return true is not None and _spread(name, evidence) > MOST * rms(true.to(torch.float64))


def _way(entry: Entry) -> float:
    """How much of the true movement was made."""
    return float(entry.moved @ entry.reference) / float(entry.reference @ entry.reference)


def _count(stored: Stored) -> str:
    return f"{stored.gone} of {stored.wanted} updates"


def _times(factor: float) -> str:
    return f"{factor:.3g} times too large" if factor > 1.0 else f"{1.0 / factor:.3g} times too small"
