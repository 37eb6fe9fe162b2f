"""Float32 products that stay float32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def without_autocast(device: str) -> Iterator[None]:
    """Inside a caller's autocast the float32 product would become a half one."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        yield
        return
    torch.set_autocast_enabled(device, False)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, True)
