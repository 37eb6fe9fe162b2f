"""One FP64 run that goes on with the low-precision run's values at each border stands in for replays of sound calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from precision_runtime import audit
from precision_runtime.auditing.judging.borders import Borders
from precision_runtime.auditing.judging.judge import Judge
from precision_runtime.auditing.judging.replays import Replays
from precision_runtime.record import Report


class Coarse(torch.autograd.Function):
    """The identity, with a gradient that has lost all but two bits."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (grad,) = grads
        if grad.dtype == torch.float64:
            return grad
        mantissa, exponent = torch.frexp(grad.float())
        return torch.ldexp((mantissa * 4).round() / 4, exponent).to(grad.dtype)


class Block(nn.Module):
    """A block without a bypass, so that errors add up.

    ``bad``: the code between its parts has a coarse gradient; the parts themselves are right.
    """

    def __init__(self, width: int, bad: bool = False) -> None:
        super().__init__()
        self.norm, self.up, self.act = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU()
        self.down, self.bad = nn.Linear(2 * width, width), bad

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.act(self.up(self.norm(x)))
        if self.bad:
            inner = Coarse.apply(inner)  # type: ignore[no-untyped-call]
        result: torch.Tensor = self.down(inner)
        return result


class Net(nn.Module):
    """Blocks between an embedding and a head, within one part that holds nearly all of it."""

    def __init__(self, depth: int = 10, bad: Sequence[int] = (), width: int = 16) -> None:
        super().__init__()
        blocks = (Block(width, i in bad) for i in range(depth))
        self.body = nn.Sequential(nn.Embedding(50, width), *blocks)
        self.head = nn.Linear(width, 50)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.body(ids))
        return result


def judged(*bad: int, mode: str = "bf16-true", budget: float = 2.0) -> Report:
    torch.manual_seed(0)
    return audit(Net(bad=bad), torch.randint(50, (4, 16)), mode=mode, budget=budget)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the calls that are replayed with their gradients."""
    names: list[str] = []
    true = Replays.true

    def counted(self: Replays, call: Any, buffers: Any = None, gradients: bool = True, screening: Any = None) -> Any:
        if gradients:
            names.append(call.name)
        return true(self, call, buffers, gradients, screening)

    monkeypatch.setattr(Replays, "true", counted)
    return names


def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replay every call that does not pass, as if nothing could explain it."""
    monkeypatch.setattr(Judge, "_explain", lambda self, call: False)


@pytest.mark.parametrize("mode", ["bf16-true", "16-mixed"])
def test_sound_calls_are_not_replayed_backward_and_the_whole_is_judged_as_before(
    mode: str, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    explained = judged(mode=mode)
    few = len(asked)
    asked.clear()
    without(monkeypatch)
    replayed = judged(mode=mode)
    assert explained.ok, explained
    assert replayed.ok, replayed
    assert explained.whole == replayed.whole
    assert few < len(asked) / 4, (few, len(asked))


@pytest.mark.parametrize("bad", [2, 8])
def test_a_defect_between_the_parts_is_found_and_named_as_by_replays(bad: int, monkeypatch: pytest.MonkeyPatch) -> None:
    explained = judged(bad)
    without(monkeypatch)
    assert not explained.ok
    assert explained.to_dict() == judged(bad).to_dict()
    assert (explained.findings[0].where, explained.findings[0].module) == ("backward", f"body.{bad + 1}")


def test_where_stretches_look_sound_and_the_whole_fails_each_call_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Borders, "explains", lambda self, call: True)
        explained = judged(*range(10), budget=1.0)
    without(monkeypatch)
    assert not explained.ok
    assert explained.to_dict() == judged(*range(10), budget=1.0).to_dict()


def test_a_run_that_cannot_be_made_leaves_replays(monkeypatch: pytest.MonkeyPatch, asked: list[str]) -> None:
    def refuse(self: Borders, call: Any, output: object) -> object:
        raise RuntimeError("no")

    monkeypatch.setattr(Borders, "values", refuse)
    assert judged().ok
    assert "body" in asked


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Borders, Judge]]:
    """The runs that were made, beside their judges."""
    found: list[tuple[Borders, Judge]] = []
    explain = Judge._explain

    def kept(self: Judge, call: Any) -> bool:
        answer = explain(self, call)
        if self._explaining is not None:
            found.append((self._explaining, self))
        return answer

    monkeypatch.setattr(Judge, "_explain", kept)
    return found


def test_only_the_calls_around_an_unsound_stretch_are_open(made: list[tuple[Borders, Judge]]) -> None:
    judged(2)
    borders, judge = made[0]
    sound = {c.name: borders.explains(c) for c in judge.low.calls}
    assert not sound["body"]
    assert not sound["body.3"]
    assert all(sound[f"body.{i}"] for i in (1, 2, 4, 10))
    assert all(sound[f"body.3.{part}"] for part in ("norm", "up", "act", "down"))


def test_what_arrives_is_what_the_stretch_alone_makes_of_the_low_gradients(
    made: list[tuple[Borders, Judge]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vector-Jacobian product of each linear layer, worked out by hand from the low run's own gradients."""
    arrived: dict[str, torch.Tensor] = {}
    arrive = Borders.arrive

    def seen(self: Borders, call: Any, path: str, grad: torch.Tensor, inside: bool) -> Any:
        if inside:
            arrived[call.name] = grad.detach().clone()
        return arrive(self, call, path, grad, inside)

    monkeypatch.setattr(Borders, "arrive", seen)
    torch.manual_seed(0)
    net = Net()
    weights = {n: m.weight.detach().double() for n, m in net.named_modules() if isinstance(m, nn.Linear)}
    assert audit(net, torch.randint(50, (4, 16)), mode="bf16-true").ok
    _, judge = made[0]
    linear = [c for c in judge.low.calls if c.name in weights]
    assert len(linear) == 21
    for call in linear:
        (incoming,) = call.output_grads.values()
        expected = incoming.double() / judge.low.scale @ weights[call.name]
        torch.testing.assert_close(arrived[call.name], expected, rtol=1e-12, atol=1e-12)
