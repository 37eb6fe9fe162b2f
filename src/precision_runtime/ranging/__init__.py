"""How far values are from the edges of a format, and what a format lacks: range, precision, or both.

Names are loaded when they are first used (PEP 562): reading what was measured (``room``, ``need``) needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from precision_runtime.ranging.missing import sensitivity as sensitivity
    from precision_runtime.ranging.need import Forecast as Forecast
    from precision_runtime.ranging.need import Sensitivity as Sensitivity
    from precision_runtime.ranging.room import Headroom as Headroom
    from precision_runtime.ranging.room import Room as Room
    from precision_runtime.ranging.sweeping import headroom as headroom

_HOME = {
    "Forecast": "need",
    "Headroom": "room",
    "Room": "room",
    "Sensitivity": "need",
    "headroom": "sweeping",
    "sensitivity": "missing",
}

__all__ = ["Forecast", "Headroom", "Room", "Sensitivity", "headroom", "sensitivity"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'precision_runtime.ranging' has no attribute {name!r}; it has {__all__}")
    return getattr(importlib.import_module(f"precision_runtime.ranging.{_HOME[name]}"), name)
