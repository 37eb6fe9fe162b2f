"""Scaled operands against slow readable twins, ml_dtypes and torchao."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from precision_runtime.float8.quantizing import (
    by_blocks,
    by_microscaling,
    by_nvfp4,
    by_tensor,
    largest_magnitude,
    scale_for,
)
from precision_runtime.formats import FORMATS

E4M3, E5M2, E2M1 = (FORMATS[n] for n in ("float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"))
NAN, INF = float("nan"), float("inf")


def wild(rows, columns, seed=0, dtype=torch.bfloat16):
    """Numbers over many binades, with zeros."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randint(-20, 12, (rows, columns), generator=generator)
    values = torch.randn(rows, columns, generator=generator) * 2.0**spread
    return values.masked_fill(torch.rand(rows, columns, generator=generator) < 0.1, 0.0).to(dtype)


def cast(values, form):
    """The twin of rounding, by ml_dtypes: float32 to the format and back, saturating."""
    clipped = np.clip(np.asarray(values, np.float32), -form.max, form.max).astype(np.float32)
    return clipped.astype(getattr(ml_dtypes, form.name)).astype(np.float32)


def blockwise(matrix, block, treat):
    """The twin of blocks: ``treat`` for each block by itself, in a loop."""
    values = matrix.float().numpy()
    result = np.zeros_like(values)
    for i in range(0, values.shape[0], block[0]):
        for j in range(0, values.shape[1], block[1]):
            cell = values[i : i + block[0], j : j + block[1]]
            result[i : i + block[0], j : j + block[1]] = treat(cell)
    return torch.from_numpy(result)


@pytest.mark.parametrize("form", [E4M3, E5M2], ids=lambda f: f.name)
@pytest.mark.parametrize("power", [False, True])
def test_a_scale_takes_the_largest_magnitude_to_the_largest_number(form, power):
    for amax in (1e-3, 1.0, 447.0, 448.0, 1e30):
        scale = scale_for(torch.tensor(amax), form, power).item()
        exact = np.float32(form.max) / np.float32(amax)
        assert scale == (2.0 ** math.floor(math.log2(exact)) if power else exact)


@pytest.mark.parametrize("amax", [0.0, INF, NAN])
def test_no_scale_comes_from_zero_inf_or_nan(amax):
    assert scale_for(torch.tensor(amax), E4M3, power_of_two=False).item() == 1.0
    assert scale_for(torch.tensor(amax), E4M3, power_of_two=True).item() == 1.0


def test_a_scale_beyond_float32_is_its_largest_number():
    assert scale_for(torch.tensor(2.0**-140), E4M3, power_of_two=False).item() == FORMATS["float32"].max
    assert scale_for(torch.tensor(2.0**-140), E4M3, power_of_two=True).item() == 2.0**127


def test_the_largest_magnitude_is_found_among_negative_numbers_and_nan():
    assert largest_magnitude(torch.tensor([1.0, -3.0], dtype=torch.float16)).item() == 3.0
    assert largest_magnitude(torch.tensor([1.0, NAN])).isnan()


@pytest.mark.parametrize("form", [E4M3, E5M2], ids=lambda f: f.name)
def test_one_scale_for_a_tensor(form):
    matrix, scale = wild(16, 32), torch.tensor(37.5)
    operand = by_tensor(matrix, form, scale)
    expected = cast(matrix.float().numpy() * np.float32(37.5), form)
    assert np.array_equal(operand.values.numpy(), expected)
    assert operand.factor.item() == np.float32(1) / np.float32(37.5)


@pytest.mark.parametrize("power", [False, True])
@pytest.mark.parametrize("block", [(1, 128), (128, 128), (128, 1)])
def test_float32_scales_for_blocks(block, power):
    matrix = wild(150, 256)

    def treat(cell):
        peak = np.abs(cell).max()
        scale = np.float32(E4M3.max) / peak if peak else np.float32(1)
        if power:
            scale = np.float32(2.0 ** math.floor(math.log2(scale)))
        return cast(cell * scale, E4M3) * (np.float32(1) / scale)

    assert torch.equal(by_blocks(matrix, E4M3, block, power).tensor, blockwise(matrix, block, treat))


@pytest.mark.parametrize("form", [E4M3, E5M2], ids=lambda f: f.name)
@pytest.mark.parametrize("block", [(1, 32), (32, 32), (32, 1)])
def test_powers_of_two_for_microscaling_blocks(block, form):
    matrix = wild(70, 64)

    def treat(cell):
        peak = float(np.abs(cell).max())
        power = np.float32(2.0 ** (math.ceil(math.log2(peak / form.max)) if peak else -127))
        return cast(cell / power, form) * power

    operand = by_microscaling(matrix, form, block)
    assert torch.equal(operand.tensor, blockwise(matrix, block, treat))
    assert (operand.scaled.abs() <= form.max).all()  # rounded up, so nothing saturates


