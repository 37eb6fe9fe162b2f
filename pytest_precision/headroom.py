"""How much headroom a test's lane has left, over all its measurements. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Left:
    """Powers of two: -1 where the mode fails as it is. ``reached`` is False where all that were tried hold."""

    bits: int
    reached: bool

    def __str__(self) -> str:
        if self.bits < 0:
            return "no room"
        return f"{self.bits}{'' if self.reached else '+'} left"

    def sentence(self) -> str:
        """``5 bits of headroom``."""
        return f"{'' if self.reached else 'at least '}{bits_of_headroom(self.bits)}"


def bits_of_headroom(bits: int) -> str:
    """The number in words."""
    return "no headroom" if bits < 0 else f"{bits} bit{'' if bits == 1 else 's'} of headroom"


def left_of(measured: Iterable[Mapping[str, Any]]) -> Left | None:
    """The least of several measurements (``Headroom.to_dict()``) that came to an edge, or else the least limit.

    A small limit of one must not hide how the edge of another moves. None without any.
    """
    found = [Left(int(each["bits"]), bool(each["reached"])) for each in measured]
    return min(found, key=lambda left: (not left.reached, left.bits), default=None)
