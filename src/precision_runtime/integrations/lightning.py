"""Precision plugins for Lightning: ``FabricPrecision`` and ``TrainerPrecision``. Each is loaded when it is asked for.

fabric = Fabric(plugins=FabricPrecision("16-mixed"))
trainer = Trainer(plugins=TrainerPrecision("bf16-true", updates="stochastic"))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from precision_runtime.integrations.fabric import FabricPrecision
    from precision_runtime.integrations.trainer import TrainerPrecision

_HOME = {"FabricPrecision": "fabric", "TrainerPrecision": "trainer"}

__all__ = ["FabricPrecision", "TrainerPrecision"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"precision_runtime.integrations.{_HOME[name]}"), name)
