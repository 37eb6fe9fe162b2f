"""The judgement of one tensor: observed error over the error that rounding the operands must cost.

With unit roundoff ``u`` of the mode, reference ``r`` (FP64), observed ``a`` and perturbed references ``s_k``:

- error            E = a - r
- intrinsic error  B_i = sqrt(mean_k (s_ki - r_i)^2), what rounding inputs, parameters and child outputs costs
- floor            R = u / sqrt(3) * rms(r): the error of rounding a result of that size once, uniform in one step.
                   The exponent is unbounded on purpose: a floor taken by casting r would hide underflow.
- excess           rms(E) / sqrt(rms(B)^2 + R^2)
- tail             max_i |E_i| / (B_i + u |r_i| + sqrt(rms(B)^2 + R^2)), for single bad rows

A healthy computation has an excess of about 1 whatever the dtype, size or conditioning. Both are cut at a limit that
follows from one constant (``TAIL_RATIO`` and the budget); nothing is chosen per test.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from precision_runtime.auditing.executing.noise import largest
from precision_runtime.auditing.judging.spread import SENTINEL, Spread, pieces
from precision_runtime.casting import FLOATING
from precision_runtime.formats import FORMATS
from precision_runtime.record import Kind, Worst

# A maximum over many elements of a ratio whose rms is about 1 reaches 4 to 5 in healthy calls (36,000 measured module
# calls: at most 4.3 where the excess is at most 1.1), so the tail is cut at four times the limit of the excess.
TAIL_RATIO = 4.0
# Perturbed runs from which on one of them can be held against the others.
MANY = 16
# An element of a decision tensor (indices, bools) may flip this often by chance before the count means anything.
FREE_FLIPS = 3.0
FEW_OF_MANY = 1 / 8  # of four columns, three hold nearly everything in any case
# A choice that fell otherwise in few rows has this share of the squared error (a mixture of experts: 0.99).
MOST = 0.9
# A run that chooses so moves such a row as far as it is off, and one that does not leaves it: at least, and at most, by
# these shares. A row that is merely off by E > 4 times its spread moves by 1/E in a plain run and 4/E in one disturbed
# four times as much: where the median is within the second share, E is 8 or more, and 4/E stays below the first.
TIPPED, STILL = 0.75, 0.125


@dataclass
class Judgement:
    """The verdict on one tensor; ``score`` is comparable with 2**budget."""

    tensor: str
    excess: float = 0.0
    tail: float = 0.0
    kind: Kind | None = None  # a kind that logic settled: range, underflow
    worst: Worst | None = None
    error: float = 0.0  # rms(E)
    scale: float = 0.0  # rms(r)
    note: str = ""
    decision: bool = False  # of indices or bools: the figures count flips
    bound: bool = False  # the figures are upper bounds: no perturbed run was needed
    alone: float | None = None  # the score of the judged run by itself, where replicas of it count, too

    @property
    def settled(self) -> bool:
        """Whether logic decided, and no perturbed run can change it."""
        return self.kind is not None and math.isinf(self.excess) and not self.bound

    @property
    def score(self) -> float:
        """The larger of excess and tail, both in units of the excess's limit."""
        return max(self.excess, self.tail / TAIL_RATIO)


