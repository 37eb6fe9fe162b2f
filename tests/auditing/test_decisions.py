"""A decision that only the rounding of what it is made by has tipped is found, and one on a near tie is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from precision_runtime import audit
from precision_runtime.auditing.executing.dispatch import LowWatch
from precision_runtime.auditing.executing.provenance import Provenance

TRUE = {"16-true": torch.float16, "bf16-true": torch.bfloat16}
HALF = [*TRUE, "16-mixed", "bf16-mixed"]


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wide(t: torch.Tensor) -> torch.Tensor:
    return t.float() if t.dtype in TRUE.values() else t


class Frozen(nn.Module):
    """Tokens whose time has come to 1 stay as they are; times are given as whole thousandths of a percent."""

    def __init__(self, careful: bool) -> None:
        super().__init__()
        self.net, self.careful = nn.Linear(8, 8), careful

    def forward(self, x: torch.Tensor, ticks: torch.Tensor) -> torch.Tensor:
        y = self.net(x)
        t = ticks.to(wide(y).dtype if self.careful else y.dtype) / 100_000
        return torch.where((t >= 1)[:, None], x.to(y.dtype), y)


def ticks() -> torch.Tensor:
    return torch.tensor([100_000, 99_990, 52_000, 99_985] * 8)


class Dueling(nn.Module):
    """The best of five actions, by value plus advantage or by the advantage alone: in exact numbers it is the same."""

    def __init__(self, careful: bool) -> None:
        super().__init__()
        self.value, self.what, self.careful = nn.Linear(6, 1), nn.Parameter(draws(5, 4)), careful
        with torch.no_grad():
            self.value.bias.fill_(1500.0)

    def chosen(self, advantage: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Advantages (N, 5), states (N, 6)."""
        value = self.value(x)
        return (advantage if self.careful else value + advantage.to(value.dtype)).argmax(-1)

    def forward(self, advantage: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.what[self.chosen(advantage, x)]


class Actions(Dueling):
    """Gives the actions themselves."""

    def forward(self, advantage: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.chosen(advantage, x)


def advantages() -> torch.Tensor:
    order = torch.stack([torch.randperm(5, generator=torch.Generator().manual_seed(n)) for n in range(60)])
    return 0.2 * order + 0.01 * draws(60, 5)


@pytest.mark.parametrize("mode", HALF)
def test_a_decision_by_integers_that_the_code_rounds(mode: str) -> None:
    report = audit(Frozen(careful=False), draws(32, 8), ticks(), mode=mode, gradients=False)
    assert not report.ok, report
    first = report.findings[0]
    assert "ticks.to(" in (first.line or "") or "t >= 1" in (first.line or ""), report
    assert audit(Frozen(careful=True), draws(32, 8), ticks(), mode=mode, gradients=False).ok


@pytest.mark.parametrize("dtype", TRUE.values(), ids=str)
def test_plain_torch_says_so_too(dtype: torch.dtype) -> None:
    exact = ticks() >= 100_000
    assert not torch.equal(ticks().to(dtype) / 100_000 >= 1, exact)
    assert torch.equal(ticks().float() / 100_000 >= 1, exact)


@pytest.mark.parametrize("kind", [Dueling, Actions])
@pytest.mark.parametrize("mode", HALF)
def test_a_decision_by_what_a_common_offset_has_rounded_away(mode: str, kind: type[Dueling]) -> None:
    given = advantages(), draws(60, 6)
    report = audit(kind(careful=False), *given, mode=mode, gradients=kind is Dueling)
    assert not report.ok, report
    first = report.findings[0]
    assert (first.op, first.kind) == ("aten::add", "instability"), report
    assert "value + advantage" in (first.line or "")
    assert first.proof
    assert audit(kind(careful=True), *given, mode=mode, gradients=kind is Dueling).ok


def test_few_that_fall_otherwise_may_have_done_so_by_chance() -> None:
    order = torch.stack([torch.randperm(5, generator=torch.Generator().manual_seed(n)) for n in range(60)])
    advantage = (50.0 * order).float()
    advantage[:2, 1], advantage[:2, 3] = 300.125, 300.25  # float16's steps are 0.25 here, and 1 beside the value
    x = draws(60, 6)
    model = Dueling(careful=False)
    with torch.no_grad():
        total = model.value(x) + advantage
        assert 1 <= int((total.half().argmax(-1) != total.argmax(-1)).sum()) <= 3
    assert audit(model, advantage, x, mode="16-true", gradients=False).ok


@pytest.mark.parametrize("dtype", TRUE.values(), ids=str)
def test_what_goes_in_tips_none_of_them(dtype: torch.dtype) -> None:
    """By plain torch: rounding the inputs and the value alone chooses as FP64 does; rounding their sum does not."""
    a, v = advantages().double(), 1500.0 + draws(60, 1).double()
    best = (v + a).argmax(-1)
    ra, rv = a.to(dtype).double(), v.to(dtype).double()
    assert torch.equal((rv + ra).argmax(-1), best)
    assert int(((rv + ra).to(dtype).argmax(-1) != best).sum()) > 20


class Routed(nn.Module):
    """Rows of ``value`` by the best of the logits."""

    def __init__(self, inputs: int = 32, rows: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(draws(rows, inputs) / inputs**0.5)
        self.value = nn.Parameter(draws(rows, 6, seed=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.value[functional.linear(x, self.weight).argmax(-1)]


class Mixed(Routed):
    """The two best, weighed by a softmax in the mode's own dtype."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, chosen = functional.linear(x, self.weight).softmax(-1).topk(2)
        return (self.value[chosen] * weight[..., None]).sum(-2)


class Rounded(nn.Module):
    """Fake quantisation in the mode's own dtype."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step = x.abs().amax(-1, keepdim=True) / 127
        return (x / step).round() * step


class Nearest(Routed):
    """The nearest of the rows, by differences."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        far = (x[:, None, :6] - self.value[None]).square().sum(-1)
        return self.value[far.argmin(-1)]


class Between(nn.Module):
    """A table read between its places, found with a floor."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        place = x.sigmoid() * 31
        low = place.floor()
        table = torch.linspace(0, 1, 33, dtype=torch.float64).square().to(x.dtype)
        index = low.long().clamp(0, 31)
        return table[index] * (1 - (place - low)) + table[index + 1] * (place - low)


class Kept(nn.Module):
    """The fewest of the likeliest whose probabilities come to 0.9."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p, _ = x.softmax(-1).sort(-1, descending=True)
        return torch.where(p.cumsum(-1) - p < 0.9, p, torch.zeros_like(p))


@pytest.mark.parametrize("mode", HALF)
@pytest.mark.parametrize("make", [Routed, Mixed, Rounded, Nearest, Between, Kept])
def test_near_ties_are_nobodys_defect(make: Callable[[], nn.Module], mode: str) -> None:
    for seed in range(3):
        report = audit(make(), draws(128, 32, seed=seed), mode=mode, gradients=False)
        assert report.ok, report


def test_what_is_made_of_integers_is_no_rounded_operand() -> None:
    given, data = torch.arange(6), draws(6)
    watch = LowWatch(torch.bfloat16)
    watch.provenance = provenance = Provenance((), ())
    with watch:
        times = given.to(torch.bfloat16) / 7 + torch.ones(6, dtype=torch.bfloat16)
        mixed = times * data.bfloat16()
        places = (given + 1).to(torch.bfloat16)
        decided = data.argsort()
        late = decided.to(torch.bfloat16) / 7
        filled = torch.tensor([int(data.sum())]).to(torch.bfloat16) / 7  # the code has looked at a number of its own
        written = times.clone()
        written += data.bfloat16()
    assert provenance.is_exact(times)
    assert provenance.is_exact(places)
    assert not provenance.is_table(times)  # its results are operands all the same
    assert not any(provenance.is_exact(t) for t in (mixed, late, filled, written, data))
