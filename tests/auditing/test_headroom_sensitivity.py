"""``sensitivity``: what emulated formats foretell, against audits of the modes that do run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from precision_runtime import PrecisionRuntime, Sensitivity, audit, sensitivity
from precision_runtime.errors import ConfigurationError, UnknownNameError
from precision_runtime.formats import FORMATS
from precision_runtime.ranging.emulation import emulate
from precision_runtime.ranging.missing import _need


@pytest.fixture(autouse=True)
def same_weights() -> None:
    torch.manual_seed(0)


class Length(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / x.square().sum(-1, keepdim=True).sqrt()


class Norm(nn.Module):
    """By E[x²] - E[x]², in the dtype that comes in, or in float32."""

    def __init__(self, wide: bool) -> None:
        super().__init__()
        self.wide = wide

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = x.dtype
        x = x.float() if self.wide else x
        variance = x.square().mean(-1, keepdim=True) - x.mean(-1, keepdim=True).square()
        return ((x - x.mean(-1, keepdim=True)) * torch.rsqrt(variance + 1e-3)).to(dtype)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        mask = torch.full((x.shape[-2], x.shape[-2]), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)
        return self.out(F.softmax(q @ k.mT / 4.0 + mask, -1) @ v)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Dropout(0.1), nn.Linear(32, 8))


def shifted(wide: bool) -> nn.Module:
    net = nn.Sequential(nn.Linear(16, 32), Norm(wide), nn.Linear(32, 4))
    nn.init.constant_(net[0].bias, 10.0)
    return net


CASES: dict[str, Callable[[], tuple[Any, torch.Tensor]]] = {
    "mlp": lambda: (mlp(), torch.randn(8, 16)),
    "attention": lambda: (Attention(), torch.randn(2, 6, 16)),
    "conv": lambda: (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)), torch.randn(2, 3, 8, 8)
    ),
    "lengths": lambda: (nn.Sequential(nn.Linear(16, 64), Length()), torch.randn(8, 16) * 200),
    "bad norm": lambda: (shifted(False), torch.randn(8, 16)),
    "norm in float32": lambda: (shifted(True), torch.randn(8, 16)),
    "softplus by hand": lambda: (lambda x: torch.log(1 + torch.exp(x)), torch.randn(8, 16) * 8),
    "in place": lambda: (lambda x: x.clone().mul_(3).add_(1).relu_(), torch.randn(8, 16)),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["16-true", "bf16-true", "16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_foretold_comes_true_in_the_modes_that_run(case: str, mode: str) -> None:
    function, x = CASES[case]()
    half, family = mode.split("-")
    form = {"16": "float16", "bf16": "bfloat16"}[half]
    told = emulate(function, (x,), {}, FORMATS[form], autocast=family == "mixed")
    seen = audit(function, x, mode=mode)
    assert told.ok == seen.ok, f"{told}\n{seen}"
    if not seen.ok:
        assert {f.module for f in told.findings} == {f.module for f in seen.findings}
    # Kernels add in other orders and round in other places, so figures agree to a bit, not to the digit.
    elif seen.excess > 0.1:
        assert 0.5 < told.excess / seen.excess < 2.0


@pytest.mark.parametrize("mode", ["16-true", "bf16-true"])
@pytest.mark.parametrize("case", ["mlp", "attention", "conv", "norm in float32"])
def test_disturbed_double_runs_alone_foretell_the_error(case: str, mode: str) -> None:
    function, x = CASES[case]()
    function.eval()
    form = {"16-true": "float16", "bf16-true": "bfloat16"}[mode]
    told = emulate(function, (x,), {}, FORMATS[form], autocast=False, gradients=False).figures
    with torch.no_grad():
        true = function.double()(x.double())
        low = PrecisionRuntime(mode, accelerator="cpu").setup(function.float())(x)
    seen = float((low.double() - true).norm() / true.norm())
    # One rounding of the operands per module, drawn, stands for all that really happen: it is right to a bit or two.
    assert 0.25 < told["expected_error"] / seen < 4.0
    assert 0.5 < told["error"] / seen < 2.0


def test_range_is_told_from_precision() -> None:
    function, x = CASES["lengths"]()
    found = sensitivity(function, x, families=["true"], gradients=False)
    assert found.needs == {"true": "range"}
    assert found.holds == ("bf16-true",)
    assert found.advice == "true: it needs range, not precision: use bf16-true"
    assert not audit(function, x, mode="16-true", gradients=False).ok
    assert audit(function, x, mode="bf16-true", gradients=False).ok


def test_precision_is_told_from_range() -> None:
    function, x = CASES["bad norm"]()
    x = x * 0.2
    found = sensitivity(function, x, families=["true"], gradients=False)
    assert found.needs == {"true": "precision"}
    assert not audit(function, x, mode="bf16-true", gradients=False).ok
    # The second witness of more precision: the very same code in float32.
    assert audit(function, x, mode="32-true", gradients=False, budget=8.0).ok


def test_what_the_format_with_less_precision_can_do_needs_no_precision() -> None:
    """bfloat16 holds by its own roundings; float16 with its range, judged by finer ones, is just beyond the budget."""

    def variance(x: torch.Tensor) -> torch.Tensor:
        return (x.square().mean(-1) - x.mean(-1).square()) * 1e6

    x = 3 + torch.randn(16, 64, generator=torch.Generator().manual_seed(3))
    found = sensitivity(variance, x, families=["true"], gradients=False, budget=3.6)
    assert [row.ok for row in found.rows] == [False, True, False, False, False]
    assert found.advice == "true: it needs range, not precision: use bf16-true"


def test_healthy_code_needs_nothing_and_costs_no_hybrids() -> None:
    function, x = CASES["mlp"]()
    found = sensitivity(function, x, gradients=False)
    assert found.needs == {"true": "nothing", "mixed": "nothing"}
    assert found.holds == ("16-true", "bf16-true", "16-mixed", "bf16-mixed")
    assert len(found.rows) == 4
    assert found.advice == "true and mixed: float16 and bfloat16 hold"


def test_the_emulated_mask_is_the_largest_value_of_the_emulated_range() -> None:
    def fill(x: torch.Tensor) -> torch.Tensor:
        return F.softmax(torch.cat([x, torch.full_like(x, torch.finfo(x.dtype).min)], -1), -1)

    for form in ("float16", "bfloat16"):
        assert emulate(fill, (torch.randn(2, 4),), {}, FORMATS[form], autocast=False).ok


def test_everything_is_as_before() -> None:
    function, x = CASES["conv"]()
    before = {k: v.clone() for k, v in function.state_dict().items()}
    state = torch.get_rng_state()
    sensitivity(function, x)
    assert torch.equal(state, torch.get_rng_state())
    after = function.state_dict()
    assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)
    assert all(not m._forward_hooks for m in function.modules())


def test_the_result_is_plain_data_and_comes_back() -> None:
    function, x = CASES["softplus by hand"]()
    found = sensitivity(function, x, families=["true"], gradients=False)
    assert Sensitivity.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert found.row("16-true").error == math.inf
    assert "FAILS" in str(found)


@pytest.mark.parametrize(
    ("holds", "need"),
    [
        ((True, True), "nothing"),
        ((False, True, True, False, False), "range"),
        ((True, False, True, False, True), "precision"),
        ((False, False, False, False, True), "precision"),
        ((False, True, True, True, True), "range or precision"),
        ((False, True, False, False, False), "range"),
        ((False, True, False, False, True), "range or precision"),
        ((False, False, False, False, False), "range and precision"),
    ],
)
def test_what_is_missing_follows_from_what_holds(holds: tuple[bool, ...], need: str) -> None:
    assert _need(*holds) == need


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="full"):
        sensitivity(mlp(), torch.randn(2, 16), families=["full"])


def test_a_model_that_is_set_up_in_a_mode_is_refused() -> None:
    model = PrecisionRuntime("16-true", accelerator="cpu").setup(mlp())
    with pytest.raises(ConfigurationError, match="set up"):
        sensitivity(model, torch.randn(2, 16))
