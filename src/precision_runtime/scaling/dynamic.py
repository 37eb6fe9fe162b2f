"""The scaler that finds its scale by itself."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from precision_runtime.errors import ConfigurationError
from precision_runtime.scaling.contract import check_numbers
from precision_runtime.scaling.history import ScaleState
from precision_runtime.scaling.rounds import LARGEST, SMALLEST, RoundScaler


class DynamicScaler(RoundScaler):
    """Doubles the scale after ``growth_interval`` good rounds, halves it after an overflow, never below ``floor`` and
    never above ``ceiling``.

    The floor is 1 unless told otherwise. Scaling exists to lift gradients; below 1 it would push them down, towards
    the underflow that it is there to prevent, and an overflow at scale 1 belongs to the model: no scale cures it. A
    scale without a floor halves until it is 0, and then the next healthy step writes NaN into every weight (0 / 0).

    ``hysteresis`` is the number of overflows, 1 or more, that it takes to lower the scale; a good round's growth
    resets the count. The rest as in ``RoundScaler``. Raises ``ConfigurationError`` for settings that cannot work, all
    of them at once.
    """

    settings: ClassVar[tuple[str, ...]] = (
        "growth_factor", "backoff_factor", "growth_interval", "floor", "hysteresis", "ceiling", *RoundScaler.settings,
    )  # fmt: skip

    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        floor: float = 1.0,
        hysteresis: int = 1,
        ceiling: float = LARGEST,
        *,
        patience: int = 200,
        on_stall: Literal["warn", "raise", "ignore"] = "warn",
        process_group: Any = None,
    ) -> None:
        check_numbers(
            init_scale=init_scale, growth_factor=growth_factor, backoff_factor=backoff_factor,
            growth_interval=growth_interval, floor=floor, hysteresis=hysteresis, ceiling=ceiling, patience=patience,
        )  # fmt: skip
        wrong = [
            text
            for bad, text in (
                (not SMALLEST <= floor <= init_scale, f"2**-126 <= floor <= init_scale, got {floor=}, {init_scale=}"),
                (not init_scale <= ceiling, f"init_scale <= ceiling, got {init_scale=}, {ceiling=}"),
                (not ceiling <= LARGEST, f"ceiling <= 2**127, got {ceiling}"),
                (not growth_factor > 1.0, f"growth_factor > 1, got {growth_factor}"),
                (not 0.0 < backoff_factor < 1.0, f"0 < backoff_factor < 1, got {backoff_factor}"),
                (not growth_interval >= 1, f"growth_interval >= 1, got {growth_interval}"),
                (not hysteresis >= 1, f"hysteresis >= 1, got {hysteresis}"),
                (not patience >= 1, f"patience >= 1, got {patience}"),
            )
            if bad
        ]
        if wrong:
            raise ConfigurationError(f"a loss scaler needs {'; '.join(wrong)}")
        self.growth_factor = float(growth_factor)
        self.backoff_factor = float(backoff_factor)
        self.growth_interval = int(growth_interval)
        self.floor = float(floor)
        self.ceiling = float(ceiling)
        self.hysteresis = int(hysteresis)
        super().__init__(init_scale, patience, on_stall, process_group)

    def after(self, state: ScaleState, overflow: bool, culprits: tuple[str, ...]) -> ScaleState:
        """See ``RoundScaler.after``."""
        if overflow and state.scale <= self.floor:
            return state.changed("stuck", state.scale, culprits, stalled=state.stalled + 1)
        if overflow and state.forgiven + 1 < self.hysteresis:
            return state.changed("forgiven", state.scale, culprits, forgiven=state.forgiven + 1)
        if overflow:
            return state.changed("overflow", max(self.floor, state.scale * self.backoff_factor), culprits)
        if state.good + 1 >= self.growth_interval:
            grown = min(self.ceiling, state.scale * self.growth_factor)
            return state.counted(0, 0) if grown == state.scale else state.changed("growth", grown)
        return state.counted(state.good + 1, state.forgiven)

    def outlook(self) -> str:
        """See ``RoundScaler.outlook``."""
        if self.scale >= self.ceiling:
            return f"It is at its ceiling, {self.ceiling:g}."
        rest = self.growth_interval - self._next.good
        grown = min(self.ceiling, self.scale * self.growth_factor)
        return f"It grows to {grown:g} after {rest} more good round{'' if rest == 1 else 's'} in a row."
