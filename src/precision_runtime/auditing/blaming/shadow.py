"""FP64 values beside a low-precision run: one shadow for each storage, so that every view of it has one, too."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from precision_runtime.auditing.executing.dispatch import WIDE
from precision_runtime.auditing.executing.places import is_plain, tensors_of
from precision_runtime.auditing.executing.writes import places_written, values_at

_PURGE = 512  # shadows put between two searches for those whose storage is gone
_DOUBLES = (torch.float64, torch.complex128)


class Shadows:
    """FP64 values by storage. A shadow lives as long as its storage; views find it by their sizes and strides."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[StorageWeakRef, torch.Tensor, torch.dtype]] = {}
        self._puts = 0

    def __contains__(self, t: torch.Tensor) -> bool:
        return bool(self._entries) and is_plain(t) and t.untyped_storage()._cdata in self._entries

    def get(self, t: torch.Tensor) -> torch.Tensor | None:
        """The FP64 values of ``t``, a view of its storage's shadow; None where it has none."""
        if t not in self:
            return None
        _, base, dtype = self._entries[t.untyped_storage()._cdata]
        if dtype != t.dtype:
            retyped = _retyped(base, dtype, t.dtype)
            if retyped is None:
                return None
            base = retyped
        return _viewed(base, t)

    def put(self, t: torch.Tensor, values: torch.Tensor | None = None) -> torch.Tensor | None:
        """Give ``t`` a shadow, with ``values`` or its own; return it, or None where it cannot have one."""
        if t.dtype not in (*WIDE, *_DOUBLES) or not is_plain(t) or t.numel() == 0:
            return None
        mine = self.get(t)
        if mine is None:
            storage = t.untyped_storage()
            flat = torch.empty(0, dtype=t.dtype, device=t.device).set_(storage)
            base = flat.to(WIDE.get(t.dtype, t.dtype), copy=True)
            self._entries[storage._cdata] = (StorageWeakRef(storage), base, t.dtype)
            mine = _viewed(base, t)
            self._puts += 1
            if self._puts % _PURGE == 0:
                self._entries = {k: e for k, e in self._entries.items() if not e[0].expired()}
        if values is not None:
            mine.copy_(values)
        return mine

    def drop(self, t: torch.Tensor) -> None:
        """Forget the shadow of the storage of ``t``: its own values count again."""
        if t in self:
            del self._entries[t.untyped_storage()._cdata]


def own(t: torch.Tensor) -> torch.Tensor:
    """The tensor's own values in FP64, a copy."""
    return t.to(WIDE[t.dtype]) if t.dtype in WIDE else t.clone()


def map_operands(
    function: Callable[[torch.Tensor], torch.Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An op's arguments with every floating or complex tensor replaced, one for one."""

    def replace(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return function(value) if value.is_floating_point() or value.is_complex() else value
        if isinstance(value, (list, tuple)) and any(isinstance(v, torch.Tensor) for v in value):
            return [replace(v) for v in value]
        return value

    return tuple(replace(a) for a in args), {k: replace(v) for k, v in kwargs.items()}


def written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The floating tensors among the arguments that the op writes to."""
    values = values_at(places_written(func), args, kwargs)
    return [t for value in values for t in tensors_of(value) if t.is_floating_point() or t.is_complex()]


def relative(low: torch.Tensor, exact: torch.Tensor) -> float:
    """rms(low - exact) / rms(exact) over the elements that are finite in both; 0 where both are zero."""
    error = low.to(exact.dtype) - exact
    if error.numel() == 0:
        return 0.0
    size, off = float(torch.linalg.vector_norm(exact)), float(torch.linalg.vector_norm(error))
    if not math.isfinite(off) or not math.isfinite(size):
        fine = torch.isfinite(error) & torch.isfinite(exact)
        size = float(torch.linalg.vector_norm(exact[fine]))
        off = float(torch.linalg.vector_norm(error[fine]))
    if off == 0.0:
        return 0.0
    return off / size if size > 0.0 else math.inf


def _viewed(base: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    view = base.as_strided(like.size(), like.stride(), like.storage_offset())
    view = view.conj() if like.is_conj() else view
    return torch._neg_view(view) if like.is_neg() else view


def _retyped(base: torch.Tensor, before: torch.dtype, now: torch.dtype) -> torch.Tensor | None:
    """A flat shadow seen as another dtype: complex as pairs of reals and back; other casts of bits are lost."""
    if before.is_complex and now.is_floating_point and now.itemsize * 2 == before.itemsize:
        return torch.view_as_real(base).reshape(-1)
    if now.is_complex and before.is_floating_point and before.itemsize * 2 == now.itemsize and base.numel() % 2 == 0:
        return torch.view_as_complex(base.reshape(-1, 2))
    return None