@dataclass
class Pair:
    """One observed tensor beside its FP64 reference, both flat, with the elements that cannot be compared left out.

    Where all can be compared, the error is worked out when it is asked for: a pair for each result and each gradient
    would keep three tensors in FP64 instead of one.
    """

    tensor: str
    observed: torch.Tensor  # as it came, shape (n,); float64 where elements are left out
    reference: torch.Tensor  # float64, shape (n,)
    settled: torch.Tensor | None  # float64, shape (n,): the error, 0 where not comparable; None where all are
    rms_error: float
    largest_error: float
    shape: torch.Size
    u: float
    step: float  # smallest subnormal that may be lost without a finding, 0 to demand full range
    lost: torch.Tensor | None = None  # bool, shape (n,): non-finite although the reference is finite
    out_of_range: float = 0.0  # largest |reference| that the observed dtype cannot hold, 0 if none
    maximum: float = math.inf  # largest finite value of the observed dtype
    decision: bool = False
    flips: int = 0
    gradient: bool = False
    dtype_normal: float = 0.0  # smallest normal value of the observed dtype; 0 where it was computed in FP64
    rms_reference: float = math.nan  # worked out where it is not given
    mask: torch.Tensor | None = None  # float64, shape (n,): the reference before its infinities were left out

    def __post_init__(self) -> None:
        if math.isnan(self.rms_reference):
            self.rms_reference = _rms(self.reference)

    @property
    def error(self) -> torch.Tensor:
        """What is off, in FP64, shape (n,); 0 where not comparable."""
        return _difference(self.observed, self.reference) if self.settled is None else self.settled

    def _size(self) -> torch.Tensor:
        return self.settled.abs() if self.settled is not None else self.error.abs_()  # it is nobody else's

    @property
    def smallest_normal(self) -> float:
        """Smallest value of full precision: the observed dtype's, or 2^(p-1) subnormal steps, where u is 2^-p."""
        return max(self.dtype_normal, self.step / (2.0 * self.u))

    @property
    def floor(self) -> float:
        """R, with one subnormal step where that is granted."""
        return math.hypot(self.u / math.sqrt(3.0) * self.rms_reference, self.step)

    def judge(
        self,
        samples: Sequence[torch.Tensor] = (),
        wide: Sequence[torch.Tensor] = (),
        width: float = 1.0,
        locate: float = 1.0,
        quick: bool = False,
        brief: bool = False,
    ) -> Judgement:
        """Judge with the perturbed references seen so far; with none, the figures are upper bounds.

        ``wide`` are references disturbed ``width`` times as much; where a ``width``-th of their spread is larger, it
        counts.
        The worst element is looked for only where the score is above ``locate``; ``quick`` takes a looser bound of the
        tail where that is enough to be below it, and ``brief`` leaves the tail out where the excess is above it.
        """
        if self.lost is not None:
            chosen = self._chosen([*samples, *wide])
            if chosen is None or chosen.score > locate:
                return chosen or self._range()
            values = replace(self, lost=None).judge(samples, wide, width, locate, quick, brief)
            return replace(max(chosen, values, key=lambda j: j.score), decision=True)
        if self.decision:
            return self._decision([*samples, *wide])
        spread = Spread(self.reference, samples, wide, width)
        if self._flushed(spread.rms):
            return self._underflow(bool(samples))
        common = math.hypot(spread.rms, self.floor)
        if self.reference.numel() == 0 or self.rms_error == 0.0:
            return Judgement(self.tensor, scale=self.rms_reference, bound=not samples)
        if common == 0.0:  # reference exactly 0, no spread: only an exact 0 is right
            return self._result(math.inf, math.inf, spread, 0.0, bool(samples), locate)
        excess = self.rms_error / common
        tail = self.largest_error / (common + self.step)
        if quick and not samples and max(excess, tail / TAIL_RATIO) <= locate:  # passes even where the reference is 0
            return Judgement(self.tensor, excess, tail, None, None, self.rms_error, self.rms_reference, bound=True)
        if brief and excess > locate:
            return Judgement(self.tensor, excess, 0.0, None, None, self.rms_error, self.rms_reference, bound=True)
        common += self.step
        tail = max(float((size / allowed).max()) for _, size, allowed in self._beside(spread, common))
        if excess <= locate < tail / TAIL_RATIO and len(samples) >= MANY:
            tail /= max(1.0, self._tail_by_chance(samples, common) / TAIL_RATIO)
        return self._result(excess, tail, spread, common, bool(samples), locate)

    def _beside(self, spread: Spread, common: float) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Where a piece begins, its error's size and a tail of 1: B_i + u |r_i| and ``common``, which all have."""
        for piece in pieces(self.reference):
            reference = self.reference[piece]
            off = (
                _difference(self.observed[piece], reference).abs_()
                if self.settled is None
                else self.settled[piece].abs()
            )
            allowed, own = reference.abs().mul_(self.u).add_(common), spread.within(piece)
            yield piece.start, off, allowed if own is None else allowed.add_(own)

    def _tail_by_chance(self, samples: Sequence[torch.Tensor], common: float) -> float:
        """The largest tail of a perturbed run beside the others: the kink of a ReLU moves few elements, but far."""
        squares = torch.zeros_like(self.reference)
        for sample in samples:
            squares.addcmul_(sample - self.reference, sample - self.reference)
        plain = self.reference.abs().mul_(self.u).add_(common)
        most = 0.0
        for sample in samples:
            moved = (sample - self.reference).abs_()
            others = (squares - moved.square()).clamp_(min=0.0).div_(len(samples) - 1).sqrt_()
            most = max(most, float((moved / others.add_(plain)).nan_to_num_(0.0, 0.0, 0.0).max()))
        return most

    def spread(self, samples: Sequence[torch.Tensor]) -> float:
        """The rms distance of perturbed references from the reference."""
        return Spread(self.reference, samples).rms

    def is_choice(self, samples: Sequence[torch.Tensor]) -> bool:
        """Whether the error is that of a few rows which runs change either as much, or next to not at all.

        So a choice on a near tie does (an expert, a place): what follows from it is as large however little tips it.
        """
        if len(self.shape) < 2 or self.settled is not None or not samples or self.decision:
            return False
        # Mostly a place is a row along the last dimension; a state of a convolution has its places there instead.
        return any(self._is_choice_along(dim, samples) for dim in (-1, -2))

    def _is_choice_along(self, dim: int, samples: Sequence[torch.Tensor]) -> bool:
        moved = torch.stack([_rows(sample - self.reference, self.shape, dim) for sample in samples])
        off = _rows(self.error, self.shape, dim)
        rows = _foremost(off)
        if len(rows) > FREE_FLIPS or 2 * len(rows) > len(off):
            return False
        tipped = moved[:, rows].amax(0) >= TIPPED * off[rows]
        still = moved[:, rows].median(0).values <= STILL * off[rows]
        return bool((tipped & still).all())

    def is_of_few(self) -> bool:
        """Whether the error is that of so few of many rows that as many may be decided otherwise by chance."""
        dims = (-1, -2) if len(self.shape) >= 2 else ()
        layouts = [self.error.abs(), *(_rows(self.error, self.shape, dim) for dim in dims)]
        counts = [(len(_foremost(off)), len(off)) for off in layouts]
        return any(few <= FREE_FLIPS and few <= FEW_OF_MANY * all_ for few, all_ in counts)

    def farthest(self, allowed: float) -> Worst:
        """The element that is farthest off, beside what was allowed."""
        where = int(self._size().argmax())
        return Worst(
            self.tensor, _unravel(where, self.shape), float(self.observed[where]), float(self.reference[where]), allowed
        )

    def _result(
        self, excess: float, tail: float, spread: Spread, common: float, sampled: bool, locate: float
    ) -> Judgement:
        found = Judgement(self.tensor, excess, tail, None, None, self.rms_error, self.rms_reference, bound=not sampled)
        if found.score <= locate:  # nobody asks where a right tensor is least right
            return found
        beyond, all_squares, flushed_squares, flushed_largest = -math.inf, 0.0, 0.0, 0.0
        for start, size, allowed in self._beside(spread, common):
            piece = slice(start, start + len(size))
            over = size - TAIL_RATIO * allowed
            place = int(over.argmax())
            if float(over[place]) > beyond:
                beyond, where = float(over[place]), start + place
                found.worst = Worst(
                    self.tensor, _unravel(where, self.shape), float(self.observed[where]),
                    float(self.reference[where]), TAIL_RATIO * float(allowed[place]),
                )  # fmt: skip
            flushed = (self.observed[piece] == 0) & (self.reference[piece] != 0)
            all_squares += float(size.square().sum())
            flushed_squares += float(size[flushed].square().sum())
            flushed_largest = max(flushed_largest, largest(self.reference[piece][flushed]))
        # Underflow: most of the error is values that became exactly zero.
        if excess > 1.0 and flushed_squares > 0.5 * all_squares and flushed_largest < self.smallest_normal:
            found.kind = "underflow"
        return found

    def _flushed(self, rms_spread: float) -> bool:
        """Underflow by logic, for gradients only: most of the tensor's norm has become zero.

        A weight whose gradient is zero does not train, however small the gradient was: optimizers divide its size out.
        A tiny activation that becomes zero is as right as the format can hold it. A gradient that the perturbed runs
        move by its own size is an exact zero (a key's bias): large terms that cancel. One below FP32's normal range is
        lost in every mode.
        """
        small = self.gradient and 0.0 < self.rms_reference < self.step
        if (
            not small
            or rms_spread > 0.5 * self.rms_reference
            or self.rms_reference < FORMATS["float32"].smallest_normal
        ):
            return False
        gone = self.reference[self.observed == 0]
        return float(torch.linalg.vector_norm(gone)) > 0.5 * self.rms_reference * math.sqrt(self.reference.numel())

    def _underflow(self, sampled: bool) -> Judgement:
        gone = (self.observed == 0) & (self.reference != 0)
        where = int(torch.where(gone, self.reference.abs(), torch.zeros_like(self.reference)).argmax())
        worst = Worst(
            self.tensor, _unravel(where, self.shape), 0.0, float(self.reference[where]), 0.0,
            float(gone.sum()) / max(1, gone.numel()),
        )  # fmt: skip
        return Judgement(
            self.tensor, math.inf, math.inf, "underflow" if sampled else None, worst, self.rms_error,
            self.rms_reference,
            "most of this gradient became zero: its values are below the smallest that the dtype holds, "
            f"{self.step:.3g}; a loss scale (16-mixed) or bfloat16 keeps them",
            bound=not sampled,
        )  # fmt: skip

    def _range(self) -> Judgement:
        assert self.lost is not None
        where = int(self.lost.to(torch.int8).argmax())
        count = int(self.lost.sum())
        reference = float(self.reference[where])
        if self.out_of_range:
            note = (
                f"the true value reaches {self.out_of_range:.4g}, beyond the largest value of this dtype, "
                f"{self.maximum:.6g}: the result itself is out of the mode's range"
            )
        else:
            note = (
                "an intermediate value left the range of the dtype, or a division by a flushed zero; "
                "the result itself fits"
            )
            # A gradient that has been divided by the loss scale is in FP64, whatever it was before.
            note += f": its dtype holds up to {self.maximum:.6g}" if self.maximum < SENTINEL else ""
        worst = Worst(
            self.tensor, _unravel(where, self.shape), float(self.observed[where]), reference, 0.0,
            count / max(1, self.reference.numel()),
        )  # fmt: skip
        return Judgement(
            self.tensor, math.inf, math.inf, "range", worst, math.inf, self.rms_reference,
            f"{count} of {self.reference.numel()} elements are not finite; {note}",
        )  # fmt: skip

    def _chosen(self, samples: Sequence[torch.Tensor]) -> Judgement | None:
        """The judgement of a mask whose infinities stand in other places than the reference's; None: it is no mask.

        A choice between near ties (the best places of a row) puts them there, as it does in disturbed runs. Where none
        of these moves an infinity, something has left the range of the dtype.
        """
        if self.mask is None:
            return None
        n = max(1, self.mask.numel())
        blocked = self.mask.isinf()
        flips = int((self.observed.isinf() != blocked).sum())
        if not samples:
            return replace(self._range(), bound=True)
        mean = sum(int((s.isinf() != blocked).sum()) for s in samples) / len(samples)
        if mean == 0.0:
            return None
        return Judgement(
            self.tensor, flips / (mean + 3.0 * math.sqrt(mean)), 0.0, None, None, flips / n, 1.0,
            f"{flips} of {n} elements are infinite here or there only, where perturbed FP64 runs move {mean:.1f}",
        )  # fmt: skip

    def exactly(self) -> Judgement:
        """The judgement where decisions have to be those of the reference."""
        if not self.flips:
            return Judgement(self.tensor, decision=True)
        note = f"{self.flips} of {self.reference.numel()} values differ from the reference, and they have to be equal"
        return Judgement(self.tensor, math.inf, 0.0, None, self._flip(), 1.0, 1.0, note, decision=True)

    def _flip(self) -> Worst:
        """The first decision that fell otherwise, and the share of those that did."""
        where = int((self.observed != self.reference).to(torch.int8).argmax())
        return Worst(
            self.tensor, _unravel(where, self.shape), float(self.observed[where]), float(self.reference[where]),
            0.0, self.flips / max(1, self.reference.numel()),
        )  # fmt: skip

    def _decision(self, samples: Sequence[torch.Tensor]) -> Judgement:
        n = max(1, self.reference.numel())
        if not samples:
            score = self.flips / FREE_FLIPS
            return Judgement(self.tensor, score, 0.0, None, None, self.flips / n, 1.0, decision=True, bound=True)
        mean = sum(int((s != self.reference).sum()) for s in samples) / len(samples)
        expected = mean + 3.0 * math.sqrt(mean) + FREE_FLIPS
        worst = self._flip() if self.flips else None
        return Judgement(
            self.tensor, self.flips / expected, 0.0, None, worst, self.flips / n, 1.0,
            f"{self.flips} of {n} decisions differ where perturbed FP64 runs flip {mean:.1f}",
            decision=True,
        )  # fmt: skip


