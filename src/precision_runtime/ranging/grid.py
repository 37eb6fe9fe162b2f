"""Rounding of FP64 values to any binary format with at most FP32's precision and exponents, whatever torch knows of it.

Adding 1.5 * 2^k to a value and taking it away again rounds the value to a multiple of 2^(k - 52), to nearest with ties
to even, because float64 itself rounds so. With k taken from each value's exponent this rounds to a precision, and with
k held at the smallest normal exponent to the format's subnormal numbers. What rounds beyond the largest finite value
becomes inf, as IEEE 754 has it (section 4.3.1).
"""

from __future__ import annotations

from typing import Any

import torch

from precision_runtime.formats import FORMATS, Format

HALF_RANGE = FORMATS["float16"].emax
FULL_RANGE = FORMATS["float32"].emax

# Formats with the precision of one and the range of another: what fails in one and holds in the other says which of
# the two was missing.
HYBRIDS = {
    f.name: f
    for f in (
        Format("float16's precision with float32's range", FORMATS["float16"].precision, FULL_RANGE),
        Format("bfloat16's precision with float16's range", FORMATS["bfloat16"].precision, HALF_RANGE),
        Format("float32's precision with float16's range", FORMATS["float32"].precision, HALF_RANGE),
    )
}

_EXPONENT = 0x7FF0000000000000  # the eleven exponent bits of float64


def round_to(values: torch.Tensor, form: Format) -> torch.Tensor:
    """``values`` (float64 or complex128) at the nearest numbers of ``form``, ties to even; a new tensor, same dtype.

    inf and NaN stay, zeros keep their sign. float64 itself as ``form`` changes nothing.
    """
    if form.precision >= FORMATS["float64"].precision:
        return values.clone()
    if values.is_complex():
        return torch.view_as_complex(round_to(torch.view_as_real(values.resolve_conj()), form))
    # Four times the largest value still rounds to inf below, and its step is far from float64's own limit.
    clamped = values.clamp(-4.0 * form.max, 4.0 * form.max)
    bits: Any = clamped.contiguous().view(torch.int64)
    power: torch.Tensor = bits.bitwise_and(_EXPONENT).view(torch.float64)
    step = power.clamp(min=form.smallest_normal).mul_(1.5 * 2.0 ** (53 - form.precision))
    rounded = (clamped + step).sub_(step).copysign_(values)
    return torch.where(rounded.abs() > form.max, torch.inf * values.sign(), rounded)


def doublings(largest: float, form: Format) -> int:
    """How often ``largest`` (positive) may be doubled before it rounds to inf; negative where it is inf already."""
    # Half a step beyond the largest value is what rounds to the even number that is not there.
    edge = form.max * (1.0 + form.unit_roundoff / (2.0 - form.eps))
    count = 0
    while largest < edge:
        largest, count = 2.0 * largest, count + 1
    while largest >= edge:
        largest, count = largest / 2.0, count - 1
    return count


def halvings(values: torch.Tensor, form: Format, factor: float, limit: int) -> int | None:
    """How often ``values`` (float64) may be halved before rounding costs more than ``factor`` roundings should.

    One rounding of values of full precision costs u / sqrt(3) of their rms. None: more often than ``limit``; -1: not
    even as they are.
    """
    rms = float(torch.linalg.vector_norm(values))
    if rms == 0.0:
        return None
    allowed: float = factor * form.unit_roundoff / 3.0**0.5 * rms

    def holds(count: int) -> bool:
        # Halving is exact in float64: the format is made finer instead of the values smaller.
        scaled = values * 2.0**-count
        lost = float(torch.linalg.vector_norm(round_to(scaled, form) - scaled))
        return lost * 2.0**count <= allowed

    if not holds(0):
        return -1
    low, high = 0, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return None if low == limit else low
