"""What a mode does to a model and its calls: one file per family of modes, chosen through a table."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

import torch

from precision_runtime.modes import Mode
from precision_runtime.options import Options
from precision_runtime.strategies.apex import apex
from precision_runtime.strategies.base import Strategy
from precision_runtime.strategies.float8 import Float8Strategy
from precision_runtime.strategies.full import FullStrategy
from precision_runtime.strategies.half import HalfStrategy
from precision_runtime.strategies.mixed import MixedStrategy
from precision_runtime.strategies.quantized import QuantizedStrategy
from precision_runtime.strategies.tf32 import Tf32Strategy

_FAMILIES: MappingProxyType[str, Callable[[Mode, torch.device, Options], Strategy]] = MappingProxyType(
    {
        "full": FullStrategy,
        "true": HalfStrategy,
        "mixed": MixedStrategy,
        "tf32": Tf32Strategy,
        "float8": Float8Strategy,
        "quantized": QuantizedStrategy,
        "apex": apex,
    }
)

__all__ = ["Strategy", "strategy_for"]


def strategy_for(mode: Mode, device: torch.device, options: Options | None = None) -> Strategy:
    """The strategy that runs ``mode`` on ``device``. Strategies are values: equal for equal arguments."""
    return _FAMILIES[mode.family](mode, torch.device(device), options or Options())
