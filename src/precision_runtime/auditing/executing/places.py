"""Tensors among an op's arguments or results, and where their values are."""

from __future__ import annotations

from typing import Any

import torch


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors among an op's arguments or results, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors_of(v)]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in tensors_of(v)]
    return []


def is_plain(t: torch.Tensor) -> bool:
    """Whether the tensor has a storage that its sizes and strides describe (forward-mode zeros have no memory)."""
    if t.layout is not torch.strided or t.is_nested or t.is_quantized or t.device.type == "meta":
        return False
    return not t._is_zerotensor()


def key_of(t: torch.Tensor) -> int | None:
    """What tells storages apart; None where there is none."""
    return int(t.untyped_storage()._cdata) if is_plain(t) else None
