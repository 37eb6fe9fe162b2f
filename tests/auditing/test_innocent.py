"""What the audit was wrong about once, in models that nobody calls wrong, as small as it shows; and guilty twins."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from precision_runtime import audit


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


class Layer(nn.Module):
    """Moves a little more than what it is given moves; or very much more, by one part."""

    def __init__(self, steep: bool = False) -> None:
        super().__init__()
        self.linear, self.steep = nn.Linear(64, 64), steep
        nn.init.orthogonal_(self.linear.weight, gain=1.9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (n, 64) in and out."""
        y: torch.Tensor = self.linear(x)
        return torch.sin(400.0 * y) if self.steep else torch.sin(y)


def chain(steep: int | None) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Layer(steep=i == steep) for i in range(12)))


def test_a_model_that_is_steep_as_a_whole_has_no_island_that_is_free() -> None:
    report = audit(chain(None), inputs(64, 64), mode="bf16-mixed", gradients=False)
    assert report.ok, report
    remark = next(r for r in report.remarks if r.kind == "ill-conditioned")
    assert "only FP32 for much of it" in remark.message
    assert remark.module == ""


def test_a_steep_part_of_a_model_is_named_still() -> None:
    report = audit(chain(3), inputs(64, 64), mode="bf16-mixed", gradients=False)
    assert [f.kind for f in report.findings][:1] == ["amplification"]
    assert report.findings[0].module == "3"


def lost(x: torch.Tensor) -> torch.Tensor:
    """A variance by E[x^2] - E[x]^2, which cancels: what comes before it is judged on its own inputs."""
    return (x + 100.0).square().mean(-1) - (x + 100.0).mean(-1).square()


class Tied(nn.Module):
    """Reads an embedding's weight beside the embedding, as output heads do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.middle = nn.Embedding(50, 16), nn.Linear(16, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Shape (n, t) in, (n, t, 50) out."""
        return F.linear(torch.tanh(self.middle(self.embedding(ids))), self.embedding.weight)


class Headed(nn.Module):
    """With a wrong head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Tied()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Shape (n, t) in and out."""
        return lost(self.body(ids))


@pytest.mark.parametrize("mode", ["16-true", "bf16-true"])
def test_a_weight_that_is_read_beside_its_module_has_the_gradient_of_both_uses(mode: str) -> None:
    ids = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    report = audit(Headed(), ids, mode=mode)
    assert {f.module for f in report.findings} == {""}, report


class Flags(nn.Module):
    """Which places are padding, as ones and zeros."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (n, 16) in and out."""
        return (x > 1.0).to(x.dtype)


class Masked(nn.Module):
    """Hides places by a flag times the smallest number of the dtype, in scores that are a difference."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.flags, self.one, self.other = Flags(), nn.Linear(16, 16), nn.Linear(16, 16)
        with torch.no_grad():
            self.other.weight.copy_(self.one.weight + 0.02 * torch.randn(16, 16))
            self.other.bias.copy_(self.one.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (n, 16) in, (n,) out."""
        flag, scores = self.flags(x), self.one(x) - self.other(x)
        hidden = torch.log_softmax(scores + flag * torch.finfo(x.dtype).min, -1)
        difference: torch.Tensor = (hidden - hidden[:, :1]) * (1.0 - flag) * (1.0 - flag[:, :1])
        return difference


@pytest.mark.parametrize("mode", ["16-true", "bf16-true"])
def test_flags_are_not_disturbed(mode: str) -> None:
    report = audit(Masked(), inputs(64, 16), mode=mode, gradients=False)
    assert report.ok, report
    assert not [r for r in report.remarks if r.kind == "not-judged"]


class Edge(nn.Module):
    """-1 in every place, made of its input: one step further out it has no arcsine."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape in and out."""
        return 0.0 * x - 1.0


