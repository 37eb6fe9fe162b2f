"""The intrinsic error's source: FP64 values disturbed by one unit roundoff."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from precision_runtime.tree import map_tensors

# Every half format is exact for whole numbers up to bfloat16's 256. Larger ones in a floating tensor are positions,
# counts or ids: code that casts them makes an error of its own, which noise on them would excuse.
EXACT_INTEGERS = 256.0


class Noise:
    """Multiplies by (1 + u xi), xi uniform in [-1, 1], from a generator of its own (seed and sample)."""

    def __init__(self, u: float, seed: int, sample: int) -> None:
        self.u = u
        self._generator = torch.Generator().manual_seed((seed * 1_000_003 + sample * 7919 + 12345) % 2**63)

    def __call__(self, t: torch.Tensor) -> torch.Tensor:
        """Disturb a floating or complex tensor; anything else is returned as it is."""
        if not (t.is_floating_point() or t.is_complex()) or t.numel() == 0 or t.layout is not torch.strided:
            return t
        if t.is_nested:
            return t
        real = torch.float64 if t.dtype in (torch.float64, torch.complex128) else torch.float32
        xi = torch.rand(t.shape, generator=self._generator, dtype=real).mul_(2 * self.u).add_(1.0 - self.u)
        return t * xi.to(t.device)

    def inputs(self, value: Any) -> Any:
        """Disturb inputs: all but whole numbers beyond the exact range (see ``EXACT_INTEGERS``)."""
        return map_tensors(lambda t: t if is_count(t) else self(t), value)

    def parameters(self, true: Mapping[int, torch.Tensor], used: set[int]) -> dict[int, torch.Tensor]:
        """Disturbed copies of the parameters in ``used`` (by id). Buffers are never disturbed: cast tables must show."""
        return {key: self(value) for key, value in true.items() if key in used}


def is_count(t: torch.Tensor) -> bool:
    """Whether a floating tensor holds whole numbers beyond the range where half formats are exact."""
    if not t.is_floating_point() or t.numel() == 0:
        return False
    return bool(float(t.abs().max()) > EXACT_INTEGERS) and bool((t == t.round()).all())
