"""Values as they are at this moment, without copying them as long as nobody writes to them.

A run's module calls pass the same tensors on: a result is the next call's input and its caller's result. Copies of all
of them would take several times the memory of the run itself, and a good part of its time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from precision_runtime.auditing.executing.writes import Places, values_at


class Snapshots:
    """Holds what ``take`` returned to its value. A dispatch mode has to announce each op that writes (``before``).

    ``copying`` copies at once, for runs in which no mode sees all ops (compiled code).
    """

    def __init__(self, copying: bool = False) -> None:
        self._copying = copying
        self._shared: dict[int, list[tuple[torch.Tensor, int]]] = {}  # by storage: snapshot, and version when taken

    def take(self, t: torch.Tensor) -> torch.Tensor:
        """``t`` detached, with the value that it has now, for good."""
        own = t.detach()
        if self._copying or own.is_inference() or type(own) is not torch.Tensor or not _has_storage(own):
            return own.clone()
        # The snapshot keeps the storage alive, so that no other one can get its number.
        self._shared.setdefault(own.untyped_storage()._cdata, []).append((own, own._version))
        return own

    def before(self, places: Places, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """An op is about to write to these of its arguments: snapshots of them get memory of their own."""
        for value in values_at(places, args, kwargs) if self._shared else ():
            for t in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(t, torch.Tensor) and _has_storage(t):
                    for own, _ in self._shared.pop(t.untyped_storage()._cdata, ()):
                        with torch._C._DisableTorchDispatch():
                            own.data = own.clone()

    def lost(self) -> set[int]:
        """The ids of snapshots that were written to by what was not announced."""
        return {id(own) for held in self._shared.values() for own, version in held if own._version != version}


def place_of(t: torch.Tensor) -> tuple[Any, ...] | None:
    """Where a tensor's values are, equal for the same values as long as they are alive; None where nobody can tell."""
    if type(t) is not torch.Tensor or not _has_storage(t) or t.is_inference():
        return None
    return t.data_ptr(), t.dtype, t.shape, t.stride(), t._version


def _has_storage(t: torch.Tensor) -> bool:
    return t.layout is torch.strided and not t.is_nested
