"""Stochastic rounding: every word tried, the mean compared as fractions; torchao as an outside witness."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from precision_runtime.stepping.rounding import BITS, mixed, round_stochastically, words_like

NUMPY = {torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16}


def neighbours(value, dtype):
    """The largest value of the format towards zero, and the next one away from it, found with numpy: slow, plain."""
    kind = NUMPY[dtype]
    near = np.float32(value).astype(kind)
    lower = near if abs(float(near)) <= abs(value) else np.nextafter(near, kind(0))
    return float(lower), float(np.nextafter(lower, kind(math.copysign(math.inf, value))))


def outcomes(value, dtype, words):
    values = torch.full((len(words),), value, dtype=torch.float32)
    return round_stochastically(values, dtype, torch.tensor(words, dtype=torch.int32))


def every(drop):
    """One word for each way in which its highest ``drop`` bits can fall; the lower bits must not count."""
    return [(i << (BITS - drop)) | ((i * 7) % (1 << (BITS - drop))) for i in range(1 << drop)]


CASES = [
    (torch.bfloat16, 16, v) for v in (1.0 + 2**-9, 1.0 + 3 * 2**-23, -0.1, 3.3e38, 1e-39, 3 * 2.0**-149, 0.0, 1.5)
] + [(torch.float16, 13, v) for v in (1.0 + 2**-12, -0.1, 1000.1, 65000.0, 2.0**-14 * 1.1)]


@pytest.mark.parametrize(("dtype", "drop", "value"), CASES)
def test_the_mean_over_all_words_is_the_value_itself(dtype, drop, value):
    value = float(np.float32(value))
    results = [Fraction(r) for r in outcomes(value, dtype, every(drop)).double().tolist()]
    assert sum(results) / len(results) == Fraction(value)
    assert {float(r) for r in results} <= set(neighbours(value, dtype)) | {value}


@pytest.mark.parametrize("exponent", range(-24, -14))
def test_below_float16s_smallest_normal_value_the_mean_is_still_exact(exponent):
    # More bits go there, 13 + (-14 - exponent): all of them are tried where that is feasible, else those that matter.
    value = float(np.float32(1.3 * 2.0**exponent))
    drop = min(23, 13 - 14 - exponent)
    lower, upper = neighbours(value, torch.float16)
    share = (Fraction(value) - Fraction(lower)) / (Fraction(upper) - Fraction(lower))
    threshold = (1 << drop) - int(share * (1 << drop))  # the words from here on carry
    assert share * (1 << drop) == (1 << drop) - threshold
    words = [w << (BITS - drop) for w in (0, threshold - 1, threshold, (1 << drop) - 1)]
    assert outcomes(value, torch.float16, words).tolist() == [lower, lower, upper, upper]


@given(st.floats(2.0**-40, 2.0**-24, width=32, exclude_max=True), st.sampled_from([1, -1]))
def test_below_float16s_smallest_value_the_probability_is_the_quotient(value, sign):
    up = math.ceil(Fraction(value) / Fraction(2) ** -24 * 2**BITS)  # so many words lead up
    words = [w for w in (0, up - 1, up, 2**BITS - 1) if 0 <= w < 2**BITS]
    results = outcomes(sign * value, torch.float16, words).double().abs().tolist()
    assert results == [2.0**-24 if w < up else 0.0 for w in words]


@pytest.mark.parametrize("dtype", NUMPY)
@given(st.floats(width=16), st.integers(0, 2**BITS - 1))
def test_what_the_format_holds_stays(dtype, value, word):
    value = float(np.float32(value).astype(NUMPY[dtype]))
    (result,) = outcomes(value, dtype, [word]).tolist()
    if math.isnan(value):
        assert math.isnan(result)
    else:
        assert (result, math.copysign(1, result)) == (value, math.copysign(1, value))


def test_infinity_and_nan_stay_for_every_word():
    for dtype in NUMPY:
        for word in (0, 2**BITS - 1):
            result = round_stochastically(
                torch.tensor([math.inf, -math.inf, math.nan]), dtype, torch.full((3,), word, dtype=torch.int32)
            )
            assert result[:2].tolist() == [math.inf, -math.inf]
            assert result[2].isnan()


def test_it_is_torchaos_rounding_bit_for_bit():
    # Theirs goes up where a random word of 16 bits is below the fraction, ours where the word carries.
    theirs = pytest.importorskip("torchao.optim.quant_utils")._fp32_to_bf16_sr
    values = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 4096)
    torch.manual_seed(1)
    expected = theirs(values)
    torch.manual_seed(1)
    words = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32)
    ours = round_stochastically(values, torch.bfloat16, (0xFFFF - words) << (BITS - 16))
    assert torch.equal(ours, expected)


def test_words_are_uniform_and_repeatable():
    generator = torch.Generator().manual_seed(3)
    words = words_like(torch.empty(100_000), generator)
    assert torch.equal(words, words_like(torch.empty(100_000), torch.Generator().manual_seed(3)))
    assert words.dtype is torch.int32
    # The mean of n uniform words is off by 6 standard errors once in 500 million times; the seed is fixed anyhow.
    assert abs(words.double().mean().item() / 2**BITS - 0.5) < 6 / math.sqrt(12 * 100_000)
    assert (words.min().item() >= 0) & (words.max().item() < 2**BITS)


def test_seeds_of_neighbouring_steps_share_nothing():
    seeds = {mixed(seed, step) for seed in range(50) for step in range(50)}
    assert len(seeds) == 2500
    assert all(0 <= s < 2**32 for s in seeds)
    flips = [bin(mixed(0, step) ^ mixed(0, step + 1)).count("1") for step in range(200)]
    assert 14 < sum(flips) / len(flips) < 18  # of 32 bits half change
