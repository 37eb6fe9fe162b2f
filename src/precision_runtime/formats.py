"""Floating-point formats as data: independent facts are stored, everything else is derived. Imports no torch.

Sources: IEEE 754-2019 (binary16, binary32, binary64), Intel's bfloat16 numerics definition (2018).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Format:
    """A binary floating-point format with gradual underflow.

    ``name`` is torch's dtype name where torch has one, ``precision`` the significand's bits with the implicit one,
    ``emax`` the largest exponent of a finite value; the smallest exponent of a normal value is ``1 - emax``.
    """

    name: str
    precision: int
    emax: int

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
        return (2.0 - self.eps) * 2.0**self.emax

    @property
    def smallest_normal(self) -> float:
        """Smallest positive value with full precision."""
        return 2.0 ** (1 - self.emax)

    @property
    def smallest_subnormal(self) -> float:
        """Smallest positive value, which is also the step between subnormal values."""
        return 2.0 ** (2 - self.emax - self.precision)

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
        )
    }
)
