"""The scaler whose scale never changes."""

from __future__ import annotations

from typing import Any, Literal

from precision_runtime.errors import ConfigurationError
from precision_runtime.scaling.contract import check_numbers
from precision_runtime.scaling.history import ScaleState
from precision_runtime.scaling.rounds import LARGEST, SMALLEST, RoundScaler


class StaticScaler(RoundScaler):
    """Multiplies every loss by the same ``scale``, and skips the steps that overflow.

    For those who know their gradients, or repeat a run to the bit. The rest as in ``RoundScaler``. Raises
    ``ConfigurationError`` for a scale outside 2**-126 ... 2**127.
    """

    def __init__(
        self,
        scale: float,
        *,
        patience: int = 200,
        on_stall: Literal["warn", "raise", "ignore"] = "warn",
        process_group: Any = None,
    ) -> None:
        check_numbers(scale=scale, patience=patience)
        if not SMALLEST <= scale <= LARGEST:
            raise ConfigurationError(f"a static loss scale lies in 2**-126 ... 2**127, got {scale}")
        if not patience >= 1:
            raise ConfigurationError(f"a loss scaler needs patience >= 1, got {patience}")
        super().__init__(scale, patience, on_stall, process_group)

    def after(self, state: ScaleState, overflow: bool, culprits: tuple[str, ...]) -> ScaleState:
        """See ``RoundScaler.after``."""
        if overflow:
            return state.changed("stuck", state.scale, culprits, stalled=state.stalled + 1)
        return state.counted(state.good + 1, 0)

    def outlook(self) -> str:
        """See ``RoundScaler.outlook``."""
        return "It is static: it never changes."
