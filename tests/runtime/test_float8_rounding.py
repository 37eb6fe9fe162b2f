"""Rounding by float32 arithmetic, against ml_dtypes, torch's own casts and exact fractions."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from precision_runtime.float8.hadamard import SIZE, matrix, rotated
from precision_runtime.float8.rounding import rounded, rounded_by_chance
from precision_runtime.formats import FORMATS

NAMES = ("float8_e4m3fn", "float8_e5m2", "float4_e2m1fn")


def codes(name):
    """Every finite value, by ml_dtypes."""
    values = np.arange(16 if name.startswith("float4") else 256, dtype=np.uint8).view(getattr(ml_dtypes, name))
    wide = values.astype(np.float64)
    return np.unique(wide[np.isfinite(wide)])


def nearest(value, values):
    """The slow twin: the nearest of ``values``, ties to the one with an even code, in exact fractions."""
    exact = Fraction(float(value))
    ranked = sorted((abs(Fraction(v) - exact), v) for v in values.tolist())
    best = [v for distance, v in ranked if distance == ranked[0][0]]
    if len(best) == 1:
        return best[0]
    positive = sorted({abs(v) for v in values.tolist()})
    return next(v for v in best if positive.index(abs(v)) % 2 == 0)


@pytest.mark.parametrize("name", NAMES)
def test_every_code_stays_what_it_is(name):
    values = torch.from_numpy(codes(name)).float()
    assert torch.equal(rounded(values, FORMATS[name]), values)
    noise = torch.full_like(values, 1 - 2.0**-24)  # whatever chance says
    assert torch.equal(rounded_by_chance(values, FORMATS[name], noise), values)


@pytest.mark.parametrize("name", NAMES)
def test_midpoints_and_their_neighbours_go_where_exact_fractions_say(name):
    values = codes(name)
    middle = torch.from_numpy((values[:-1] + values[1:]) / 2).float()
    points = torch.cat([middle, middle.nextafter(torch.tensor(1e9)), middle.nextafter(torch.tensor(-1e9))])
    assert rounded(points, FORMATS[name]).tolist() == [nearest(p, values) for p in points.tolist()]


@pytest.mark.parametrize("name", NAMES)
@given(value=st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_any_number_is_rounded_as_ml_dtypes_rounds_it(name, value):
    form = FORMATS[name]
    clamped = np.clip(np.float32(value), -form.max, form.max).astype(np.float32)
    expected = clamped.astype(getattr(ml_dtypes, name)).astype(np.float32)
    assert rounded(torch.tensor([value]), form).item() == expected


@pytest.mark.parametrize("name", NAMES[:2])
def test_many_numbers_are_rounded_as_torch_casts_them(name):
    form, generator = FORMATS[name], torch.Generator().manual_seed(0)
    values = torch.randn(100_000, generator=generator) * torch.logspace(-8, 4, 100_000)
    expected = values.clamp(-form.max, form.max).to(getattr(torch, name)).float()
    assert torch.equal(rounded(values, form), expected)


@pytest.mark.parametrize("name", NAMES)
def test_inf_saturates_and_nan_stays(name):
    result = rounded(torch.tensor([float("inf"), -float("inf"), float("nan")]), FORMATS[name])
    assert result[:2].tolist() == [FORMATS[name].max, -FORMATS[name].max]
    assert result[2].isnan()


@pytest.mark.parametrize("name", NAMES)
@given(value=st.floats(-8, 8, width=32), noise=st.integers(0, 2**24 - 1))
def test_chance_takes_one_of_the_two_neighbours(name, value, noise):
    form, values = FORMATS[name], codes(name)
    value = max(-form.max, min(form.max, value))
    result = rounded_by_chance(torch.tensor([value]), form, torch.tensor([noise * 2.0**-24])).item()
    around = {values[values <= value].max(), values[values >= value].min()}
    assert result in around


def test_chance_is_right_on_average():
    # Three tenths of the way from 4 to 6: 6 in three tenths of all cases. Five standard deviations of the mean.
    count = 200_000
    noise = torch.rand(count, generator=torch.Generator().manual_seed(1))
    result = rounded_by_chance(torch.full((count,), 4.6), FORMATS["float4_e2m1fn"], noise)
    assert set(result.tolist()) == {4.0, 6.0}
    assert abs(result.double().mean().item() - 4.6) < 5 * 2 * (0.3 * 0.7 / count) ** 0.5


def test_the_hadamard_matrix_is_orthogonal_and_has_signs_by_row():
    H = matrix(torch.device("cpu")).double()
    assert torch.equal(H @ H.T, torch.eye(SIZE, dtype=torch.float64))
    # Without the signs it is Sylvester's: [[h, h], [h, -h]], four times over.
    plain = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):
        plain = torch.cat([torch.cat([plain, plain], 1), torch.cat([plain, -plain], 1)])
    assert torch.equal((H * H[:, :1].sign()) * 4, plain)


def test_rotated_operands_have_the_same_product():
    generator = torch.Generator().manual_seed(2)
    # Whole numbers below 16 stay exact in bfloat16 through sums of sixteen quarters.
    a, b = (torch.randint(-3, 4, (32, n), generator=generator).float() for n in (5, 7))
    assert torch.equal(rotated(a).T @ rotated(b), a.T @ b)
