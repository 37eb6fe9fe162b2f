"""The factories of ``precision_ctx``."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pytest_precision.values import Values


@pytest.fixture
def values():
    return Values(torch.device("cpu"))


@pytest.mark.parametrize("draw", ["randn", "rand"])
def test_draws_do_not_depend_on_mode_or_other_generators(values, draw):
    first = getattr(values, draw)(100, 3)
    torch.manual_seed(1)
    torch.set_default_dtype(torch.float16)
    try:
        again = getattr(Values(torch.device("cpu")), draw)((100, 3))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(first, again)
    assert first.dtype == torch.float32
    assert not torch.equal(first, getattr(values, draw)(100, 3))


def test_rand_never_is_one(values):
    assert values.rand(1_000_000).max() < 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64])
def test_a_dtype_may_be_asked_for_and_gradients_too(values, dtype):
    x = values.randn(4, dtype=dtype, requires_grad=True)
    assert x.dtype == dtype
    assert x.is_leaf
    assert x.requires_grad


def test_randint_is_called_as_torchs_is(values):
    assert values.randint(3, (50,)).unique().tolist() == [0, 1, 2]
    x = values.randint(5, 7, (50,), dtype=torch.int32)
    assert x.unique().tolist() == [5, 6]
    assert x.dtype == torch.int32


@pytest.mark.parametrize(
    ("data", "dtype"),
    [
        ([1.0, 0.1], torch.float32),
        ([1, 2], torch.int64),
        ([True], torch.bool),
        (1j, torch.complex64),
        (np.array([0.1]), torch.float64),
        (torch.tensor([0.5], dtype=torch.float16), torch.float16),
    ],
)
def test_tensor_takes_python_values_as_float32_and_keeps_the_dtype_of_arrays(values, data, dtype):
    assert values.tensor(data).dtype == dtype
    assert values.tensor(data, dtype=torch.float64 if dtype != torch.complex64 else torch.complex128).numel()


def test_tensor_copies(values):
    data = torch.zeros(2)
    values.tensor(data).add_(1)
    assert data.sum() == 0
