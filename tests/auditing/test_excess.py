"""The judgement of one tensor, against a slow twin in numpy and against exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from precision_runtime.auditing.judging.excess import TAIL_RATIO, Judgement, Pair, flatten_sample, pair
from precision_runtime.auditing.judging.spread import PIECE
from precision_runtime.formats import FORMATS

UNITS = st.sampled_from([f.unit_roundoff for f in FORMATS.values()])
# Magnitudes whose squares neither overflow nor vanish; zero itself is drawn too.
VALUES = st.floats(-1e6, 1e6, allow_subnormal=False).map(lambda v: v if abs(v) > 1e-6 else 0.0)


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[np.ndarray], float, float]:
    """Observed, reference, perturbed references, u, subnormal step."""
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=1, max_side=5))
    array = hnp.arrays(np.float64, shape, elements=VALUES)
    reference = draw(array)
    observed = reference + draw(array) * draw(st.sampled_from([0.0, 1e-9, 1e-3, 1.0]))
    samples = [reference + draw(array) * 1e-3 for _ in range(draw(st.integers(0, 3)))]
    return observed, reference, samples, draw(UNITS), draw(st.sampled_from([0.0, 2.0**-24]))


def slow(
    observed: np.ndarray, reference: np.ndarray, samples: list[np.ndarray], u: float, step: float
) -> tuple[float, float]:
    """Excess and tail as the module's docstring defines them, in numpy, element by element."""
    error = observed - reference
    rms = lambda a: math.sqrt(sum(float(v) ** 2 for v in a.reshape(-1)) / a.size)  # noqa: E731
    spread = np.zeros_like(reference)
    if samples:
        spread = np.sqrt(sum((s - reference) ** 2 for s in samples) / len(samples))
    floor = math.hypot(u / math.sqrt(3) * rms(reference), step)
    common = math.sqrt(rms(spread) ** 2 + floor**2)
    if rms(error) == 0.0:
        return 0.0, 0.0
    if common == 0.0:
        return math.inf, math.inf
    allowed = spread + u * np.abs(reference) + common + step
    return rms(error) / common, float((np.abs(error) / allowed).max())


def exact(observed: np.ndarray, reference: np.ndarray, u: float, step: float) -> Fraction:
    """The square of the excess without samples, in rational arithmetic."""
    n = observed.size
    error = sum(
        (Fraction(float(a)) - Fraction(float(r))) ** 2 for a, r in zip(observed.flat, reference.flat, strict=True)
    )
    floor = Fraction(u) ** 2 / 3 * sum(Fraction(float(r)) ** 2 for r in reference.flat) + n * Fraction(step) ** 2
    return error / floor


def made(observed: torch.Tensor, reference: torch.Tensor, u: float = 2.0**-11, step: float = 0.0) -> Pair:
    result = pair("output", observed, reference, u, step)
    assert isinstance(result, Pair), result
    return result


@settings(max_examples=150, deadline=None)
@given(cases())
def test_excess_and_tail_are_those_of_the_slow_twin(
    case: tuple[np.ndarray, np.ndarray, list[np.ndarray], float, float],
) -> None:
    observed, reference, samples, u, step = case
    entry = made(torch.from_numpy(np.array(observed)), torch.from_numpy(np.array(reference)), u, step)
    flat = [flatten_sample(torch.from_numpy(np.array(s)), entry) for s in samples]
    judged = entry.judge([f for f in flat if f is not None])
    excess, tail = slow(observed, reference, samples, u, step)
    assert judged.excess == pytest.approx(excess, rel=1e-9)
    assert judged.tail == pytest.approx(tail, rel=1e-9)
    assert judged.score == max(judged.excess, judged.tail / TAIL_RATIO)
    assert judged.bound is not bool(samples)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_without_samples_the_excess_is_the_exact_rational_one(
    case: tuple[np.ndarray, np.ndarray, list[np.ndarray], float, float],
) -> None:
    observed, reference, _, u, step = case
    if not reference.any() and step == 0.0:
        return
    judged = made(torch.from_numpy(np.array(observed)), torch.from_numpy(np.array(reference)), u, step).judge()
    assert judged.excess == pytest.approx(math.sqrt(exact(observed, reference, u, step)), rel=1e-6)


