"""Inputs for tests: the same values in every mode."""

from __future__ import annotations

from typing import Any

import torch

# Not the seed that weights are drawn with: the same seed would draw inputs from the stream that the weights come from.
SEED = 0x9E3779B9


class Values:
    """Draws tensors from a generator of its own, in float64 on the CPU, and rounds them to float32.

    So the values depend neither on the mode nor on the device nor on what else draws. They stay float32: the audit
    takes them as the truth, and a module that was set up casts them itself.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._generator = torch.Generator().manual_seed(SEED)

    def randn(self, *size: Any, dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> torch.Tensor:
        """Standard normal values; sizes as for ``torch.randn``."""
        wide = torch.complex128 if dtype.is_complex else torch.float64
        values = torch.randn(*size, generator=self._generator, dtype=wide, device="cpu")
        return self._finish(values, dtype, requires_grad)

    def rand(self, *size: Any, dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> torch.Tensor:
        """Values uniform in [0, 1); sizes as for ``torch.rand``."""
        wide = torch.complex128 if dtype.is_complex else torch.float64
        values = torch.rand(*size, generator=self._generator, dtype=wide, device="cpu")
        if dtype == torch.float32:  # the last 2^-25 below 1 would be rounded up to 1
            values = (values * 2**24).floor() / 2**24
        return self._finish(values, dtype, requires_grad)

    def randint(self, low: int, high: Any, size: Any = None, *, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """Whole numbers in [low, high); called as ``torch.randint`` is: ``(high, size)`` or ``(low, high, size)``."""
        if size is None:
            low, high, size = 0, low, high
        values = torch.randint(low, high, tuple(size), generator=self._generator, dtype=torch.int64, device="cpu")
        return self._finish(values, dtype, False)

    def tensor(self, data: Any, dtype: torch.dtype | None = None, requires_grad: bool = False) -> torch.Tensor:
        """A new tensor with the values of ``data``.

        Python's floats become float32 whatever the default dtype is; tensors and arrays keep their dtype.
        """
        if isinstance(data, torch.Tensor):
            return self._finish(data.detach().clone(), dtype or data.dtype, requires_grad)
        if dtype is None and not hasattr(data, "dtype"):
            values = _wide(data)
            narrow = {torch.float64: torch.float32, torch.complex128: torch.complex64}
            return self._finish(values, narrow.get(values.dtype, values.dtype), requires_grad)
        return self._finish(torch.tensor(data, dtype=dtype, device="cpu"), dtype, requires_grad)

    def _finish(self, values: torch.Tensor, dtype: torch.dtype | None, requires_grad: bool) -> torch.Tensor:
        return values.to(self.device, dtype or values.dtype).requires_grad_(requires_grad)


def _wide(data: Any) -> torch.Tensor:
    """``torch.tensor(data)`` as if the default dtype were float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return torch.tensor(data, device="cpu")
    finally:
        torch.set_default_dtype(before)
