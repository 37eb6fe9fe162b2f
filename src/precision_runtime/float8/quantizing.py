"""Tensors scaled and rounded to 8 or 4 bits, as operands of a product.

An operand is a float32 matrix whose last dimension is the one that the product sums over, and a factor that belongs
before it. With one scale per tensor the matrix holds the format's own numbers and the factor is the scale's reciprocal;
with blocks it holds them times the scales of their blocks. All of these are exact in float32 (an FP8 number has 4
significant bits at most, a block's scale is a power of two, or an E4M3 number beside 2 bits), except under
``use_f32_scales``, where each value is rounded once in float32.

Rules of scaling: NVIDIA's documentation of its recipes ("Low precision training"), where inf in a tensor saturates and
NaN stays NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from precision_runtime.float8.rounding import rounded, rounded_by_chance
from precision_runtime.formats import FORMATS, Format

_LARGEST = FORMATS["float32"].max
_E4M3, _E2M1 = FORMATS["float8_e4m3fn"], FORMATS["float4_e2m1fn"]


@dataclass(frozen=True)
class Operand:
    """``values`` times ``factor`` (None is 1) is the rounded tensor; both are float32.

    ``scaled`` and ``codes``: what was rounded, and the outcome, before any scale is taken back.
    """

    values: torch.Tensor
    factor: torch.Tensor | None
    scaled: torch.Tensor
    codes: torch.Tensor

    @property
    def tensor(self) -> torch.Tensor:
        """The rounded tensor itself."""
        return self.values if self.factor is None else self.values * self.factor


def largest_magnitude(tensor: torch.Tensor) -> torch.Tensor:
    """The largest magnitude as a float32 scalar; NaN where there is one."""
    low, high = torch.aminmax(tensor.detach())
    return torch.maximum(-low, high).float()


def quotient(number: float, tensor: torch.Tensor) -> torch.Tensor:
    """``number`` / ``tensor``, rounded once: torch computes ``2.0 / tensor`` as 2.0 times a rounded reciprocal."""
    return torch.full_like(tensor, number) / tensor


def scale_for(amax: torch.Tensor, form: Format, power_of_two: bool) -> torch.Tensor:
    """The scale that takes ``amax`` to the largest number of ``form``; 1 where amax is 0, inf or NaN.

    A power of two is the next lower one, so that nothing saturates.
    """
    scale: Any = quotient(form.max, amax).clamp(max=_LARGEST)
    if power_of_two:
        scale = scale.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
    result: torch.Tensor = torch.where((amax > 0) & torch.isfinite(amax), scale, torch.ones_like(scale))
    return result


def by_tensor(tensor: torch.Tensor, form: Format, scale: torch.Tensor) -> Operand:
    """One scale for the whole tensor."""
    scaled = tensor.float() * scale
    codes = rounded(scaled, form)
    return Operand(codes, scale.reciprocal(), scaled, codes)


def by_blocks(tensor: torch.Tensor, form: Format, block: tuple[int, int], power_of_two: bool) -> Operand:
    """One float32 scale, or power of two, for each block of so many rows and columns."""
    blocks, shape = _cut(tensor.float(), block)
    scale = scale_for(_peaks(blocks), form, power_of_two)
    scaled = blocks * scale
    codes = rounded(scaled, form)
    return _joined(codes * scale.reciprocal(), None, scaled, codes, shape)


def by_microscaling(tensor: torch.Tensor, form: Format, block: tuple[int, int]) -> Operand:
    """One E8M0 scale for each block: the power of two next above amax / largest number, so that nothing saturates."""
    blocks, shape = _cut(tensor.float(), block)
    exponent, inverse = _e8m0(_peaks(blocks) / form.max)
    scaled = blocks * inverse
    codes = rounded(scaled, form)
    return _joined(codes * exponent, None, scaled, codes, shape)


def by_nvfp4(tensor: torch.Tensor, block: tuple[int, int], by_chance: bool) -> Operand:
    """One E4M3 scale for each block and one float32 scale for the tensor, to E2M1; rounded to nearest or by chance.

    Chance is a function of torch's seed and the values: the same run gives the same numbers, and the generator from
    which dropout draws is not touched, so that other modes see the same masks.
    """
    blocks, shape = _cut(tensor.float(), block)
    peaks = _peaks(blocks)
    whole = peaks.max()
    # What takes the tensor's largest magnitude to the largest E2M1 number times the largest E4M3 scale. In a tensor of
    # zeros it is float32's largest number, and for inf 1: division by 0 gives neither inf nor NaN then.
    encode = quotient(_E4M3.max * _E2M1.max, whole).clamp(max=_LARGEST)
    encode = torch.where(encode == 0, torch.ones_like(encode), encode)
    decode = encode.reciprocal()
    scales = rounded(peaks * (encode * (1.0 / _E2M1.max)), _E4M3)
    scaled = blocks * (scales * decode).reciprocal().clamp(max=_LARGEST)
    codes = rounded_by_chance(scaled, _E2M1, _noise(scaled)) if by_chance else rounded(scaled, _E2M1)
    return _joined(codes * scales, decode, scaled, codes, shape)


def _cut(matrix: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, tuple[int, int]]:
    """The matrix as (rows of blocks, rows, columns of blocks, columns), filled up with zeros; and its own shape."""
    rows, columns = matrix.shape
    padded = functional.pad(matrix, (0, -columns % block[1], 0, -rows % block[0]))
    return padded.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0])), (rows, columns)


def _peaks(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.abs().amax((1, 3), keepdim=True)


def _joined(
    values: torch.Tensor, factor: torch.Tensor | None, scaled: torch.Tensor, codes: torch.Tensor, shape: tuple[int, int]
) -> Operand:
    matrices = [t.flatten(2, 3).flatten(0, 1)[: shape[0], : shape[1]] for t in (values, scaled, codes)]
    return Operand(matrices[0], factor, matrices[1], matrices[2])


def _e8m0(wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest power of two from 2^-127 to 2^127 that is not below ``wanted``, and its reciprocal; NaN for NaN."""
    bits: Any = wanted.view(torch.int32)
    biased = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    # Of the subnormal numbers, those up to 2^-127 (bits 0x400000) have the lowest code.
    biased = torch.where(bits <= 0x400000, torch.zeros_like(biased), biased).clamp(max=254)
    power, inverse = _two_to(biased), _two_to(254 - biased)
    broken = torch.isnan(wanted)
    return power.masked_fill(broken, float("nan")), inverse.masked_fill(broken, float("nan"))


def _two_to(biased: torch.Tensor) -> torch.Tensor:
    """2^(biased - 127) from the bits of float32; 2^-127 is one of its subnormal numbers."""
    bits: Any = torch.where(biased == 0, 0x400000, biased << 23).to(torch.int32)
    power: torch.Tensor = bits.view(torch.float32)
    return power


def _noise(values: torch.Tensor) -> torch.Tensor:
    """Uniform float32 numbers in [0, 1), from torch's seed and the bits of ``values``."""
    bits: Any = values.contiguous().view(torch.int32)
    content = int(bits.sum(dtype=torch.int64))
    generator = torch.Generator(values.device).manual_seed((torch.initial_seed() ^ content) % 2**63)
    whole = torch.randint(2**24, values.shape, generator=generator, dtype=torch.int32, device=values.device)
    return whole.float().mul_(2.0**-24)
