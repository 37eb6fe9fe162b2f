"""Floating-point formats as data: independent facts are stored, everything else is derived. Imports no torch.

Sources: IEEE 754-2019 (binary16, binary32, binary64), Intel's bfloat16 numerics definition (2018), the Open Compute
Project's 8-bit Floating Point Specification 1.0 (E4M3, E5M2) and Microscaling Formats Specification 1.0 (E2M1, E8M0).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Format:
    """A binary floating-point format with gradual underflow.

    ``name`` is torch's dtype name where torch has one, ``precision`` the significand's bits with the implicit one,
    ``emax`` the largest exponent of a finite value. Where IEEE 754 is followed the rest is derived from them; a format
    that does otherwise states its smallest exponent of a normal value (``lowest``) and its largest value (``largest``).
    """

    name: str
    precision: int
    emax: int
    lowest: int | None = None
    largest: float | None = None

    @property
    def emin(self) -> int:
        """Smallest exponent of a normal value: 1 - emax in IEEE 754, whose topmost exponent is for inf and NaN."""
        return 1 - self.emax if self.lowest is None else self.lowest

    @property
    def unit_roundoff(self) -> float:
        """u, the largest relative error of rounding to nearest: 2^-precision."""
        return 2.0**-self.precision

    @property
    def eps(self) -> float:
        """Distance from 1 to the next larger value: 2u."""
        return 2.0 ** (1 - self.precision)

    @property
    def max(self) -> float:
        """Largest finite value."""
        return (2.0 - self.eps) * 2.0**self.emax if self.largest is None else self.largest

    @property
    def smallest_normal(self) -> float:
        """Smallest positive value with full precision."""
        return 2.0**self.emin

    @property
    def smallest_subnormal(self) -> float:
        """Smallest positive value, which is also the step between subnormal values."""
        return 2.0 ** (1 + self.emin - self.precision)

    @property
    def exact_integers(self) -> int:
        """Every whole number up to this one (in magnitude) is exact: 2^precision."""
        return int(2**self.precision)


FORMATS = MappingProxyType(
    {
        f.name: f
        for f in (
            Format("float64", precision=53, emax=1023),
            Format("float32", precision=24, emax=127),
            Format("float16", precision=11, emax=15),
            Format("bfloat16", precision=8, emax=127),
            # Operands of products only: a value is stored in float32, whose exponent it has.
            Format("tf32", precision=11, emax=127),
            # No inf: the topmost exponent holds numbers, all but the last code, which is NaN (480 would be that code).
            Format("float8_e4m3fn", precision=4, emax=8, lowest=-6, largest=448.0),
            Format("float8_e5m2", precision=3, emax=15),
            # Neither inf nor NaN: every code is a number.
            Format("float4_e2m1fn", precision=2, emax=2, lowest=0),
            # Powers of two alone, without sign and zero: the scales of MX blocks.
            Format("float8_e8m0fnu", precision=1, emax=127, lowest=-127),
        )
    }
)
