"""Which op is guilty, on which line, and the proof: each defect beside the twin whose guilty op is written in FP32."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.checkpoint import checkpoint

from precision_runtime import audit
from precision_runtime.auditing import trial
from precision_runtime.auditing.blaming import opblame
from precision_runtime.auditing.blaming.opblame import Blame, public_name
from precision_runtime.auditing.blaming.proof import Stage
from precision_runtime.auditing.judging.sheet import Verdict
from precision_runtime.record import Finding


@pytest.fixture(autouse=True)
def same_weights() -> None:
    torch.manual_seed(0)


def up(t: torch.Tensor) -> torch.Tensor:
    """What a user writes to repair a line: FP32 where it was half."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


class Twin(nn.Module):
    """``wide`` computes the guilty line in FP32: the proof must find no more than that twin's audit does."""

    mean = 0.0  # of the inputs

    def __init__(self, wide: bool) -> None:
        super().__init__()
        self.wide = wide

    def w(self, t: torch.Tensor) -> torch.Tensor:
        return up(t) if self.wide else t


class OneMinusCos(Twin):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (1.0 - torch.cos(self.w(x) * 0.06)).to(x.dtype)


class Softplus(Twin):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.log(1.0 + torch.exp(self.w(x) - 6))
        return y.to(x.dtype)


class Variance(Twin):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.w(x) + 20.0
        mean = x.mean(-1)
        return x.square().mean(-1) - mean.square()


class Norm(Twin):
    """x - mean(x) amplifies, too, and comes first; the variance is what is wrong."""

    mean = 20.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.w(x)
        mean = x.mean(-1, keepdim=True)
        centred = x - mean
        squares = x.square().mean(-1, keepdim=True)
        return centred / (squares - mean.square()).clamp_min(0.1).sqrt()


class SumOfSquares(Twin):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        power = (self.w(x) * 300.0).square()
        return power.sum(-1).sqrt().to(x.dtype)


class RunningTotal(Twin):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = self.w(torch.zeros((), dtype=x.dtype))
        for part in x.abs().reshape(-1):
            total = total + part
        return total


class TotalInPlace(Twin):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = self.w(torch.zeros(2, dtype=x.dtype))
        for part in x.abs().reshape(-1, 2):
            total += part
        return total


class Nucleus(Twin):
    """How many tokens make up 97%: the running total loses it, and the comparison only shows that."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = (x[:, :, None] * torch.linspace(0.5, 1.5, 1250, dtype=x.dtype)).flatten(1)
        p = torch.softmax(self.w(logits), -1).sort(-1, descending=True).values
        total = p.cumsum(-1)
        return (total < 0.97).sum(-1).float() / 20000


class Positions(Twin):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        place = torch.arange(1000, dtype=torch.float32 if self.wide else x.dtype)
        return x.mean() + (up(place) * 0.37).sin()


class LowBias(Twin):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = torch.arange(640, dtype=torch.float64) * 0.35
        bias = (bias - bias[-1] if self.wide else bias).to(x.dtype)
        return torch.softmax(x.repeat(1, 40) + bias, -1)[:, -8:]


class Flushed(Twin):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tiny = self.w(x) * 3e-4
        return (tiny.square() * 1e6).to(x.dtype)


class Saturated(Twin):
    """Right forward; the derivative 1 - tanh^2 cancels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.w(x) + 4.0)
        return y.to(x.dtype)


