"""The same random draws in every precision."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from precision_runtime import audit
from precision_runtime.auditing.executing.randomness import RandomState, seeded

DRAWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.3),
    "dropout in place": lambda x: F.dropout(x.clone(), 0.3, inplace=True),
    "feature dropout": lambda x: F.dropout1d(x[None], 0.3),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.3, training=True),
    "rand": lambda x: x + torch.rand(x.shape),
    "rand of a dtype": lambda x: x + torch.rand(x.shape, dtype=x.dtype),
    "randn": lambda x: x + torch.randn(x.shape, dtype=x.dtype),
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "rand_like of another dtype": lambda x: torch.rand_like(x, dtype=torch.float32),
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid().to(torch.float16)),
    "bernoulli_": lambda x: x.clone().bernoulli_(0.4),
    "uniform_": lambda x: x.clone().uniform_(-1, 1),
    "normal_": lambda x: x.clone().normal_(1, 2),
    "exponential_": lambda x: x.clone().exponential_(),
    "normal of tensors": lambda x: torch.normal(torch.zeros(5, 7, dtype=x.dtype), torch.ones(5, 7, dtype=x.dtype)),
    "normal of a size": lambda x: torch.normal(0.0, 1.0, (5, 7), dtype=x.dtype),
    "randint": lambda x: torch.randint(0, 100, (5,)),
    "randperm": lambda x: torch.randperm(9),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "gumbel": lambda x: F.gumbel_softmax(torch.zeros(5, 7, dtype=x.dtype)),
}


@pytest.mark.parametrize("name", [n for n in DRAWS if n != "rrelu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_draw_in_half_is_the_float64_draw_rounded(name: str, dtype: torch.dtype) -> None:
    x = torch.linspace(0.25, 4.0, 35).mul(16).round().div(16).reshape(5, 7)  # exact in bfloat16
    seen: list[torch.Tensor] = []

    def code(value: torch.Tensor) -> torch.Tensor:
        seen.append(DRAWS[name](value))
        return seen[-1]

    report = audit(code, x, mode="16-true" if dtype == torch.float16 else "bf16-true", gradients=False)
    assert report.ok, report
    low, true = seen[:2]
    assert true.dtype in (torch.float64, torch.int64)
    if not true.is_floating_point():
        assert torch.equal(low, true)
        return
    scale = float(true.abs().max())
    assert float((low.double() - true).abs().max()) <= 8 * scale * torch.finfo(dtype).eps
    assert torch.equal(low == 0, true == 0)


def test_torch_alone_draws_differently_for_different_dtypes() -> None:
    # When this fails, the canonical draws are needed no more.
    draws = []
    for dtype in (torch.float16, torch.float64):
        torch.manual_seed(7)
        draws.append(torch.rand(35, dtype=dtype).double())
    assert float((draws[0] - draws[1]).abs().max()) > 0.1


@pytest.mark.parametrize("name", [n for n in DRAWS if n not in ("randint", "randperm")])
def test_code_that_draws_holds_forward_and_backward(name: str) -> None:
    draw = DRAWS[name]
    report = audit(lambda x: draw(x).float() * x.float(), torch.randn(5, 7), mode="bf16-mixed")
    assert report.ok, report


def test_multinomial_chooses_alike() -> None:
    weights = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).repeat(64, 1)
    report = audit(lambda w: torch.multinomial(w, 2), weights, mode="16-true")
    assert report.ok, report


def test_attention_with_dropout_drops_the_same_weights() -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(16, 2, dropout=0.5, batch_first=True)
    x = torch.randn(2, 6, 16)
    report = audit(lambda v: layer(v, v, v)[0], x, mode="bf16-true")
    assert report.ok, report


def test_pythons_and_numpys_draws_are_alike_too() -> None:
    report = audit(lambda x: x * random.random() + float(np.random.rand()), torch.randn(4), mode="16-true")
    assert report.ok, report


def test_generators_are_left_as_they_were_also_when_code_raises() -> None:
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())

    def draws_and_raises() -> None:
        with seeded(3, torch.device("cpu")):
            torch.rand(3), random.random(), np.random.rand()
            raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        draws_and_raises()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()


def test_a_state_brings_every_generator_back() -> None:
    state = RandomState.capture()
    first = (torch.rand(3), random.random(), np.random.rand())
    state.restore()
    again = (torch.rand(3), random.random(), np.random.rand())
    assert torch.equal(first[0], again[0])
    assert first[1:] == again[1:]
