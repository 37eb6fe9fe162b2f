"""Runs whose roundings are drawn by chance: what is exact stays, and the rest is as far off as it must be expected."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from precision_runtime import audit
from precision_runtime.auditing.blaming.dithering import Dithering
from precision_runtime.auditing.executing.dispatch import Trace, TrueDouble
from precision_runtime.auditing.judging import replicas
from precision_runtime.auditing.judging.replicas import BY_CHANCE

HALF = (torch.float16, torch.bfloat16)


def drawn(seed: int = 0) -> Dithering:
    mode = Dithering(seed, 0)
    mode.begin([Trace()], TrueDouble())
    return mode


@pytest.mark.parametrize("dtype", HALF)
def test_what_is_exact_stays_and_what_is_not_becomes_a_neighbour(dtype: torch.dtype) -> None:
    x = torch.linspace(1.0, 1.99, 200).to(dtype)
    with drawn():
        copied, doubled, whole = x.clone(), 2.0 * x, torch.ones(200, dtype=dtype).cumsum(0)[:100] + 1.0
        third = x / 3.0
        third_in_place = x.clone().div_(3.0)
        single = x.float() / 3.0
    assert torch.equal(copied, x)
    assert torch.equal(doubled.double(), 2.0 * x.double())
    assert torch.equal(whole.double(), torch.arange(2.0, 102.0, dtype=torch.float64))
    assert torch.equal(single, x.float() / 3.0)
    for found in (third, third_in_place):
        off = found.double() - x.double() / 3.0
        step = torch.finfo(dtype).eps / torch.where(x.double() < 1.5, 4.0, 2.0)  # below 1/2 and from 1/2 on
        assert bool((off.abs() < step).all())
        assert bool((off > 0).any())
        assert bool((off < 0).any())
        nearest = ((x.double() / 3.0).to(dtype) == found).double().mean()
        assert 0.4 < float(nearest) < 0.95  # some are rounded to the farther neighbour


def total(values: torch.Tensor) -> torch.Tensor:
    out = torch.zeros((), dtype=values.dtype)
    for value in values:
        out = out + value
    return out


def test_the_error_to_be_expected_of_a_running_total_is_that_of_numpys_totals() -> None:
    by_chance, nearest = [], []
    rng = np.random.default_rng(0)
    for number in range(300):
        values = (rng.random(200) + 2.0).astype(np.float16)
        out = np.float16(0.0)
        for value in values:
            out = np.float16(out + value)
        nearest.append(float(out) - float(values.astype(np.float64).sum()))
        if number < 48:
            terms = torch.from_numpy(values)
            with drawn(number):
                by_chance.append(float(total(terms)) - float(terms.double().sum()))
    # 48 draws know an rms to about 1 / sqrt(96), 300 to 1 / sqrt(600).
    ratio = np.sqrt(np.mean(np.square(by_chance)) / np.mean(np.square(nearest)))
    assert ratio / BY_CHANCE == pytest.approx(1.0, abs=0.3)


class Total(nn.Module):
    def __init__(self, wide: bool) -> None:
        super().__init__()
        self.net, self.wide = nn.Linear(8, 1), wide

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        terms = self.net(x).abs().squeeze(-1) + 1.0
        return (total(terms.float() if self.wide else terms) / len(x)).to(x.dtype)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("seed", [2, 9])
def test_a_running_total_that_came_out_well_by_luck_is_found(
    seed: int, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judged() -> float:
        torch.manual_seed(seed)
        return audit(Total(wide), torch.randn(300, 8), mode="16-true", gradients=False).excess

    assert (judged() > 4.0) is not wide
    monkeypatch.setattr(replicas, "_by_chance", lambda replicas, site, after, *rest: after)
    assert judged() < 4.0
