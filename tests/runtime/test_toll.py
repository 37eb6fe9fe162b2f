import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from precision_runtime.formats import FORMATS
from precision_runtime.planning.toll import Toll, changed, is_readable, toll

HALF = {torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16}


def plain(values, dtype):
    """The counts by numpy's casts, value by value."""
    array = np.asarray(values, dtype=np.float32).reshape(-1)
    with np.errstate(over="ignore"):
        after = array.astype(HALF[dtype]).astype(np.float32)
    finite = np.isfinite(array)
    whole = bool(np.all(array == np.round(array)))
    return (
        int((finite & ~np.isfinite(after)).sum()),
        int(((array != 0) & (after == 0)).sum()),
        int((np.isfinite(after) & (after != array)).sum()) if whole else 0,
    )


def counts(tensor, dtype):
    found = toll(tensor, dtype)
    return found.inf, found.zero, found.whole


@pytest.mark.parametrize("dtype", HALF)
@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.floats(width=32),
            st.integers(-100_000, 100_000).map(float),
            st.floats(2.0**-27, 2.0**-23, width=32),
            st.floats(65_000.0, 66_000.0, width=32),
        ),
        min_size=1,
        max_size=40,
    )
)
def test_counts_are_those_of_numpy_s_casts(dtype, values):
    assert counts(torch.tensor(values), dtype) == plain(values, dtype)


@pytest.mark.parametrize("dtype", HALF)
@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-5000, 5000).map(float), min_size=1, max_size=40))
def test_whole_numbers_are_counted_among_themselves(dtype, values):
    assert counts(torch.tensor(values), dtype) == plain(values, dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_every_magnitude_around_the_ends_of_a_format(dtype):
    form = FORMATS[str(dtype).removeprefix("torch.")]
    ends = torch.tensor([form.smallest_subnormal / 2, form.smallest_subnormal, min(form.max, 3.3895e38)])
    bits = ends.view(torch.int32)[:, None] + torch.arange(-3000, 3000, dtype=torch.int32)
    values = bits.view(torch.float32)
    assert counts(values, dtype) == plain(values.numpy(), dtype)
    assert counts(values, dtype)[1] > 0


@pytest.mark.parametrize("dtype", HALF)
def test_a_tensor_of_many_pieces_is_counted_to_its_end(dtype):
    torch.manual_seed(0)
    values = torch.randn(301, 257) * torch.logspace(-45, 38, 257)
    values[300, 256] = 3e38
    values[300, 255] = 1e-44
    assert counts(values, dtype) == plain(values.numpy(), dtype)
    assert counts(values.t(), dtype) == plain(values.numpy(), dtype)
    assert counts(torch.arange(60_000.0), dtype) == plain(np.arange(60_000.0), dtype)


def test_inf_and_nan_that_are_there_already_count_nowhere():
    values = torch.tensor([math.inf, -math.inf, math.nan, 1.0, 3000.5])
    assert counts(values, torch.float16) == (0, 0, 0)
    values[3] = 1e5
    assert counts(values, torch.float16) == (1, 0, 0)


def test_float64_is_cast_as_torch_casts_it():
    near = 2.0**-25 * (1 + 2.0**-40)  # torch goes through float32, and rounds twice
    values = torch.tensor([near, 65519.9999999, 0.1], dtype=torch.float64)
    after = values.half()
    assert counts(values, torch.float16)[:2] == (int(after.isinf().sum()), int((after == 0).sum()))
    assert counts(values, torch.float32) == (0, 0, 0)
    assert counts(torch.tensor([1e300, 1e-300], dtype=torch.float64), torch.float32) == (1, 1, 0)


@pytest.mark.parametrize(("before", "after"), [(torch.float16, torch.float32), (torch.bfloat16, torch.float64)])
def test_a_wider_format_costs_nothing(before, after):
    assert toll(torch.full((4,), 300.0, dtype=before), after) == Toll(4)


def test_bfloat16_may_overflow_in_float16():
    assert counts(torch.tensor([1e5, 1.0, 1e-20], dtype=torch.bfloat16), torch.float16) == (1, 1, 0)
    assert counts(torch.tensor([6e4, 6e-8], dtype=torch.float16), torch.bfloat16) == (0, 0, 0)


def heavy(rows, dtype=torch.float16):
    """Whether what a row loses outweighs what rounding it costs, in exact fractions."""
    u = Fraction(FORMATS["float16"].unit_roundoff)
    for row in rows:
        squares = [Fraction(v) ** 2 for v in row]
        lost = sum(s for s, v in zip(squares, row, strict=True) if abs(v) <= 2.0**-25)
        if lost > u**2 / 3 * sum(squares):
            return True
    return False


@pytest.mark.parametrize(
    "rows",
    [
        [[0.1, 1e-9], [0.2, 0.3]],
        [[0.1, 0.2], [1e-9, 1e-9]],
        [[1e-4, 2.0**-25], [1.0, 1.0]],
        [[1e-5, 2.0**-25], [1.0, 1.0]],
        [[2.0**-15, 2.0**-26] * 30_000],
        [[2.0**-11, 2.0**-26] * 30_000],
    ],
)
def test_what_becomes_zero_is_weighed_by_row(rows):
    found = toll(torch.tensor(rows), torch.float16)
    assert found.zero
    assert found.heavy is heavy(torch.tensor(rows).tolist())


def test_both_verdicts_occur():
    assert heavy([[1e-5, 2.0**-25]])
    assert not heavy([[0.1, 2.0**-25]])


def test_a_number_of_its_own_is_heavy_when_it_goes():
    assert toll(torch.tensor(1e-9), torch.float16).heavy


def test_changed_values_are_counted():
    values = torch.tensor([0.5, 0.1, math.nan, 1 / 3, 2.0], dtype=torch.float64)
    assert changed(values, torch.float32) == 2
    assert changed(values.float(), torch.bfloat16) == 2


def test_what_cannot_be_looked_at_is_unknown():
    for tensor in (torch.empty(3, device="meta"), torch.eye(3).to_sparse(), torch.arange(3)):
        assert toll(tensor, torch.float16) is None
    assert not is_readable(torch.eye(3).to_sparse())


def test_an_empty_tensor_costs_nothing():
    assert toll(torch.empty(0, 3), torch.float16) == Toll(0)
