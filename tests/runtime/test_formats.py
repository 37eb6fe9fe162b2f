"""Each format's numbers against ml_dtypes, which knows every code."""

import ml_dtypes
import numpy as np
import pytest
import torch

from precision_runtime.formats import FORMATS

SMALL = ("float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "float8_e8m0fnu")


def codes(name):
    """Every finite value of the format, from its codes."""
    kind = np.dtype(getattr(ml_dtypes, name))
    count = 2 ** (4 if name.startswith("float4") else 8)
    values = np.arange(count, dtype=np.uint8).view(kind).astype(np.float64)
    return values[np.isfinite(values)]


@pytest.mark.parametrize("name", SMALL)
def test_the_numbers_of_a_small_format_are_those_of_its_codes(name):
    form, values = FORMATS[name], codes(name)
    positive = np.sort(values[values > 0])
    assert form.max == positive[-1]
    assert form.smallest_subnormal == positive[0]
    assert form.eps == positive[positive > 1][0] - 1
    assert form.unit_roundoff == form.eps / 2
    # Below the smallest normal value the steps no longer shrink.
    steps = np.diff(np.concatenate([[0.0], positive])) if name != "float8_e8m0fnu" else np.diff(positive)
    first = steps[positive >= form.smallest_normal][0] if name != "float8_e8m0fnu" else positive[0]
    assert first == form.smallest_subnormal


@pytest.mark.parametrize("name", SMALL[:3])
def test_whole_numbers_are_exact_up_to_the_limit_and_not_beyond(name):
    form, values = FORMATS[name], set(codes(name))
    within = [n for n in range(form.exact_integers + 1) if n <= form.max]
    assert values.issuperset(within)
    assert form.exact_integers + 1 not in values


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_the_numbers_are_torch_s(name):
    form, info = FORMATS[name], torch.finfo(getattr(torch, name))
    assert (form.max, form.smallest_normal, form.eps) == (info.max, info.smallest_normal, info.eps)
