"""This package's modes inside other frameworks: ``integrations.lightning`` and ``integrations.accelerate``.

    from precision_runtime.integrations.lightning import FabricPrecision, TrainerPrecision
    from precision_runtime.integrations.accelerate import PrecisionAccelerator

Importing this file imports none of them. Their classes raise ``UnsupportedError`` where the framework is not installed.
``plain`` finds the model that a framework has wrapped.
"""

from __future__ import annotations

from precision_runtime.setup.unwrapping import plain

__all__ = ["plain"]
