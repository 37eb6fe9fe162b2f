"""Rounding to a half format at random, right on average.

A value between two neighbours of the format becomes the upper one with the probability that its distance from the
lower one has in their gap: the expectation of the result is the value itself, so that of many small updates none is
lost for good (Gupta et al., 2015, arXiv:1502.02551, section 3; for bfloat16 weights Zamirai et al., 2020,
arXiv:2010.06192).
"""

from __future__ import annotations

import torch

from precision_runtime.formats import FORMATS

BITS = 24  # of each random word: float32's significand is all that a half format can have to drop

_SIGNIFICAND = 23  # stored bits of float32's significand
_BIAS = 127


def round_stochastically(values: torch.Tensor, dtype: torch.dtype, words: torch.Tensor) -> torch.Tensor:
    """``values`` (float32) in ``dtype`` (float16 or bfloat16), up or down as ``words`` decide.

    ``words``: int32, of the same shape, uniform in [0, 2^24). Added to the magnitude's bits below the format's last
    place, they carry into it with exactly the right probability: the mean over all words is the value itself, to the
    last bit. Only below float16's smallest value, 2^-24, the probability has a resolution, of 2^-24. Infinite values
    and NaN stay; beyond the largest finite value a carry leads to inf, as rounding to nearest does.
    """
    bits = values.view(torch.int32)
    stored = FORMATS[str(dtype).removeprefix("torch.")].precision - 1
    drop = _SIGNIFICAND - stored
    if dtype is torch.bfloat16:  # float32's exponents: the same number of bits goes, also where values are subnormal
        rounded = (bits + (words >> (BITS - drop))) & -(1 << drop)
        return torch.where(torch.isfinite(values), rounded.view(torch.float32), values).to(dtype)
    # Below the smallest normal value the last place stays where it is, and more bits go.
    smallest = 1 - FORMATS["float16"].emax
    exponent = ((bits >> _SIGNIFICAND) & 0xFF) - _BIAS
    dropped = (drop + (smallest - exponent).clamp(min=0)).clamp(max=_SIGNIFICAND)
    unit = torch.ones_like(bits)
    rounded = ((bits + (words >> (BITS - dropped))) & -(unit << dropped)).view(torch.float32)
    last = FORMATS["float16"].smallest_subnormal
    up = words.to(torch.float32) < values.abs() * (2.0**BITS / last)
    tiny = (up.to(torch.float32) * last).copysign(values)
    rounded = torch.where(values.abs() < last, tiny, rounded)
    return torch.where(torch.isfinite(values), rounded, values).to(dtype)


def words_like(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One random word for each of ``values``, from ``generator``, which is on their device."""
    return torch.randint(0, 1 << BITS, values.shape, dtype=torch.int32, device=values.device, generator=generator)


def mixed(seed: int, count: int) -> int:
    """A seed of 32 bits for the ``count``-th use of ``seed``: neighbours have nothing in common.

    The finalizer of splitmix64 (Steele, Lea and Flood, 2014). torch's CPU generator reads 32 bits of a seed.
    """
    mask = (1 << 64) - 1
    state = (seed * 0xD1342543DE82EF95 + (count + 1) * 0x9E3779B97F4A7C15) & mask
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return (state ^ (state >> 31)) & 0xFFFFFFFF
