"""How far perturbed references lie from the reference: what rounding the operands must cost, element by element.

Large tensors are gone through piece by piece: the spread of a language model's logits, beside the logits and their
error, would be the most memory that an audit needs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from precision_runtime.auditing.executing.noise import largest

# A reference this large is no number that anybody computed: it is finfo(float64).min or the like, used as a mask.
SENTINEL = 1e200
# Elements: 1 MB in FP64, what a core's cache holds. The audit of a GPT-2 takes as long with 2^19, 8 % more with 2^21.
PIECE = 2**17


class Spread:
    """Root mean square distances of ``samples`` from ``reference`` (flat, FP64), by element and over all (``rms``).

    ``wide`` are references disturbed ``width`` times as much; where a ``width``-th of their distance is larger, it
    counts. Without samples ``rms`` is 0.
    """

    def __init__(
        self, reference: torch.Tensor, samples: Sequence[torch.Tensor],
        wide: Sequence[torch.Tensor] = (), width: float = 1.0,
    ) -> None:  # fmt: skip
        self._reference = reference
        self._kinds = [(kind, wider) for kind, wider in ((samples, 1.0), (wide, width)) if kind]
        self._whole: torch.Tensor | None = None  # of a tensor that is no more than one piece
        sums = [0.0] * len(self._kinds)
        for piece in pieces(reference) if self._kinds else ():
            found = [self._distance(piece, *kind) for kind in self._kinds]
            sums = [total + float(torch.linalg.vector_norm(f)) ** 2 for total, f in zip(sums, found, strict=True)]
            if reference.numel() <= PIECE:
                self._whole = _larger(found)
        self.rms = math.sqrt(max(sums) / reference.numel()) if sums and reference.numel() else 0.0

    def within(self, piece: slice) -> torch.Tensor | None:
        """The distances of the elements of this piece, not to be written to; None where there are no samples."""
        if self._whole is not None or not self._kinds:
            return self._whole
        return _larger([self._distance(piece, *kind) for kind in self._kinds])

    def _distance(self, piece: slice, samples: Sequence[torch.Tensor], width: float) -> torch.Tensor:
        reference, total = self._reference[piece], None
        for sample in samples:
            difference = sample[piece] - reference
            # A sample beyond the reach of FP64 (a mask's constant) says nothing about the spread.
            if not largest(difference) < SENTINEL:
                difference.masked_fill_(~(difference.abs() < SENTINEL), 0.0)
            if len(samples) == 1:
                return difference.abs_().div_(width) if width != 1.0 else difference.abs_()
            total = difference.square_() if total is None else total.addcmul_(difference, difference)
        assert total is not None
        return total.div_(len(samples) * width * width).sqrt_()


def _larger(found: Sequence[torch.Tensor]) -> torch.Tensor:
    return found[0] if len(found) == 1 else torch.maximum(*found)


def pieces(t: torch.Tensor) -> Iterator[slice]:
    """A flat tensor's places, at most ``PIECE`` at a time."""
    for start in range(0, t.numel(), PIECE):
        yield slice(start, start + PIECE)