def test_microscaling_reaches_both_ends_of_e8m0():
    tiny = torch.tensor([[2.0**-140] + [0.0] * 31])
    assert by_microscaling(tiny, E4M3, (1, 32)).tensor[0, 0] == 0  # below half of E4M3's smallest number at 2^-127
    smallest = torch.tensor([[2.0**-127 * 2.0**-6] + [0.0] * 31])
    assert torch.equal(by_microscaling(smallest, E4M3, (1, 32)).tensor, smallest)
    largest = torch.tensor([[2.0**127] + [0.0] * 31])
    assert torch.equal(by_microscaling(largest, E4M3, (1, 32)).tensor, largest)
    assert by_microscaling(torch.tensor([[NAN] + [1.0] * 31]), E4M3, (1, 32)).tensor.isnan().all()


@pytest.mark.parametrize("block", [(1, 16), (16, 16), (16, 1)])
def test_two_levels_of_scales_for_four_bits(block):
    matrix = wild(40, 64)
    one = np.float32(1)
    whole = np.float32(matrix.abs().max().item())
    encode = np.float32(E4M3.max * E2M1.max) / whole
    decode = one / encode

    def treat(cell):
        peak = np.float32(np.abs(cell).max())
        scale = cast(peak * (encode * np.float32(1 / 6)), E4M3)
        with np.errstate(divide="ignore"):
            inverse = np.minimum(one / (scale * decode), np.finfo(np.float32).max)
        return cast(cell * inverse, E2M1) * scale

    operand = by_nvfp4(matrix, block, by_chance=False)
    assert torch.equal(operand.values, blockwise(matrix, block, treat))
    assert operand.factor.item() == decode


def test_four_bits_of_nothing_and_of_inf_are_no_nan():
    assert torch.equal(by_nvfp4(torch.zeros(1, 16), (1, 16), False).tensor, torch.zeros(1, 16))
    assert not by_nvfp4(torch.tensor([[INF] + [1.0] * 15]), (1, 16), False).tensor.isnan().any()


def test_chance_depends_on_seed_and_values_alone_and_leaves_the_generator_be():
    matrix = wild(16, 64).float()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again = (by_nvfp4(matrix, (1, 16), by_chance=True).tensor for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, by_nvfp4(matrix, (1, 16), by_chance=False).tensor)
    torch.manual_seed(4)
    assert not torch.equal(first, by_nvfp4(matrix, (1, 16), by_chance=True).tensor)


def test_chance_is_right_on_average():
    # Sixteen values per block, one of them the largest, so that the scale is known: 6 and, by chance, 0.5 or 1.
    row = torch.tensor([6.0, *[0.6] * 15])
    matrix = row.repeat(4000, 1) * torch.linspace(1, 2, 4000)[:, None]
    torch.manual_seed(0)
    result = by_nvfp4(matrix, (1, 16), by_chance=True).tensor / by_nvfp4(matrix, (1, 16), False).tensor[:, :1] * 6
    mean = result[:, 1:].double().mean().item()
    # The scale itself is rounded to 4 bits: what is to be met is the average of the scaled values.
    wanted = (by_nvfp4(matrix, (1, 16), False).scaled / by_nvfp4(matrix, (1, 16), False).codes[:, :1] * 6)[:, 1:]
    assert abs(mean - wanted.double().mean().item()) < 5 * 0.25 / math.sqrt(60_000)


class TestAgainstTorchao:
    """Another implementation altogether."""

    @pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
    def test_microscaling(self, name):
        mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
        config = pytest.importorskip("torchao.prototype.mx_formats.config")
        matrix = wild(64, 128, seed=5)
        theirs = mx.MXTensor.to_mx(
            matrix, getattr(torch, name), 32, scaling_mode=config.ScaleCalculationMode.RCEIL
        ).dequantize(torch.float32)
        assert torch.equal(by_microscaling(matrix, FORMATS[name], (1, 32)).tensor, theirs)

    def test_four_bits(self):
        nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
        generator = torch.Generator().manual_seed(6)
        matrix = torch.randn(64, 128, generator=generator)
        matrix[0, 0] = 6 * 448 * 2.0**-8  # so that the tensor's scale is a power of two, and no reciprocal is rounded
        scales, packed = nvfp4.nvfp4_quantize(matrix, 16, torch.tensor(2.0**-8))
        codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
        table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        values = table[(codes & 7).int()] * torch.where(codes > 7, -1.0, 1.0)
        theirs = values * scales.float().repeat_interleave(16, -1) * 2.0**-8
        assert torch.equal(by_nvfp4(matrix, (1, 16), by_chance=False).tensor, theirs)
