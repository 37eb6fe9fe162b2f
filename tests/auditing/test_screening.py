"""One audit lets the FP64 values of calls go as they are judged; audits that share a reference keep them, and agree."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import nn

from precision_runtime import audit
from precision_runtime.auditing import References

WIDTH = 257  # of no other tensor here
ALIVE: list[int] = []  # no attribute of a module: an audit puts those back


class Counting(nn.Module):
    """Notes, where ``last``, how many FP64 tensors of its input's shape are alive while it runs."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.last = last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (16, WIDTH) in and out."""
        if self.last and x.dtype is torch.float64:
            alive = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.dtype is torch.float64]
            ALIVE.append(len({t.untyped_storage().data_ptr() for t in alive if tuple(t.shape) == (16, WIDTH)}))
        return x * 1.0009765625


def most_alive(depth: int, references: References | None) -> int:
    ALIVE.clear()
    gc.collect()  # what earlier audits left
    model = nn.Sequential(*(Counting(last=i == depth - 1) for i in range(depth)))
    x = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(0))
    assert audit(model, x, mode="bf16-true", references=references, gradients=False).ok
    return max(ALIVE)


def test_a_deeper_model_needs_no_more_values_in_fp64_at_a_time() -> None:
    assert most_alive(48, None) < 16  # inputs, the copies of a call, and what the collector has not found yet


def test_a_shared_reference_keeps_them_for_the_next_mode() -> None:
    assert most_alive(48, References(1)) >= 48


class Cancelling(nn.Module):
    """A variance by E[x^2] - E[x]^2 of what has a mean of 30."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of each row."""
        y = x + 30.0
        return x * ((y * y).mean(-1, keepdim=True) - y.mean(-1, keepdim=True) ** 2)


class InPlace(nn.Module):
    """Writes to its part's result after the part has returned it."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (n, 32) in and out."""
        y: torch.Tensor = self.part(x)
        return y.mul_(3.0).add_(x)


class Picking(nn.Module):
    """Ends in a decision, and in a result whose shape depends on values."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Shape (n, 32) to (n, 32), (n,) and (k,)."""
        return x.softmax(-1), x.argmax(-1), x[x > 0]


class Position(nn.Module):
    """Returns its own weight, as position embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32))

    def forward(self) -> torch.Tensor:
        """Shape (32,)."""
        return self.weight


class Placed(nn.Module):
    """Adds positions to what a table holds."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.position, self.norm = nn.Embedding(50, 32), Position(), nn.LayerNorm(32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Shape (n,) to (n, 32)."""
        result: torch.Tensor = self.norm(self.table(ids) + self.position())
        return result


def of(*parts: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(part() for part in parts))


def linear() -> nn.Module:
    return nn.Linear(32, 32)


X = torch.randn(64, 32, generator=torch.Generator().manual_seed(3))
CASES = {
    "healthy": (of(linear, nn.GELU, linear, nn.Tanh), X),
    "cancelling": (of(linear, of(nn.Tanh, Cancelling), linear), X),
    "in place": (of(InPlace, nn.ReLU, InPlace), X),
    "deciding": (of(linear, of(Picking)), X),
    "counted": (of(Placed, linear, nn.GELU, linear), torch.arange(48)),
}


@pytest.mark.parametrize("mode", ["16-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("case", CASES)
def test_both_ways_give_the_same_verdict_to_the_last_figure(case: str, mode: str) -> None:
    make, given = CASES[case]

    def judged(references: References | None) -> object:
        torch.manual_seed(7)
        report = audit(make(), given, mode=mode, references=references)
        return report.to_dict()

    assert judged(None) == judged(References(1))


def test_a_guilty_part_is_named_both_ways() -> None:
    make, given = CASES["cancelling"]
    for references in (None, References(1)):
        torch.manual_seed(7)
        report = audit(make(), given, mode="bf16-true", references=references, gradients=False)
        assert [f.module for f in report.findings][:1] == ["1.1"], report
