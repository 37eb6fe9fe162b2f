"""Which calls use a parameter: a weight may be read beside the module that holds it.

``F.linear(x, embedding.weight)`` in another module's forward, or a method that is not ``forward``, adds to the
parameter's gradient, and a replay of the module's one call cannot show that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from precision_runtime.auditing.executing.recorder import Call, Recorder

Place = tuple[str, int] | None  # a call by its name and index; None outside of all calls


class Uses:
    """Notes, while an FP64 run goes forward, in which innermost call an op is given a parameter or a view of one."""

    def __init__(self, parameters: Iterable[nn.Parameter], recorder: Recorder) -> None:
        self._by_storage: dict[int, set[int]] = {}
        for p in parameters:
            if p.layout is torch.strided:
                self._by_storage.setdefault(p.untyped_storage()._cdata, set()).add(id(p))
        self._recorder = recorder
        self.found: dict[int, set[Place]] = {}  # by the parameter's id

    def note(self, args: Sequence[Any]) -> None:
        """See what an op is given."""
        if not self._recorder.active:
            return
        for value in args:
            for t in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(t, torch.Tensor) and t.layout is torch.strided and not t.is_nested:
                    for key in self._by_storage.get(t.untyped_storage()._cdata, ()):
                        call = self._recorder.innermost
                        self.found.setdefault(key, set()).add(None if call is None else (call.name, call.index))


def used_elsewhere(call: Call, places: Iterable[Place]) -> bool:
    """Whether one of the places lies outside of the call."""
    return bool(set(places) - {(c.name, c.index) for c in call.subtree()})


def by_name(found: Mapping[int, set[Place]], names: Mapping[int, str]) -> dict[str, frozenset[Place]]:
    """The same by the parameters' names, which outlive the objects."""
    return {names[key]: frozenset(places) for key, places in found.items() if key in names}
