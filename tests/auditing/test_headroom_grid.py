"""Rounding to formats that no dtype has, against ml_dtypes, numpy and exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from precision_runtime.formats import FORMATS, Format
from precision_runtime.ranging.grid import HYBRIDS, doublings, halvings, round_to

NUMPY = {
    "float16": np.float16,
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}
EDGES = [
    0.0,
    -0.0,
    math.inf,
    -math.inf,
    math.nan,
    65504.0,
    65519.999,
    65520.0,
    65536.0,
    2.0**-24,
    2.0**-25,
    3 * 2.0**-26,
]


def awkward() -> torch.Tensor:
    """Every power of two of float64, on and around the middle between two neighbours of each format."""
    powers = 2.0 ** torch.arange(-170, 170, dtype=torch.float64)
    steps = [0.0, *(s * 2.0**-p for p in (3, 8, 11, 24) for s in (0.5, 1.0, 1.5, 2.0, 3.0))]
    near = [powers * (1 + s) * (1 + e) for s in steps for e in (0.0, 2.0**-50, -(2.0**-50))]
    drawn = torch.randn(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = torch.cat([*near, drawn, drawn * 1e-6, drawn * 1e4, torch.tensor(EDGES, dtype=torch.float64)])
    return torch.cat([values, -values])


@pytest.mark.parametrize("name", NUMPY)
def test_formats_that_exist_are_rounded_to_as_numpy_and_ml_dtypes_round(name: str) -> None:
    values = awkward()
    with np.errstate(over="ignore"):
        theirs = _once(values.numpy(), name).astype(np.float64)
    mine = round_to(values, FORMATS[name]).numpy()
    assert np.array_equal(mine, theirs, equal_nan=True)
    known = ~np.isnan(theirs)
    assert np.array_equal(np.signbit(mine[known]), np.signbit(theirs[known]))


def _once(values: np.ndarray, name: str) -> np.ndarray:
    """float64 in the format, rounded once: ml_dtypes goes through float32, so that is made sticky first."""
    if name in ("float16", "float32"):
        return values.astype(NUMPY[name])
    with np.errstate(over="ignore", under="ignore"):
        single = values.astype(np.float32)
    # Round to odd: an inexact float32 gets an odd last bit, which keeps it off every tie of a shorter format.
    bits = single.view(np.uint32)
    inexact = np.isfinite(values) & np.isfinite(single) & (single.astype(np.float64) != values)
    toward_zero = np.where(np.abs(single.astype(np.float64)) > np.abs(values), bits - 1, bits)
    bits = np.where(inexact, toward_zero | 1, bits).astype(np.uint32)
    return bits.view(np.float32).astype(NUMPY[name])


def exactly(value: float, form: Format) -> float:
    """Rounding by rational arithmetic, for one finite value."""
    if value == 0.0:
        return value
    exponent = max(math.frexp(value)[1] - 1, form.emin)
    step = Fraction(2) ** (exponent + 1 - form.precision)
    rounded = round(Fraction(value) / step) * step  # Python rounds halves to even
    return math.copysign(math.inf, value) if abs(rounded) > form.max else math.copysign(float(rounded), value)


@pytest.mark.parametrize("form", [*HYBRIDS.values(), FORMATS["float16"], FORMATS["tf32"]], ids=lambda f: f.name)
def test_formats_without_a_dtype_are_rounded_to_as_fractions_say(form: Format) -> None:
    @settings(max_examples=300, deadline=None)
    @given(st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.floats(-1e5, 1e5), st.floats(-1e-4, 1e-4)))
    def check(value: float) -> None:
        mine = float(round_to(torch.tensor([value], dtype=torch.float64), form))
        theirs = exactly(value, form)
        assert mine == theirs
        assert math.copysign(1.0, mine) == math.copysign(1.0, theirs)

    check()


def test_complex_values_are_rounded_in_both_parts_and_double_is_left_alone() -> None:
    z = torch.tensor([1 + 2.0**-20 + 1e5j], dtype=torch.complex128)
    assert round_to(z, FORMATS["float16"]).tolist() == [complex(1.0, math.inf)]
    x = torch.tensor([1 + 2.0**-50], dtype=torch.float64)
    assert torch.equal(round_to(x, FORMATS["float64"]), x)


def test_values_of_any_strides_are_rounded() -> None:
    x = torch.randn(6, 4, dtype=torch.float64)
    assert torch.equal(round_to(x.mT, FORMATS["bfloat16"]), round_to(x, FORMATS["bfloat16"]).mT)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@settings(max_examples=100, deadline=None)
@given(value=st.floats(2.0**-20, 2.0**20))
def test_doublings_are_those_after_which_the_value_is_still_finite(name: str, value: float) -> None:
    count = doublings(value, FORMATS[name])
    dtype = getattr(torch, name)
    held, lost = (torch.tensor([math.ldexp(value, count + i)], dtype=torch.float64).to(dtype) for i in (0, 1))
    assert bool(held.isfinite())
    assert not bool(lost.isfinite())


def test_halvings_are_those_after_which_a_cast_still_costs_little() -> None:
    form, factor = FORMATS["float16"], 4.0
    x = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    count = halvings(x, form, factor, 40)
    assert count is not None

    def cost(k: int) -> float:
        small = x * 2.0**-k
        return float((small.half().double() - small).norm() / small.norm()) / (form.unit_roundoff / 3**0.5)

    assert cost(count) <= factor < cost(count + 1)
    assert halvings(x, form, factor, count) is None  # no further than the limit
    assert halvings(x * 2.0**-40, form, factor, 40) == -1
    assert halvings(torch.zeros(3, dtype=torch.float64), form, factor, 40) is None
