"""What a cast costs the values of a tensor, counted exactly: those that become inf, 0 or another whole number.

Rounding is the price of every narrower format and is not counted. The count goes through a tensor in pieces that stay
in the processor's cache, looks at most of them once, for their smallest and largest magnitude, and casts only the
values that are near the format's ends; nothing of the tensor's size is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.parameter import is_lazy

from precision_runtime.casting import CAST, FLOATING
from precision_runtime.formats import FORMATS, Format

# From 32,768 values on torch divides an operation among threads, whose meeting costs more than the work (measured: 2 to
# 100 times the time where other processes run). In float32 it is 96 KiB, which stays in a core's cache.
_PIECE = 3 << 13


@dataclass(frozen=True)
class Toll:
    """Counts over one tensor of ``elements`` values, for one cast.

    ``inf``: finite values that become infinite. ``zero``: values other than 0 that become 0. ``whole``: in a tensor
    that holds whole numbers only (positions, counts), those that become another number. ``heavy``: in some row (all
    values with the same first index) what became 0 weighs more than rounding that row costs, u / sqrt(3) times its
    norm: a sum of products notices. Values that are inf or NaN already count nowhere.
    """

    elements: int
    inf: int = 0
    zero: int = 0
    whole: int = 0
    heavy: bool = False


def toll(tensor: torch.Tensor, dtype: torch.dtype) -> Toll | None:
    """What ``tensor.to(dtype)`` costs, both of them floating.

    None where it cannot be told: on the meta device nothing is held, and other kinds of tensors (sparse, nested, those
    of libraries) hold their values in ways of their own.
    """
    if not is_readable(tensor) or tensor.dtype not in FLOATING:
        return None
    source, target = format_of(tensor.dtype), format_of(dtype)
    if not tensor.numel() or _holds(target, source):
        return Toll(tensor.numel())
    with torch.no_grad():
        return _Pass(tensor.detach(), dtype, target).toll()


def is_readable(tensor: torch.Tensor) -> bool:
    """Whether the values of ``tensor`` can be looked at, one by one."""
    return (
        not is_lazy(tensor)
        and not tensor.is_meta
        and tensor.layout is torch.strided
        and type(tensor.data) is torch.Tensor
    )


def format_of(dtype: torch.dtype) -> Format:
    """The format of a floating dtype."""
    return FORMATS[str(dtype).removeprefix("torch.")]


def changed(tensor: torch.Tensor, dtype: torch.dtype) -> int:
    """How many values of a floating tensor a cast to ``dtype`` and back would change."""
    with torch.no_grad():
        return sum(_count((_cast(p, dtype).to(p.dtype) != p) & ~p.isnan()) for p in pieces(tensor))


def pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The values of ``tensor`` as vectors that a core's cache holds; views, where it is contiguous."""
    yield from tensor.detach().reshape(-1).split(_PIECE)


class _Pass:
    """One pass over one tensor."""

    def __init__(self, tensor: torch.Tensor, dtype: torch.dtype, target: Format) -> None:
        self.tensor, self.dtype, self.target = tensor.contiguous(), dtype, target
        self.length = tensor.numel() // tensor.shape[0] if tensor.dim() > 1 else tensor.numel()
        self.inf = self.zero = 0
        self.heavy = False
        self._judged = -1  # the last row whose zeros have been weighed

    def toll(self) -> Toll:
        """Count."""
        top, bottom = self.target.max, self.target.smallest_subnormal
        largest = 0.0
        room = torch.empty(min(_PIECE, self.tensor.numel()), dtype=self.tensor.dtype, device=self.tensor.device)
        for number, piece in enumerate(pieces(self.tensor)):
            magnitude = torch.abs(piece, out=room[: piece.numel()])
            least, most = (float(end) for end in torch.aminmax(magnitude))
            if not least >= bottom:  # also where it is NaN
                self._count_zeros(piece, number * _PIECE)
            if not most <= top:
                self.inf += _count(_is_infinite(_cast(piece, self.dtype)) & (magnitude != torch.inf))
            largest = max(largest, most)  # a NaN is no larger than anything
        whole = self._whole() if largest > self.target.exact_integers else 0
        return Toll(self.tensor.numel(), self.inf, self.zero, whole, self.heavy)

    def _count_zeros(self, piece: torch.Tensor, start: int) -> None:
        gone = (_cast(piece, self.dtype) == 0) & (piece != 0)
        count = _count(gone)
        self.zero += count
        if self.heavy or not count:
            return
        rows = torch.unique((gone.nonzero().squeeze(1) + start) // self.length)
        for row in rows[rows > self._judged].tolist():
            self._judged = row
            if self._outweighs(row):
                self.heavy = True
                return

    def _outweighs(self, row: int) -> bool:
        lost = total = 0.0
        values = self.tensor.view(-1)[row * self.length : (row + 1) * self.length]
        for piece in pieces(values):
            wide = piece.double()
            squares = wide * wide
            total += float(squares.sum())
            lost += float(squares[_cast(piece, self.dtype) == 0].sum())
        return lost > self.target.unit_roundoff**2 / 3.0 * total

    def _whole(self) -> int:
        """Whole numbers that become others; 0 where the tensor holds a fraction."""
        count = 0
        for piece in pieces(self.tensor):
            if not bool((piece == piece.round()).all()):
                return 0
            after = _cast(piece, self.dtype)
            count += _count((after.to(piece.dtype) != piece) & ~_is_infinite(after))
        return count


def _cast(piece: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return CAST[dtype](piece)


def _is_infinite(piece: torch.Tensor) -> torch.Tensor:
    return piece.abs() == torch.inf


def _count(flags: torch.Tensor) -> int:
    return int(torch.count_nonzero(flags))


def _holds(target: Format, source: Format) -> bool:
    """Whether every value of ``source`` is one of ``target``."""
    return (
        target.precision >= source.precision
        and target.max >= source.max
        and target.smallest_subnormal <= source.smallest_subnormal
    )