@pytest.mark.parametrize(("dtype", "numpy_dtype"), [("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)])
def test_one_rounding_of_a_result_has_an_excess_of_about_one(dtype: str, numpy_dtype: type) -> None:
    # Rounded by numpy and ml_dtypes, not by torch; values fill whole binades evenly, so E is uniform in one step.
    values = np.random.default_rng(0).uniform(1.0, 2.0, 20_000)
    rounded = values.astype(numpy_dtype).astype(np.float64)
    judged = made(torch.from_numpy(rounded), torch.from_numpy(values), FORMATS[dtype].unit_roundoff).judge()
    # A binade's relative step shrinks from 2u to u: rms(E) / (u rms(r) / sqrt 3) = 1 / sqrt(7/3) for [1, 2).
    assert judged.excess == pytest.approx(1 / math.sqrt(7 / 3), rel=0.02)
    assert judged.tail < 1.0


def test_the_exponent_is_unbounded_so_that_underflow_shows() -> None:
    values = torch.full((50,), 1e-20, dtype=torch.float64)
    judged = made(values.half(), values, 2.0**-11, step=0.0).judge()
    assert judged.excess == pytest.approx(math.sqrt(3) * 2**11)
    assert judged.kind == "underflow"


def test_a_value_within_one_subnormal_step_is_as_right_as_the_format_can_hold_it() -> None:
    step = FORMATS["float16"].smallest_subnormal
    assert step == float(np.finfo(np.float16).smallest_subnormal)
    values = torch.tensor([0.6, 1.4, -2.5, 0.2], dtype=torch.float64) * step
    assert made(values.half(), values, 2.0**-11, step).judge().score < 1.0
    assert made(values.half(), values, 2.0**-11, 0.0).judge().score > 100.0


# -- by logic ----------------------------------------------------------------------------------------------------------


def test_infinity_where_the_reference_fits_is_an_intermediate_overflow() -> None:
    judged = made(torch.tensor([1.0, math.inf]).half(), torch.tensor([1.0, 100.0]).double()).judge()
    assert (judged.kind, judged.score) == ("range", math.inf)
    assert judged.worst is not None
    assert (judged.worst.index, judged.worst.reference, judged.worst.beyond) == ((1,), 100.0, 0.5)
    assert judged.note == (
        "1 of 2 elements are not finite; an intermediate value left the range of the dtype, or a division by a flushed "
        "zero; the result itself fits: its dtype holds up to 65504"
    )


def test_infinity_where_the_reference_does_not_fit_is_out_of_the_modes_range() -> None:
    judged = made(torch.tensor([1.0, math.inf]).half(), torch.tensor([1.0, 1e6]).double()).judge()
    assert judged.kind == "range"
    assert "the true value reaches 1e+06, beyond the largest value of this dtype, 65504" in judged.note
    assert float(np.finfo(np.float16).max) == 65504


def test_nan_where_the_reference_is_finite_is_a_range_finding() -> None:
    assert made(torch.tensor([math.nan]), torch.tensor([0.5]).double()).judge().kind == "range"


@pytest.mark.parametrize(
    ("observed", "reference"),
    [
        (math.nan, math.nan),
        (-math.inf, -math.inf),
        (float(torch.finfo(torch.float16).min), float(torch.finfo(torch.float64).min)),
        (-math.inf, float(torch.finfo(torch.float64).min)),
        (-65504.0, -math.inf),
    ],
)
def test_masks_and_shared_nans_are_left_out(observed: float, reference: float) -> None:
    a = torch.tensor([observed, 1.0, 2.0]).half()
    r = torch.tensor([reference, 1.0, 2.0], dtype=torch.float64)
    judged = made(a, r).judge()
    assert (judged.kind, judged.score) == (None, 0.0)
    # The rest is still judged, and the mask does not widen what is allowed.
    a[1] = 1.1
    assert made(a, r).judge().score > 50


def test_nan_where_the_reference_is_a_mask_is_a_range_finding() -> None:
    judged = made(torch.tensor([math.nan, 1.0]), torch.tensor([-math.inf, 1.0]).double()).judge()
    assert judged.kind == "range"


def test_a_reference_of_nan_says_nothing_and_passes() -> None:
    assert made(torch.tensor([1.0]), torch.tensor([math.nan]).double()).judge().score == 0.0


def test_empty_tensors_are_right() -> None:
    judged = made(torch.empty(0, 3).half(), torch.empty(0, 3).double()).judge()
    assert (judged.score, judged.kind) == (0.0, None)


def test_of_an_all_zero_yardstick_only_exact_zeros_are_right() -> None:
    zeros = torch.zeros(4, dtype=torch.float64)
    assert made(zeros.half(), zeros).judge().score == 0.0
    assert made(torch.tensor([0.0, 0.0, 1e-3, 0.0]).half(), zeros).judge().score == math.inf
    assert made(torch.tensor([0.0, 0.0, 1e-8, 0.0]), zeros, step=1e-7).judge().score < 1.0


# -- decisions ---------------------------------------------------------------------------------------------------------


def test_decisions_are_counted_against_how_often_perturbed_runs_flip_them() -> None:
    reference = torch.zeros(100, dtype=torch.int64)
    observed = reference.clone()
    observed[:30] = 1
    entry = made(observed, reference)
    flipped = reference.clone()
    flipped[50:80] = 1
    often = flatten_sample(flipped, entry)
    never = flatten_sample(reference, entry)
    assert often is not None
    assert never is not None
    # By hand: 30 / (30 + 3 sqrt(30) + 3) and 30 / (0 + 0 + 3).
    assert entry.judge([often]).excess == pytest.approx(30 / (33 + 3 * math.sqrt(30)))
    assert entry.judge([never]).excess == 10.0
    assert "30 of 100 decisions differ where perturbed FP64 runs flip 0.0" in entry.judge([never]).note


def test_bools_are_decisions_and_equal_ones_are_right() -> None:
    t = torch.tensor([True, False])
    assert made(t, t.clone()).judge().score == 0.0
    worst = made(t, ~t).judge([]).score
    assert worst == pytest.approx(2 / 3)


# -- what cannot be compared -------------------------------------------------------------------------------------------


def test_shapes_and_kinds_that_differ_are_said_in_a_sentence() -> None:
    assert pair("output", torch.ones(2), torch.ones(3), 1.0) == "output has shape (2,) in the mode and (3,) in FP64"
    said = pair("output", torch.ones(2), torch.ones(2, dtype=torch.int64), 1.0)
    assert said == "output is torch.float32 in the mode and torch.int64 in FP64"


def test_a_sample_of_another_size_is_left_out() -> None:
    entry = made(torch.ones(2), torch.ones(2).double())
    assert flatten_sample(torch.ones(3), entry) is None


@pytest.mark.parametrize("layout", ["complex", "sparse", "nested", "conjugate"])
def test_every_layout_is_judged_like_its_dense_real_values(layout: str) -> None:
    def of(value: float) -> torch.Tensor:
        dense = torch.tensor([[1.0, 0.0], [0.0, value]], dtype=torch.float64)
        if layout == "complex":
            return torch.view_as_complex(dense)
        if layout == "conjugate":
            return torch.view_as_complex(dense).conj()
        if layout == "sparse":
            return dense.to_sparse()
        return torch.nested.nested_tensor(list(dense), layout=torch.jagged)

    right, wrong = made(of(2.0), of(2.0)).judge(), made(of(2.1), of(2.0)).judge()
    assert right.score == 0.0
    assert wrong.excess == pytest.approx(0.1 / 2 / (2.0**-11 / math.sqrt(3) * math.sqrt(5) / 2), rel=1e-9)


def test_the_worst_element_is_the_one_furthest_beyond_what_is_allowed() -> None:
    reference = torch.arange(1.0, 13.0, dtype=torch.float64).reshape(3, 4)
    observed = reference.clone()
    observed[2, 1] += 1.0
    observed[0, 0] += 0.5
    worst = made(observed, reference).judge(locate=1.0).worst
    assert worst is not None
    assert (worst.index, worst.value, worst.reference) == ((2, 1), 11.0, 10.0)
    assert made(observed, reference).judge(locate=math.inf).worst is None


@pytest.mark.parametrize("bad", [3, PIECE, 3 * PIECE + 4])
def test_a_large_tensor_is_judged_piece_by_piece_as_it_would_be_at_once(bad: int) -> None:
    n, u, width = 3 * PIECE + 5, 2.0**-8, 4.0
    rng = np.random.default_rng(bad)
    reference = rng.standard_normal(n)
    scales = np.where(np.arange(n) < PIECE, u, u / 8)  # the first piece spreads more than the others
    samples = [reference + scales * rng.standard_normal(n) for _ in range(4)]
    wide = [reference + width * scales * rng.standard_normal(n) for _ in range(6)]
    observed = reference + scales * rng.standard_normal(n)
    observed[bad] += 3.0

    rms = lambda a: math.sqrt((a**2).mean())  # noqa: E731
    near = np.sqrt(sum((s - reference) ** 2 for s in samples) / 4)
    far = np.sqrt(sum((s - reference) ** 2 for s in wide) / 6) / width
    common = math.hypot(max(rms(near), rms(far)), u / math.sqrt(3) * rms(reference))
    allowed = np.maximum(near, far) + u * np.abs(reference) + common
    error = observed - reference
    excess, tail = rms(error) / common, (np.abs(error) / allowed).max()

    judged = made(torch.tensor(observed), torch.tensor(reference), u).judge(
        [torch.tensor(s) for s in samples], [torch.tensor(s) for s in wide], width
    )
    assert math.isclose(judged.excess, excess, rel_tol=1e-9)
    assert math.isclose(judged.tail, tail, rel_tol=1e-9)
    assert judged.worst is not None
    assert judged.worst.index == (bad,)
    assert math.isclose(judged.worst.allowed, TAIL_RATIO * allowed[bad], rel_tol=1e-9)


def test_a_tail_that_perturbed_runs_have_by_chance_is_none() -> None:
    """The kink of a ReLU: each run changes a few elements by much, and hardly ever the same ones."""
    n, u = 10_000, 2.0**-11
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(n, generator=generator, dtype=torch.float64)

    def run(far: int | None) -> torch.Tensor:
        moved = reference * u * (2 * torch.rand(n, generator=generator, dtype=torch.float64) - 1)
        if far is not None:
            moved[far] = 0.1
        return reference + moved

    observed = run(7)
    with_kinks = pair("y", observed, reference, u)
    assert isinstance(with_kinks, Pair)
    smooth = with_kinks.judge([run(None) for _ in range(16)], locate=4.0)
    kinked = with_kinks.judge([run(100 * i) for i in range(16)], locate=4.0)
    same_place = with_kinks.judge([run(100) for _ in range(16)], locate=4.0)  # that place moves, and no other one
    assert smooth.tail > 20 * TAIL_RATIO
    assert kinked.tail <= TAIL_RATIO * 1.1
    assert same_place.tail > 10 * TAIL_RATIO


def test_a_few_rows_that_runs_change_wholly_or_not_at_all_are_choices() -> None:
    u, size = 2.0**-8, (40, 16)
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(size, generator=generator, dtype=torch.float64)

    def run(tipped: bool, width: float = 1.0, by: float = 1.0) -> torch.Tensor:
        """One run; ``by`` is how far the row goes that the choice moves."""
        moved = reference * (1 + width * u * (2 * torch.rand(size, generator=generator, dtype=torch.float64) - 1))
        moved[18] += by * tipped
        return moved

    def is_choice(observed: torch.Tensor, samples: list[torch.Tensor]) -> bool:
        entry = pair("y", observed, reference, u)
        assert isinstance(entry, Pair)
        return entry.is_choice([s.reshape(-1) for s in samples])

    def is_column(observed: torch.Tensor, samples: list[torch.Tensor]) -> bool:
        entry = pair("y", observed.T.contiguous(), reference.T.contiguous(), u)
        assert isinstance(entry, Pair)
        return entry.is_choice([s.T.reshape(-1) for s in samples])

    some = [run(tipped=i == 7, width=1 + 3 * (i > 15)) for i in range(28)]
    assert is_column(run(tipped=True), some)  # places along the last dimension, as a convolution's state has them
    none = [run(tipped=False, width=1 + 3 * (i > 15)) for i in range(28)]
    most = [run(tipped=i > 7) for i in range(28)]
    assert is_choice(run(tipped=True), some)
    assert not is_choice(run(tipped=True), none)  # no run decides so: that was no rounding
    assert not is_choice(run(tipped=True), most)  # that row moves in any run
    assert not is_choice(run(tipped=True, by=3.0), some)  # by less than it is off here
    assert not is_choice(reference + 0.1, some)  # off everywhere
    # Smoothly wrong in that row, by so many times what a plain run moves it, and a wide one moves it four times as far.
    smooth = [run(tipped=True, by=0.1 * (-1) ** i * (1 + 3 * (i > 15))) for i in range(28)]
    for times in (5, 8, 9, 10, 16):
        assert not is_choice(run(tipped=True, by=0.1 * times), smooth)


def test_infinities_of_a_mask_are_held_against_those_that_runs_move() -> None:
    u, inf = 2.0**-8, torch.inf

    def blocked(*places: int) -> torch.Tensor:
        mask = torch.zeros(8, 32, dtype=torch.float64)
        mask[:, ::4] = -inf
        for place in places:
            mask[place, 4 * place], mask[place, 4 * place + 1] = 0.0, -inf  # this row sees another place
        return mask

    def judged(observed: torch.Tensor, *samples: torch.Tensor) -> Judgement:
        entry = pair("mask", observed, blocked(), u)
        assert isinstance(entry, Pair)
        return entry.judge([s.reshape(-1) for s in samples])

    assert judged(blocked()).score == 0.0
    open_ = judged(blocked(1, 2))
    assert open_.bound
    assert math.isinf(open_.score)
    assert not open_.settled
    near_ties = [blocked(i % 8, (i + 3) % 8) for i in range(16)]
    assert judged(blocked(1, 2), *near_ties).score <= 1.0  # two rows here, two rows in each run
    assert judged(blocked(*range(8)), *near_ties).score > 1.5  # 16 places where 4 + 3 sqrt(4) are granted
    assert judged(blocked(1, 2), blocked(), blocked()).kind == "range"  # no run moves any
    assert judged(blocked().masked_fill(blocked() == 0.0, inf), *near_ties).kind == "range"  # another sign
    assert judged(blocked().masked_fill(blocked() == 0.0, torch.nan), *near_ties).kind == "range"
    wrong = blocked(1, 2)
    wrong[5, 5] = 0.25  # and a value that is wrong stays wrong
    assert judged(wrong, *near_ties).score > 4.0
