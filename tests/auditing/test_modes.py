"""The audit in the modes that round the operands of products themselves: TF32, FP8, bitsandbytes, Apex."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from precision_runtime import MODES, audit
from precision_runtime.errors import NothingToSwapError
from precision_runtime.record import Report

QUANTIZED = [name for name, mode in MODES.items() if mode.family == "quantized"]
FLOAT8 = [name for name, mode in MODES.items() if mode.family == "float8"]


class Block(nn.Module):
    """A transformer block; ``norm`` may be the wrong one."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(64), norm or nn.LayerNorm(64)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm2(x))))


class Moments(nn.Module):
    """Norm by E[x²] - E[x]²."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = (x * x).mean(-1, keepdim=True) - mean * mean
        return (x - mean) / (variance + 1e-5).sqrt()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_a_healthy_block_holds_and_comes_back_as_it_was(mode: str, train: bool) -> None:
    block = Block().train(train)
    kinds = [type(part) for part in block.modules()]
    before = {key: value.clone() for key, value in block.state_dict().items()}
    parameters = [id(p) for p in block.parameters()]
    report = audit(block, torch.randn(4, 16, 64), mode=mode)
    assert report.ok, str(report)
    assert [type(part) for part in block.modules()] == kinds
    assert [id(p) for p in block.parameters()] == parameters
    after = block.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) and after[key].dtype is value.dtype for key, value in before.items())


@pytest.mark.parametrize("mode", ["nf4", "int8", "transformer-engine", "apex-O3"])
def test_an_unstable_norm_is_named_beside_layers_that_are_rounded_a_hundred_times_as_coarsely(mode: str) -> None:
    report = audit(Block(Moments()), torch.randn(4, 16, 64) + 20.0, mode=mode, gradients=False)
    assert [f.module for f in report.findings][:1] == ["norm2"], str(report)


@pytest.mark.parametrize("mode", QUANTIZED)
def test_storage_and_computing_are_told_apart(mode: str) -> None:
    layer, x = nn.Linear(256, 128), torch.randn(64, 256)
    report = audit(layer, x, mode=mode)
    assert report.ok, str(report)
    (row,) = report.layers
    expected = {"nf4": 4.5, "fp4": 4.5, "nf4-dq": 4 + 8 / 64 + 32 / (64 * 256), "fp4-dq": 4 + 8 / 64 + 32 / (64 * 256)}
    tables = {"nf4": 16 * 32, "fp4": 16 * 32, "nf4-dq": 272 * 32 + 32, "fp4-dq": 272 * 32 + 32}  # beside the codes
    theory = expected.get(mode, 8 + 32 / 256 if mode == "int8" else 16.0)
    assert row.bits == pytest.approx(theory, abs=tables.get(mode, 0) / layer.weight.numel() + 1e-9)
    assert report.figures["bits_per_parameter"] == row.bits
    # The second witness: the weight as the codes say, against the weight, and what that does to the product in FP64.
    low, high = {"n": (0.08, 0.11), "f": (0.10, 0.13), "i": (0.003, 0.008)}[mode[0]]
    assert row.loss is not None
    assert low < row.loss < high
    # Weights and inputs are independent here, so the product moves as much as the weights do.
    plain = x.double() @ layer.weight.detach().double().T
    moved = report.figures["quantization_loss"] * float((plain + layer.bias.detach().double()).norm() / plain.norm())
    assert moved == pytest.approx(row.loss, rel=0.25)
    assert "bits per parameter" in str(report)
    assert Report.from_dict(report.to_dict()) == report


@pytest.mark.parametrize("mode", FLOAT8)
def test_shares_of_underflow_and_saturation_are_reported_by_tensor(mode: str) -> None:
    layer = nn.Linear(64, 64, bias=False)
    x = torch.randn(32, 64)
    x[0, :8] = 1000.0  # without history the scale is 1, and E4M3 ends at 448
    x[1, :16] = 1e-5  # below half of its smallest number, 2^-10
    report = audit(layer, x, mode=mode)
    (row,) = report.layers
    assert set(row.underflow) == set(row.saturation) == {"input", "weight", "gradient"}
    assert row.saturation["input"] == 8 / x.numel()
    plain = x.to(getattr(torch, MODES[mode].params)).float()
    vanished = ((plain != 0) & (plain.clamp(-448, 448).to(torch.float8_e4m3fn).float() == 0)).sum()
    assert row.underflow["input"] == float(vanished) / x.numel()
    assert "saturation in float8_e4m3fn" in str(report)
    # What is clamped is no rounding: nothing excuses it.
    assert not report.ok


@pytest.mark.parametrize("mode", FLOAT8)
def test_rounding_to_eight_bits_is_excused_as_far_as_it_goes_and_no_further(mode: str) -> None:
    x = torch.randn(32, 64)
    assert audit(nn.Linear(64, 64), x, mode=mode).ok
    wrong = Leaky(64, 64)
    report = audit(wrong, x, mode=mode)
    assert not report.ok


class Leaky(nn.Module):
    """An FP8 product whose result loses a third in a cast of its own."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inner = nn.Linear(inputs, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        return y if y.dtype == torch.float64 else (y * 2).round() / 2


def test_tf32_rounds_products_and_nothing_else() -> None:
    x = torch.randn(32, 64)
    assert audit(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)), x, mode="tf32").ok

    # One TF32 rounding of something that is no operand of a product is 2^13 times what float32 rounding costs.
    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x if x.dtype == torch.float64 else x.to(torch.float16).to(x.dtype)

    report = audit(lambda x: rounded(x) * 3.0, x, mode="tf32", gradients=False)
    assert not report.ok
    assert report.lost_bits == pytest.approx(math.log2(2.0**13), abs=3.0)


@pytest.mark.parametrize("mode", QUANTIZED)
def test_a_model_without_linear_layers_is_refused_by_name(mode: str) -> None:
    with pytest.raises(NothingToSwapError, match="LayerNorm has"):
        audit(nn.LayerNorm(16), torch.randn(4, 16), mode=mode)
