"""Movements beside references, spreads, and what became of stored values, each against figures worked out otherwise."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from precision_runtime.training.course import Course
from precision_runtime.training.sheet import FREE, Entry, entries_of, screen, settle, spread_of
from precision_runtime.training.watching import Stored, spacing


def course(**end: list[float]) -> Course:
    made = Course(
        start={name: torch.zeros(len(v)) for name, v in end.items()},
        end={name: torch.tensor(v) for name, v in end.items()},
    )
    made.losses = [torch.tensor(1.0, dtype=torch.float64)]
    return made


def test_an_entry_s_floor_is_one_rounding_of_the_movement_and_of_the_stored_value() -> None:
    low, true = course(w=[1.0, 2.0, 2.0]), course(w=[1.0, 2.0, 4.0])
    (entry,) = [e for e in entries_of(low, true, 2.0**-8, set()) if e.name == "w"]
    size = np.sqrt(np.mean(np.array([1.0, 2.0, 4.0]) ** 2))
    floor = np.hypot(2.0**-8 * size, 2.0**-24 * size) / np.sqrt(3.0)
    assert entry.excess == pytest.approx(np.sqrt(4.0 / 3.0) / floor)
    assert [e.kind for e in entries_of(low, true, 2.0**-8, {"w"})] == ["buffer", "loss"]


@pytest.mark.parametrize(("early", "kind"), [([1.0, 1.0], "average"), ([0.1, 3.0], "state")])
def test_an_average_of_weights_is_known_by_where_it_was_after_one_step(early: list[float], kind: str) -> None:
    """The weights have gone from 1 to 21, and what the optimizer keeps has come half of the way."""
    low, true = (
        Course(start={"w": torch.ones(2)}, end={"w": torch.full((2,), 21.0)}, norms={"w": [torch.ones(())]},
               early={"kept": torch.tensor(early)}, state={"kept": torch.full((2,), 11.0)})
        for _ in range(2)
    )  # fmt: skip
    low.losses = true.losses = [torch.tensor(1.0, dtype=torch.float64)]
    assert {e.name: e.kind for e in entries_of(low, true, 2.0**-8, set())}["kept"] == kind


def test_a_spread_is_the_rms_distance_and_infinite_where_a_sample_diverges() -> None:
    (entry,) = [e for e in entries_of(course(w=[1.0]), course(w=[2.0]), 2.0**-8, set()) if e.name == "w"]
    assert spread_of(entry, [course(w=[5.0]), course(w=[-2.0])]) == pytest.approx(math.sqrt((9 + 16) / 2))
    assert spread_of(entry, [course(w=[math.inf])]) == math.inf


def test_samples_that_leave_a_function_s_domain_at_once_say_nothing() -> None:
    (entry,) = [e for e in entries_of(course(w=[1.0]), course(w=[2.0]), 2.0**-8, set()) if e.name == "w"]
    outside = course(w=[math.nan])
    outside.losses = [torch.tensor(math.nan, dtype=torch.float64)]
    assert spread_of(entry, [outside, course(w=[5.0])]) == pytest.approx(3.0)
    assert spread_of(entry, [outside]) == math.inf


def test_a_few_elements_of_many_may_be_anywhere_but_no_more() -> None:
    def entry(wrong: int) -> Entry:
        moved = torch.zeros(100, dtype=torch.float64)
        moved[:wrong] = 7.0
        return Entry("w", "parameter", moved, torch.zeros(100, dtype=torch.float64), 1e-3, torch.Size([100]))

    assert entry(FREE).excess == 0.0
    assert entry(FREE + 1).excess == pytest.approx(7.0 / math.sqrt(100) / 1e-3)


def test_a_verdict_takes_as_many_disturbed_trainings_as_it_needs() -> None:
    asked: list[tuple[int, float]] = []

    def sample(spread: float):
        def make(number: int, width: float, fresh: bool = False) -> Course:
            asked.append((number, width))
            return course(w=[spread * width])

        return make

    def entry(error: float) -> Entry:
        zero = torch.zeros(1, dtype=torch.float64)
        return Entry("w", "parameter", zero + error, zero, 1.0, torch.Size([1]))

    assert screen([entry(3.0)], 4.0, sample(0.0)) == []
    assert asked == []
    assert screen([entry(100.0)], 4.0, sample(100.0)) == []
    assert asked == [(0, 1.0)]
    worst = entry(1000.0)
    assert settle(screen([worst], 4.0, sample(0.0)), 4.0, sample(0.0)) == [worst]
    assert all(width == 1.0 for _, width in asked)
    open_ = entry(10.0)
    assert settle(screen([open_], 4.0, sample(2.4)), 4.0, sample(2.4)) == []  # 10 / hypot(2.4, 1) = 3.85


@pytest.mark.parametrize(("elements", "ways"), [(8, 24), (100, 4)])
def test_few_numbers_fail_only_beside_many_disturbed_trainings(elements: int, ways: int) -> None:
    """A disturbed training in eight goes as far as the mode did: four of them need not have seen it."""
    asked: set[int] = set()

    def sample(number: int, width: float, fresh: bool = False) -> Course:
        asked.add(number)
        return course(w=[20.0 if number % 8 == 7 else 0.0] * elements)

    zero = torch.zeros(elements, dtype=torch.float64)
    error = Entry("w", "parameter", zero + 20.0, zero, 1.0, torch.Size([elements]))
    failed = settle([error], 4.0, sample)
    assert len(asked) == ways
    assert bool(failed) is (ways < 8)


@pytest.mark.parametrize(("dtype", "twin"), [(torch.float16, np.float16), (torch.bfloat16, ml_dtypes.bfloat16)])
def test_the_spacing_is_that_of_the_format(dtype: torch.dtype, twin: type) -> None:
    values = torch.tensor([1.0, 1.5, 2.0, 0.1, 3e-3, 100.0, 6e4], dtype=dtype)
    plain = values.double().numpy()
    above = np.array([float(np.nextafter(twin(v), twin(np.inf))) for v in plain])
    assert torch.equal(spacing(values), torch.from_numpy(above - plain))


def test_updates_below_half_a_unit_are_counted_as_lost_and_others_as_rounded() -> None:
    value = torch.ones(2, dtype=torch.bfloat16)  # neighbours of 1: 1 + 1/128, 1 - 1/256
    stored = Stored.like(value)
    for _ in range(4):
        wanted = value.double() + torch.tensor([1e-3, 1.5 / 128])
        after = wanted.to(torch.bfloat16)
        stored.add(value, after, wanted)
        value = after
    assert (stored.gone, stored.wanted) == (4, 8)
    assert stored.lost.tolist() == pytest.approx([4e-3, 0.0])
    assert stored.total[0].item() == pytest.approx(-4e-3)
    assert stored.squares[0].item() == pytest.approx(4e-6)
    assert stored.walks  # most of the movement was stored


def test_what_a_master_keeps_is_not_lost() -> None:
    value = torch.ones(1, dtype=torch.bfloat16)
    stored = Stored.like(value)
    stored.add(value, value, value.double() + 1e-3)
    assert stored.share == 1.0
    assert not stored.walks
    stored.mastered = True
    assert stored.walk == 0.0


def test_updates_that_other_roundings_make_up_for_are_not_lost() -> None:
    """Stochastic rounding leaves a value where it was most of the time, and moves it too far otherwise."""
    value = torch.ones(1, dtype=torch.bfloat16)
    stored = Stored.like(value)
    for number in range(16):
        wanted = value.double() + 1 / 512  # a quarter of the gap
        after = value + (1 / 128 if number % 4 == 3 else 0.0)
        stored.add(value, after, wanted)
        value = after
    assert stored.gone == 12
    assert stored.share == 0.0
    assert stored.walks
