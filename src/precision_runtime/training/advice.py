"""Which loss scale would have kept the gradients: worked out from the true ones, and tried."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from precision_runtime.formats import Format

# Gradients may lose elements that carry less than this share of their norm.
_NEGLIGIBLE = 0.01
_LARGEST = 2.0**64  # no scale beyond is tried
_FIRST = 2.0**16  # where dynamic scalers start


@dataclass(frozen=True)
class ScaleAdvice:
    """``needed``: the smallest power of two that keeps the gradients, ``settles``: the largest that keeps them finite,
    to which a dynamic scaler grows; ``kept``: the share of their norm that is not zero at ``needed``.
    """

    needed: float
    settles: float
    kept: float

    def __str__(self) -> str:
        start = "" if self.needed <= _FIRST else f"; a scaler that starts at {_FIRST:g} grows to it in time"
        return (
            f"with the loss multiplied by {self.needed:g} = 2^{math.log2(self.needed):.0f}, {self.kept:.1%} of the "
            f"gradients' norm is kept, and they stay finite up to {self.settles:g}"
            f"{', where a dynamic scaler settles' if self.settles < _LARGEST else ' and beyond'}{start}"
        )


Gradients = Callable[[float], Mapping[str, torch.Tensor]]  # of the first step, for a loss multiplied by so much


def advise(true: Mapping[str, torch.Tensor], form: Format, at: Gradients) -> ScaleAdvice | None:
    """The advice for gradients whose FP64 values are ``true``, or None where no scale keeps them."""
    elements = torch.cat([g.reshape(-1).abs().to(torch.float64) for g in true.values()])
    elements = elements[elements > 0].sort().values
    if not elements.numel():
        return None
    energy = elements.square().cumsum(0)
    place = int((energy <= (_NEGLIGIBLE**2) * energy[-1]).sum())
    smallest = float(elements[min(place, elements.numel() - 1)])
    scale = 2.0 ** max(0, math.ceil(math.log2(form.smallest_normal / smallest)))
    while scale <= _LARGEST:
        found = at(scale)
        if not _finite(found):
            return None
        kept = _kept(true, found)
        if kept > 1.0 - _NEGLIGIBLE:
            break
        scale *= 2.0
    else:
        return None
    if scale == 1.0:  # no scale is missed: something else took the gradients
        return None
    settles = scale
    while settles < _LARGEST and _finite(at(2.0 * settles)):
        settles *= 2.0
    return ScaleAdvice(scale, settles, kept)


def _finite(found: Mapping[str, torch.Tensor]) -> bool:
    return all(bool(torch.isfinite(g).all()) for g in found.values())


def _kept(true: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> float:
    whole = kept = 0.0
    for name, g in true.items():
        square = g.to(torch.float64).square()
        whole += float(square.sum())
        kept += float(square[found[name] != 0].sum()) if name in found else 0.0
    return math.sqrt(kept / whole) if whole else 1.0