class AtTheEdge(nn.Module):
    """Adds a wrong variance to the arcsine of what is at its edge, or of what is not."""

    def __init__(self, keep: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.edge, self.keep = Edge(), keep

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (n, 16) in, (n,) out."""
        return torch.asin(self.keep(self.edge(x))).sum(-1) + lost(x)


def test_where_every_disturbed_run_is_nan_nothing_is_judged_and_a_remark_says_so() -> None:
    report = audit(AtTheEdge(lambda y: y), inputs(64, 16), mode="bf16-true", gradients=False)
    assert not [f for f in report.findings if f.module == ""]
    assert any("gives NaN" in r.message for r in report.remarks)
    inside = audit(AtTheEdge(lambda y: 0.5 * y), inputs(64, 16), mode="bf16-true", gradients=False)
    assert [f.kind for f in inside.findings] == ["instability"]


class ByHand(nn.Module):
    """Attention by hand whose masked rows are an average in every precision, with a norm behind it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.queries, self.values, self.norm = nn.Linear(32, 32), nn.Linear(32, 32), nn.LayerNorm(32, eps=1e-12)

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """Shapes (n, t, 32) and (n, t, t) in, (n, t, 32) out."""
        scores = self.queries(x) @ x.transpose(-1, -2) / 32**0.5
        scores = scores.masked_fill(~keep, torch.finfo(scores.dtype).min)
        result: torch.Tensor = self.norm(torch.softmax(scores, -1) @ self.values(x))
        return result


@pytest.mark.parametrize("mode", ["16-true", "16-mixed", "bf16-true"])
def test_a_norm_of_a_row_that_is_masked_entirely_has_a_variance(mode: str) -> None:
    keep = torch.ones(2, 8, 8, dtype=torch.bool)
    keep[:, 5:] = False
    report = audit(ByHand(), inputs(2, 8, 32), keep, mode=mode)
    assert report.ok, report


class Collecting(nn.Module):
    """Collects a part's result by a hook, as transformers does with hidden states, and uses it beside the rest."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.first.register_forward_hook(lambda module, args, result: self.found.append(result))
        self.found: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (n, 32) in, (n,) out."""
        self.found.clear()
        y = self.second(torch.tanh(self.first(x)))
        return lost(y + 3.0 * self.found[0])


def test_a_result_that_a_hook_collected_has_the_gradient_of_both_uses() -> None:
    report = audit(Collecting(), inputs(64, 32), mode="bf16-true")
    assert {f.module for f in report.findings} == {""}, report


class Choosing(nn.Module):
    """A mask of 0 and -inf: each row sees its best 8 of 62 places, many of which are near ties."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(64, 16, bias=False), nn.Linear(64, 16, bias=False)

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (2, 250, 64) to (2, 250, 62)."""
        scores: torch.Tensor = self.q(x) @ self.k(x[:, :248:4]).transpose(1, 2)
        return scores

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (2, 250, 64) to (2, 250, 62)."""
        scores = self.scores(x)
        return torch.full_like(scores, -torch.inf).scatter(-1, scores.topk(8, -1).indices, 0.0)


class Blocking(Choosing):
    """Scores of which every other place is blocked; the rest leaves the range of float16 below."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (2, 250, 64) to (2, 250, 62)."""
        scores = self.scores(x) * 2.0**16
        blocked = torch.arange(scores.shape[-1]) % 2 == 0
        return scores.masked_fill(blocked, -torch.inf)


@pytest.mark.parametrize("mode", ["16-true", "bf16-true", "bf16-mixed"])
def test_a_mask_whose_places_are_near_ties_is_no_overflow(mode: str) -> None:
    torch.manual_seed(0)
    report = audit(nn.Sequential(nn.Linear(64, 64), Choosing()), inputs(2, 250, 64), mode=mode, gradients=False)
    assert report.ok, report


def test_infinities_that_no_disturbed_run_moves_are_an_overflow_among_masked_places_too() -> None:
    torch.manual_seed(0)
    report = audit(nn.Sequential(nn.Linear(64, 64), Blocking()), inputs(2, 250, 64), mode="16-true", gradients=False)
    assert [(f.module, f.kind) for f in report.findings][:1] == [("1", "range")], report


class Loud(nn.Module):
    """A loss whose gradient float16 holds up to a loss scale between the powers of 16."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (n, 16) to (), its gradient 600 for each result of the layer."""
        total: torch.Tensor = (self.linear(x) * 600.0).sum()
        return total


def kept_by_a_scaler(model: nn.Module, x: torch.Tensor) -> float:
    """The largest loss scale that leaves every gradient finite, by plain torch."""
    for scale in (2.0**k for k in range(16, -16, -1)):
        with torch.autocast("cpu", torch.float16):
            loss = model(x)
        found = torch.autograd.grad(loss * scale, list(model.parameters()))
        if all(bool(g.isfinite().all()) for g in found):
            return scale
    raise AssertionError


@pytest.mark.parametrize("size", [0.25, 0.5, 1.0, 2.0])
def test_the_loss_scale_is_the_largest_that_a_scaler_would_keep(size: float) -> None:
    torch.manual_seed(0)
    model, x = Loud(), inputs(4, 16) * size
    report = audit(model, x, mode="16-mixed")
    assert report.ok, report
    assert report.figures["loss_scale"] == kept_by_a_scaler(model, x)


class Padded(nn.Module):
    """Blows up rows of zeros, as norms do; their gradient is that of padding, and goes nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, 16, padding_idx=0)
        self.norm = nn.LayerNorm(16)
        self.linear = nn.Linear(16, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Shape (n, k) to (n, k, 16)."""
        x = self.table(ids)
        y: torch.Tensor = self.linear(self.norm(x)) + 2000.0 * (ids == 0).to(x.dtype)[..., None] * torch.sin(40.0 * x)
        return y


def test_a_gradient_of_padding_that_only_our_own_sum_overflows_is_no_finding() -> None:
    torch.manual_seed(0)
    ids = torch.randint(1, 32, (4, 24), generator=torch.Generator().manual_seed(0))
    ids[:, -3:] = 0
    report = audit(Padded(), ids, mode="16-true")
    assert report.ok, report
    assert not any(r.kind == "harmless-range" for r in report.remarks), report


class Constant(nn.Module):
    """A norm of rows that are all alike, with an eps that float16 cannot divide by."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (n, 16) in and out."""
        y = x * 0.0 + self.weight
        return (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True) + 1e-12).sqrt()


class TwoHeads(nn.Module):
    """One that no scale saves, and one whose gradient only the sum over all outputs overflows."""

    def __init__(self) -> None:
        super().__init__()
        self.constant, self.loud = Constant(), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Shape (n, 16) to (n, 16) twice."""
        return self.constant(x), self.loud(x) * 2000.0


def test_what_a_smaller_incoming_gradient_saves_is_not_reported_beside_what_none_saves() -> None:
    torch.manual_seed(0)
    report = audit(TwoHeads(), inputs(32, 16), mode="16-true")
    assert {f.module for f in report.findings} <= {"constant", ""}, report
    assert any(f.module == "constant" and f.kind == "range" for f in report.findings), report
