"""Recurrent layers: stepping through them by hand is what torch does, and their honest rounding is no finding."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

from precision_runtime import audit
from precision_runtime.auditing.executing import recurrent
from precision_runtime.auditing.executing.noise import Noise
from precision_runtime.auditing.executing.recurrent import noisy_states, step_through

LAYERS = {
    "lstm": lambda **k: nn.LSTM(5, 7, **k),
    "gru": lambda **k: nn.GRU(5, 7, **k),
    "tanh": lambda **k: nn.RNN(5, 7, **k),
    "relu": lambda **k: nn.RNN(5, 7, nonlinearity="relu", **k),
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_layers": 3},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"bias": False},
]


def same(value: torch.Tensor) -> torch.Tensor:
    return value


def assert_equal(actual: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        # Sums of a handful of float64 terms in another order.
        assert actual.shape == expected.shape
        assert float((actual - expected).detach().abs().max()) < 1e-14
        return
    if isinstance(expected, nn.utils.rnn.PackedSequence):
        assert torch.equal(actual.batch_sizes, expected.batch_sizes)
        actual, expected = (actual.data,), (expected.data,)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert_equal(a, e)


@pytest.mark.parametrize("options", OPTIONS, ids=[" ".join(o) or "plain" for o in OPTIONS])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("given", [False, True], ids=["zero state", "given state"])
def test_stepping_without_noise_is_the_layer_itself(layer: str, options: dict[str, Any], given: bool) -> None:
    torch.manual_seed(0)
    module = LAYERS[layer](**options).double()
    rows = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    for x, batch in (
        (torch.randn(6, 3, 5).double(), (3 if not options.get("batch_first") else 6,)),
        (torch.randn(6, 5).double(), ()),
    ):
        state = torch.randn(rows, *batch, 7).double()
        hx = None if not given else (state, state * 0.5) if layer == "lstm" else state
        assert_equal(step_through(module, x, hx, same), module(x, hx))


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("batched", [True, False])
def test_a_projected_lstm_too(directions: int, batched: bool) -> None:
    torch.manual_seed(0)
    module = nn.LSTM(5, 7, num_layers=2, proj_size=3, bidirectional=directions == 2).double()
    x = torch.randn(*((6, 2, 5) if batched else (6, 5))).double()
    assert_equal(step_through(module, x, None, same), module(x))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("ordered", [True, False])
def test_packed_sequences_too(layer: str, directions: int, ordered: bool) -> None:
    torch.manual_seed(0)
    module = LAYERS[layer](num_layers=2, bidirectional=directions == 2).double()
    if ordered:
        packed = pack_sequence([torch.randn(n, 5).double() for n in (4, 2, 1)])
    else:
        packed = pack_padded_sequence(torch.randn(5, 3, 5).double(), torch.tensor([2, 5, 3]), enforce_sorted=False)
    assert_equal(step_through(module, packed, None, same), module(packed))


@pytest.mark.parametrize(
    ("layer", "sums", "inner"),
    [
        ("lstm", 28, {28: 1, 7: 4 + 1 + 2}),  # four gates in one sum; each gate, tanh(c), h and c
        ("gru", 21, {21: 1, 7: 3 + 3 + 1}),  # r, z and n, each as a sum and behind its activation, and h
        ("tanh", 7, {7: 1 + 1}),  # the sum and h
    ],
)
def test_every_sum_gate_and_new_state_is_disturbed_once(layer: str, sums: int, inner: dict[int, int]) -> None:
    seen: Counter[tuple[int, ...]] = Counter()

    def count(state: torch.Tensor) -> torch.Tensor:
        seen[tuple(state.shape)] += 1
        return state

    step_through(LAYERS[layer](num_layers=2), torch.randn(9, 2, 5), None, count)
    steps = 9 * 2  # in each of two layers
    assert seen == Counter({(9, 2, sums): 2} | {(2, width): number * steps for width, number in inner.items()})


def test_gradients_that_come_back_to_a_step_are_disturbed_too() -> None:
    module = nn.RNN(5, 7).double()
    x = torch.randn(9, 2, 5, dtype=torch.float64, requires_grad=True)
    (plain,) = torch.autograd.grad(module(x)[0].sum(), x)
    backward = False

    def noise(t: torch.Tensor) -> torch.Tensor:
        return t * 1.25 if backward else t.clone()

    with noisy_states([module], noise):
        out = module(x)[0].sum()
        backward = True
        (disturbed,) = torch.autograd.grad(out, x)
    # The gradient of the last input comes back to the new state, the sum, and the inputs' part of it.
    assert torch.allclose(disturbed[-1], plain[-1] * 1.25**3, rtol=1e-12)


def test_each_partial_sum_of_a_weights_gradient_is_disturbed() -> None:
    """Over the steps the gradient is S_1 = g_1 + S_2, S_2 = g_2 + S_3, ...; S_k is off by u |S_k| / sqrt(3) (rms)."""
    u, steps = 2.0**-8, torch.randn(50, 4, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
    weight = torch.zeros(4, 400, dtype=torch.float64, requires_grad=True)
    noise, total, again = Noise(u, 0, 0), torch.zeros((), dtype=torch.float64), weight
    for step in steps:
        totalled = recurrent._totalled(again, noise)
        assert totalled is not None
        again = totalled
        total = total + (again * step).sum()
    (found,) = torch.autograd.grad(total, weight)
    partial = steps.flip(0).cumsum(0)
    expected = float(partial.square().sum(0).mean().sqrt()) * u / math.sqrt(3.0)
    off = float((found - partial[-1]).square().mean().sqrt())
    assert off == pytest.approx(expected, rel=0.1)  # an rms over 1,600 elements


@pytest.mark.parametrize("mode", ["16-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_gradients_that_are_totals_over_128_steps_are_no_finding(kind: type[nn.RNNBase], mode: str) -> None:
    torch.manual_seed(2)
    report = audit(kind(64, 16, batch_first=True), torch.randn(2, 128, 64), mode=mode)
    assert report.ok, report
    assert report.excess < 2.5  # up to 5.7 where only the states are disturbed


def test_the_layers_forward_is_put_back_also_when_code_raises() -> None:
    module = nn.GRU(2, 2)

    def fail() -> None:
        assert "forward" in vars(module)
        raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"), noisy_states([module], same):
        fail()
    assert "forward" not in vars(module)
    mine = vars(module)["forward"] = lambda x, hx=None: (x, hx)
    with noisy_states([module], same):
        assert vars(module)["forward"] is not mine
    assert vars(module)["forward"] is mine


def remembers(kind: type[nn.RNNBase], gate: float) -> nn.RNNBase:
    """A layer whose gates keep nearly all of the state, as training for long memories leaves them.

    So each rounding of the state stays, and 160 of them add up.
    """
    torch.manual_seed(3)
    layer = kind(8, 32, batch_first=True)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
        layer.bias_hh_l0[32:64] += gate  # the forget gate of an LSTM, the update gate of a GRU
    return layer


@pytest.mark.parametrize(("kind", "gate"), [(nn.LSTM, 6.0), (nn.GRU, 2.0), (nn.GRU, 6.0)])
@pytest.mark.parametrize("mode", ["16-true", "bf16-true"])
def test_160_honest_steps_are_no_finding(kind: type[nn.RNNBase], gate: float, mode: str) -> None:
    layer = remembers(kind, gate)
    report = audit(layer, torch.randn(1, 160, 8), mode=mode, gradients=False)
    assert report.ok, report


def test_without_noise_on_the_state_they_would_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = remembers(nn.LSTM, 6.0)
    for module in ("judging.replays", "executing.running"):
        monkeypatch.setattr(f"precision_runtime.auditing.{module}.noisy_states", lambda *_: nullcontext())
    assert audit(layer, torch.randn(1, 160, 8), mode="16-true", gradients=False).excess > 4


class ByHand(nn.Module):
    """A leaky sum of tiny steps over time; the bad twin keeps its state in the low dtype without rounding in mind."""

    def __init__(self, bad: bool) -> None:
        super().__init__()
        self.bad = bad

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = x.new_zeros(x.shape[0], x.shape[2]) if self.bad else x.new_zeros(x.shape[0], x.shape[2]).float()
        for part in x.unbind(1):
            state = state + part
        return state.to(x.dtype)


@pytest.mark.parametrize("bad", [False, True])
def test_a_running_total_in_the_low_dtype_is_one(bad: bool) -> None:
    torch.manual_seed(0)
    x = torch.rand(2, 400, 4) + 0.5
    net = nn.Sequential(ByHand(bad))
    report = audit(net, x, mode="bf16-true", gradients=False)
    assert report.ok is not bad, report
    if bad:  # the second witness: bfloat16 adds nothing to 256 that is below 1
        assert math.isclose(float(torch.tensor(256.0).bfloat16() + torch.tensor(0.9).bfloat16()), 256.0)
        assert (report.findings[0].kind, report.findings[0].op) == ("kernel", "aten::add")