def pair(
    name: str, observed: torch.Tensor, reference: torch.Tensor, u: float, step: float = 0.0, gradient: bool = False
) -> Pair | str:
    """Put an observed tensor beside its reference, or say in a sentence why they cannot be compared.

    Elements whose reference is NaN, infinite or a mask's sentinel are left out where the observed value agrees in kind.
    """
    observed, reference = _plain(observed), _plain(reference)
    if observed.shape != reference.shape:
        return f"{name} has shape {tuple(observed.shape)} in the mode and {tuple(reference.shape)} in FP64"
    if observed.device != reference.device:
        observed = observed.to(reference.device)
    if not reference.is_floating_point():
        if observed.is_floating_point():
            return f"{name} is {observed.dtype} in the mode and {reference.dtype} in FP64"
        r, a = reference.reshape(-1), observed.reshape(-1)
        flips = int((a != r).sum())
        zero = torch.zeros((), dtype=torch.float64)
        return Pair(name, a, r, zero.expand(r.shape), 0.0, 0.0, reference.shape, u, 0.0, decision=True, flips=flips)
    form = FORMATS.get(str(observed.dtype).removeprefix("torch."))
    maximum = form.max if form is not None else math.inf
    normal = form.smallest_normal if form is not None and observed.dtype != torch.float64 else 0.0
    r = reference.detach().reshape(-1).to(torch.float64)
    a = observed.detach().reshape(-1)
    if a.dtype not in FLOATING:  # FP8 has no arithmetic
        a = a.to(torch.float64)
    settled = lost = mask = None
    out_of_range = 0.0
    most, rms = _off(a, r)  # NaN where any is NaN
    size, ceiling = _rms(r), min(maximum, SENTINEL)
    # No element is larger than the norm of all.
    if not math.isfinite(most) or (not size * math.sqrt(r.numel()) <= ceiling and largest(r) > ceiling):
        r_mask = ~(r.abs() < SENTINEL)  # NaN, infinite, or a mask's constant
        finite = torch.isfinite(a)
        gone = ~finite & ~r_mask
        # A mask's constant stays one when it saturates or becomes infinite with the same sign; NaN is no mask.
        gone |= torch.isnan(a) & r_mask & ~torch.isnan(r)
        if bool(gone.any()):
            lost = gone
            mask = _mask_of(a, r, gone)
            beyond = r.abs() > maximum
            beyond &= gone & ~r_mask
            out_of_range = float(r[beyond].abs().max()) if bool(beyond.any()) else 0.0
        skip = r_mask | ~finite
        error = _difference(a, r)
        settled = torch.where(skip, torch.zeros_like(error), error)
        most, rms, size = largest(settled), _rms(settled), math.nan
        r = torch.where(r_mask, torch.zeros_like(r), r)
        if lost is None:
            a = torch.where(skip, torch.zeros_like(a), a)
    return Pair(
        name, a, r, settled, rms, most, reference.shape, u, step, lost, out_of_range, maximum,
        gradient=gradient, dtype_normal=normal, rms_reference=size, mask=mask,
    )  # fmt: skip


