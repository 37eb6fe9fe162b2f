"""How far values are from the edges of a format, and what a format lacks: range, precision, or both."""

from __future__ import annotations

from precision_runtime.ranging.missing import sensitivity
from precision_runtime.ranging.need import Forecast, Sensitivity
from precision_runtime.ranging.room import Headroom, Room
from precision_runtime.ranging.sweeping import headroom

__all__ = ["Forecast", "Headroom", "Room", "Sensitivity", "headroom", "sensitivity"]