class RootOfNothing(Twin):
    """Right forward; the derivative of sqrt at a flushed zero is infinite, times zero."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.sqrt((self.w(x) - self.w(x).detach()).square() + 1e-9)
        return torch.where(x > -9, x, y.to(x.dtype))


# module, mode, the op, the kind, what stands on the line, whether gradients are judged
DEFECTS = [
    (OneMinusCos, "bf16-true", "aten::rsub", "instability", "1.0 - torch.cos", False),
    (Softplus, "16-true", "aten::log", "instability", "torch.log(1.0 +", False),
    (Variance, "bf16-true", "aten::sub", "instability", "- mean.square()", False),
    (Variance, "16-true", "aten::sub", "instability", "- mean.square()", False),
    (Norm, "16-true", "aten::sub", "instability", "(squares - mean.square())", False),
    (SumOfSquares, "16-true", "aten::pow", "range", ".square()", False),
    (RunningTotal, "bf16-true", "aten::add", "kernel", "total = total + part", False),
    (TotalInPlace, "bf16-true", "aten::add", "kernel", "total += part", False),
    (Nucleus, "bf16-true", "aten::cumsum", "instability", "p.cumsum(-1)", False),
    (Positions, "bf16-true", "aten::arange", "cast", "torch.arange(1000", False),
    (LowBias, "bf16-true", "aten::_to_copy", "cast", "else bias).to(x.dtype)", False),
    (Flushed, "16-true", "aten::pow", "underflow", "tiny.square()", False),
    (Saturated, "bf16-true", "aten::tanh", "instability", "torch.tanh(", True),
    (RootOfNothing, "16-true", "aten::sqrt", "range", "torch.sqrt(", True),
]


@pytest.mark.parametrize(
    ("module", "mode", "op", "kind", "line", "gradients"), DEFECTS, ids=[f"{d[0].__name__}-{d[1]}" for d in DEFECTS]
)
@pytest.mark.parametrize("deep", [False, True], ids=["root", "inside"])
def test_the_op_its_line_and_its_kind_are_named_and_proven(
    module: type[Twin], mode: str, op: str, kind: str, line: str, gradients: bool, deep: bool
) -> None:
    x = torch.randn(32, 16) + module.mean

    def run(wide: bool) -> nn.Module:
        return nn.Sequential(nn.Identity(), module(wide), nn.Identity()) if deep else module(wide)

    found = audit(run(False), x, mode=mode, gradients=gradients).findings[0]
    assert (found.op, found.kind) == (op, kind), found
    assert found.line is not None
    assert re.match(r"test_opblame\.py:\d+: ", found.line)
    assert line in found.line
    assert found.module == ("1" if deep else "")
    before, after = falls(found)
    assert after <= 2.0 < before
    assert f"`{op}`" in found.message
    # The second witness: the twin with that line in FP32, and nothing else changed, holds.
    assert audit(run(True), x, mode=mode, gradients=gradients).ok


def falls(finding: Finding) -> tuple[float, float]:
    """The bits before and after, read from the proof as a user reads them."""
    assert finding.proof is not None
    figures = re.search(r"the loss falls from ([\d.]+ bits?|every bit) to ([\d.]+) bits?", finding.proof)
    assert figures is not None, finding.proof
    before = math.inf if figures[1] == "every bit" else float(figures[1].split()[0])
    return before, float(figures[2])


@pytest.mark.parametrize("mode", ["16-mixed", "bf16-mixed"])
def test_under_autocast_the_op_is_named_as_it_ran(mode: str) -> None:
    class Confident(nn.Module):
        def __init__(self, wide: bool) -> None:
            super().__init__()
            self.wide, self.score = wide, nn.Linear(16, 1)
            with torch.no_grad():
                self.score.bias.fill_(8.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            s = self.score(x)
            return torch.log(torch.sigmoid(up(s) if self.wide else s))

    x = torch.randn(64, 16)
    found = audit(Confident(False), x, mode=mode, gradients=False).findings[0]
    assert found.op == "aten::log"
    assert falls(found)[1] < falls(found)[0] - 1
    assert found.proof is not None
    assert found.proof.startswith("with `aten::sigmoid` and `aten::log` alone in FP64 ")
    assert audit(Confident(True), x, mode=mode, gradients=False).ok


def test_a_proof_that_fails_says_so_and_what_that_means() -> None:
    class Masked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scores = x * 30.0
            bias = torch.zeros_like(scores).fill_(torch.finfo(scores.dtype).min)
            return torch.softmax(scores + bias, -1)

    found = audit(Masked(), torch.randn(4, 16) - 3, mode="16-true", gradients=False).findings[0]
    assert found.op == "aten::add"  # where -inf is born
    assert found.proof is not None
    assert found.proof.startswith("the proof fails: with `aten::add` alone in FP64 the loss goes from ")
    assert "torch.finfo" in found.proof


def test_a_result_that_only_the_dtype_cannot_hold_is_proven_with_the_result_kept_wide() -> None:
    linear = nn.Linear(16, 16)
    with torch.no_grad():
        linear.weight.mul_(1e5)
    net = nn.Sequential(linear, nn.Identity())
    found = audit(net, torch.randn(8, 16), mode="16-true", gradients=False).findings[0]
    assert (found.module, found.op, found.kind) == ("0", "aten::addmm", "range")
    assert falls(found) == (math.inf, 0.0)
    assert audit(net, torch.randn(8, 16), mode="bf16-true", gradients=False).ok  # range was all that it lacked


def test_a_recomputed_segment_counts_once() -> None:
    class Recomputed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Saturated(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = checkpoint(self.inner, x, use_reentrant=False)
            return y

    found = audit(Recomputed(), torch.randn(16, 16), mode="bf16-true").findings[0]
    assert found.op == "aten::tanh"
    assert falls(found)[1] <= 2.0


def blame(asked: list[Verdict], verdict: Verdict) -> Blame:
    """A search that only notes what it is asked for."""
    asked.append(verdict)
    return Blame("aten::sub")


def test_only_what_failed_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Verdict] = []
    monkeypatch.setattr(trial, "blame_op", lambda _, verdict: blame(asked, verdict))
    net = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
    assert audit(net, torch.randn(8, 16), mode="bf16-true").ok
    assert asked == []
    assert not audit(nn.Sequential(Variance(False)), torch.randn(8, 16), mode="bf16-true").ok
    assert {v.call.name for v in asked if v.call is not None} == {"0"}


def test_the_same_defect_in_many_layers_is_searched_for_in_the_first_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Verdict] = []
    monkeypatch.setattr(trial, "blame_op", lambda _, verdict: blame(asked, verdict))

    class Residual(Variance):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + super().forward(x).unsqueeze(-1) / 100

    net = nn.Sequential(*(Residual(False) for _ in range(6)))
    found = audit(net, torch.randn(8, 16), mode="bf16-true", gradients=False).findings
    assert len(asked) == 3
    assert [f.op for f in found].count("aten::sub") == 3


def test_everything_is_put_back_also_when_the_search_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    class Moody(Variance):
        """Raises as soon as it is run for the search."""

        runs = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Moody.runs += 1
            self.seen = x
            if searching:
                raise RuntimeError("not again")
            return super().forward(x)

    searching: list[bool] = []

    def blame_op(stage: Stage, verdict: Verdict) -> Blame | None:
        searching.append(True)
        try:
            return opblame.blame_op(stage, verdict)
        finally:
            searching.clear()

    monkeypatch.setattr(trial, "blame_op", blame_op)
    module = nn.Sequential(Moody(False), nn.Identity())
    default, autocast = torch.get_default_dtype(), torch.is_autocast_enabled("cpu")
    report = audit(module, torch.randn(8, 16), mode="bf16-true", gradients=False)
    assert not report.ok
    assert report.findings[0].op is None
    assert _get_current_dispatch_mode() is None
    assert (torch.get_default_dtype(), torch.is_autocast_enabled("cpu")) == (default, autocast)
    assert "seen" not in vars(module[0])


def test_the_same_seed_names_the_same_op_with_the_same_figures() -> None:
    x = torch.randn(32, 16)
    first, second = (audit(Variance(False), x, mode="bf16-true", seed=3) for _ in range(2))
    assert first.to_dict() == second.to_dict()


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("aten::_softmax", "aten::softmax"),
        ("aten::_log_softmax", "aten::log_softmax"),
        ("aten::add_", "aten::add"),
        ("aten::native_layer_norm", "aten::layer_norm"),
        ("aten::_to_copy", "aten::_to_copy"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "aten::scaled_dot_product_attention"),
        ("aten::embedding_dense_backward", "aten::embedding_dense_backward"),
        ("mine::_own", "mine::_own"),
    ],
)
def test_ops_are_called_what_users_call_them(op: str, name: str) -> None:
    assert public_name(op) == name