def _mask_of(a: torch.Tensor, r: torch.Tensor, lost: torch.Tensor) -> torch.Tensor | None:
    """The reference, where what has been lost is infinite as it is in other places by right: it may be a mask then."""
    signs = [sign for sign in (-math.inf, math.inf) if bool((r == sign).any())]
    alike = all(float(value) in signs for value in a[lost].unique())
    return r.clone() if signs and alike else None


def flatten_sample(sample: torch.Tensor, like: Pair) -> torch.Tensor | None:
    """A perturbed reference in the pair's layout; None when its shape depends on values and came out otherwise."""
    sample = _plain(sample)
    if sample.numel() != like.reference.numel():
        return None
    return sample.detach().reshape(-1).to(like.reference.dtype)


def _plain(t: torch.Tensor) -> torch.Tensor:
    """Dense, real, strided: complex becomes pairs of reals."""
    t = t.detach()
    if t.is_nested:
        t = torch.cat([part.reshape(-1) for part in t.unbind()])
    if t.layout is not torch.strided:
        t = t.to_dense()
    if t.is_quantized:
        t = t.dequantize()
    if t.is_complex():
        t = torch.view_as_real(t.resolve_conj())
    return t


def _difference(observed: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """In FP64; a cast and a subtraction in place take three quarters of a subtraction of two dtypes."""
    if observed.dtype is torch.float64:
        return observed - reference
    return observed.to(torch.float64).sub_(reference)


def _off(a: torch.Tensor, r: torch.Tensor) -> tuple[float, float]:
    """The largest error and its root mean square, 0 of none."""
    most = squares = 0.0
    for piece in pieces(r):
        error = _difference(a[piece], r[piece])
        found = largest(error)
        if not found <= most:  # or it is NaN, which stays
            most = found
        squares += float(torch.linalg.vector_norm(error)) ** 2
    return most, math.sqrt(squares / max(1, r.numel()))


def _foremost(off: torch.Tensor) -> torch.Tensor:
    """The places of the largest values that make up most of the sum of squares, shape (k,)."""
    order = off.argsort(descending=True)
    share = off[order].square().cumsum(0) / off.square().sum()
    return order[: int((share < MOST).sum()) + 1]


def _rows(t: torch.Tensor, shape: torch.Size, dim: int) -> torch.Tensor:
    """The norms along a dimension of a flat tensor that had this shape, flat."""
    norms: torch.Tensor = torch.linalg.vector_norm(t.reshape(shape), dim=dim)
    return norms.reshape(-1)


def _rms(t: torch.Tensor) -> float:
    if t.numel() == 0 or not t.is_floating_point():
        return 0.0
    norm = float(torch.linalg.vector_norm(t))
    return norm / math.sqrt(t.numel())


def _unravel(index: int, shape: torch.Size) -> tuple[int, ...]:
    out: list[int] = []
    for size in reversed(shape):
        out.append(index % size)
        index //= size
    return tuple(reversed(out))
