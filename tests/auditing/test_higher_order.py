"""Operators that take functions, and code that torch compiles."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch._higher_order_ops import scan
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from precision_runtime import PrecisionRuntime, audit
from precision_runtime.errors import AuditError

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),  # torch's own advice
    # The compiler hides it, where warnings are none to raise.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


def inputs(*shape: int) -> torch.Tensor:
    """Drawn from a normal distribution."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    """Heads of 16 over 32 tokens, with a score of its own."""

    def __init__(self, score: Callable[..., torch.Tensor], masked: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.score = score
        self.mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 32, 32, device="cpu") if masked else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (n, heads, 32, 16), and back."""
        q, k, v = self.qkv(x).chunk(3, -1)
        found: torch.Tensor = flex_attention(q, k, v, score_mod=self.score, block_mask=self.mask)
        return found


def slope(score: torch.Tensor, b: Any, h: Any, q: Any, k: Any) -> torch.Tensor:
    """Falls with the distance."""
    return score - 0.1 * (q - k).abs()


class Branching(nn.Module):
    """Takes one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (n, 16), and back."""
        found: torch.Tensor = torch.cond(x.sum() > 0, lambda t: self.one(t), lambda t: self.other(t), (x,))
        return found


class Summing(nn.Module):
    """A running sum by ``scan``, of what a layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (n, 16), and back."""
        y = self.layer(x)
        _, found = scan(lambda carry, row: (carry + row, carry + row), torch.zeros_like(y[0]), y)
        assert isinstance(found, torch.Tensor)
        return found


MODELS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "flex_attention": lambda: (Attention(slope), inputs(2, 4, 32, 16)),
    "flex_attention with a mask": lambda: (Attention(slope, masked=True), inputs(2, 4, 32, 16)),
    "cond": lambda: (Branching(), inputs(8, 16)),
}


@pytest.mark.parametrize("mode", ["16-true", "bf16-mixed"])
@pytest.mark.parametrize("name", MODELS)
def test_operators_that_take_functions_are_judged(name: str, mode: str) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name]()
    report = audit(model, x, mode=mode, gradients=False)
    assert report.ok, report


def test_a_running_sum_within_a_scan_is_found() -> None:
    """Sums of 2,000 rows that stop growing in bfloat16, as the carry is rounded each time."""
    torch.manual_seed(0)
    model = Summing()
    with torch.no_grad():
        model.layer.bias += 1.0
    report = audit(model, inputs(2000, 16), mode="bf16-true", gradients=False)
    assert not report.ok, report
    assert report.findings[0].op == "aten::add", report


def test_what_a_score_of_its_own_overflows_is_named() -> None:
    torch.manual_seed(0)
    model = Attention(lambda score, b, h, q, k: torch.log(torch.exp(score + 12.0).half().float()))
    report = audit(model, 2.0 * inputs(2, 4, 32, 16), mode="16-true", gradients=False)
    assert (report.findings[0].kind, report.findings[0].op) == ("range", "aten::_to_copy"), report


def test_what_torch_differentiates_only_when_compiled_has_no_reference_and_says_so() -> None:
    torch.manual_seed(0)
    with pytest.raises(AuditError, match=r"Branching runs in bf16-true and in float32 but not in FP64"):
        audit(Branching(), inputs(8, 16), mode="bf16-true")


@pytest.mark.parametrize("mode", ["tf32", "bf16-mixed"])
def test_they_run_in_the_runtimes_own_modes_and_under_its_ledger(mode: str) -> None:
    torch.manual_seed(0)
    runtime = PrecisionRuntime(mode)
    model = runtime.setup(Attention(slope))
    x = inputs(2, 4, 32, 16)
    with torch.no_grad(), runtime.ledger(model) as ledger:
        found = model(x)
    assert found.isfinite().all()
    assert "qkv" in str(ledger)


class Counting:
    """A compiler that counts what it compiles and how often that runs."""

    def __init__(self) -> None:
        self.compiled, self.ran = 0, 0

    def __call__(self, graph: torch.fx.GraphModule, example: Sequence[Any]) -> Callable[..., Any]:
        """Count one compilation."""
        self.compiled += 1

        def run(*args: Any) -> Any:
            self.ran += 1
            return graph(*args)

        return run


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("mode", ["bf16-true", "16-mixed"])
def test_a_compiled_module_runs_compiled_where_it_is_judged_and_nothing_of_ours_is(mode: str, fullgraph: bool) -> None:
    torch.manual_seed(0)
    counting = Counting()
    model = torch.compile(nn.Sequential(nn.Linear(16, 16), nn.GELU()), backend=counting, fullgraph=fullgraph)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of what the compiler could not read
        report = audit(model, inputs(8, 16), mode=mode)
    assert report.ok, report
    assert counting.compiled == 1
    assert counting.ran >= 1


class Variance(nn.Module):
    """A difference of large squares, which a compiler that fuses computes in float32 from end to end."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (n, 32), and back."""
        return x.square().mean(-1, keepdim=True) - x.mean(-1, keepdim=True).square() + 0.0 * x


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's compiler needs a C++ compiler: install g++")
def test_what_a_compiler_computes_in_float32_holds_and_fails_in_eager() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), Variance())
    nn.init.constant_(model[0].bias, 10.0)  # type: ignore[arg-type]
    eager = audit(model, inputs(64, 32), mode="bf16-true", gradients=False)
    assert (eager.findings[0].module, eager.findings[0].kind) == ("1", "instability"), eager
    compiled = audit(torch.compile(model[1]), inputs(64, 32) + 10.0, mode="bf16-true", gradients=False)
    assert compiled.ok, compiled
    assert not audit(model[1], inputs(64, 32) + 10.0, mode="bf16-true", gradients=False).ok
