"""What happened to a scale, round by round, and the sentences that tell it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from precision_runtime.errors import PrecisionError

KEPT = 32  # changes remembered: four halvings and a doubling a day cover a week

Reason = Literal["overflow", "forgiven", "stuck", "growth"]


class StallWarning(UserWarning):
    """Every step is skipped, and no change of the scale can help."""


class StalledError(PrecisionError, RuntimeError):
    """The same, for those who want training to end there."""


@dataclass(frozen=True)
class Change:
    """One round worth remembering. ``round`` counts from 1; ``culprits`` are names of parameters.

    ``reason``: "overflow" lowered the scale, hysteresis has "forgiven" it, it was "stuck" at its lowest value, or good
    rounds let it grow ("growth").
    """

    round: int
    reason: Reason
    before: float
    after: float
    culprits: tuple[str, ...] = ()

    def __str__(self) -> str:
        after = {
            "overflow": f"fell from {self.before:g} to {self.after:g}",
            "forgiven": f"stayed {self.after:g} (hysteresis)",
            "stuck": f"stayed {self.after:g}, for it can go no lower",
            "growth": f"grew from {self.before:g} to {self.after:g}",
        }[self.reason]
        why = "" if self.reason == "growth" else f" because of inf or NaN in the gradient of {listed(self.culprits)}"
        return f"round {self.round}: the scale {after}{why}"


@dataclass(frozen=True)
class ScaleState:
    """What changes. ``good``: good rounds since the scale's last change; ``forgiven``: overflows that hysteresis has
    forgiven; ``stalled``: rounds in a row that overflowed at the lowest scale; ``rounds``: all rounds.
    """

    scale: float
    good: int = 0
    forgiven: int = 0
    stalled: int = 0
    rounds: int = 0
    history: tuple[Change, ...] = ()

    def changed(self, reason: Reason, scale: float, culprits: tuple[str, ...] = (), **counts: int) -> ScaleState:
        """The state after a round in which something happened; counts that are not given start again at 0."""
        change = Change(self.rounds + 1, reason, self.scale, scale, culprits)
        state = ScaleState(scale, rounds=self.rounds + 1, history=(*self.history, change)[-KEPT:])
        return replace(state, **counts)  # type: ignore[arg-type]  # counts are ints, which only some fields are

    def counted(self, good: int, forgiven: int, rounds: int = 1) -> ScaleState:
        """The state after a round in which nothing happened."""
        return replace(self, good=good, forgiven=forgiven, stalled=0, rounds=self.rounds + rounds)

    def to_dict(self) -> dict[str, Any]:
        """Builtins only."""
        history = [[c.round, c.reason, c.before, c.after, list(c.culprits)] for c in self.history]
        counts = {"good": self.good, "forgiven": self.forgiven, "stalled": self.stalled, "rounds": self.rounds}
        return {"scale": self.scale, **counts, "history": history}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ScaleState:
        """The inverse."""
        history = tuple(
            Change(int(number), reason, float(before), float(after), tuple(culprits))
            for number, reason, before, after, culprits in data["history"]
        )
        good, forgiven, stalled, rounds = (int(data[name]) for name in ("good", "forgiven", "stalled", "rounds"))
        return cls(float(data["scale"]), good, forgiven, stalled, rounds, history)


STATE_KEYS = ("scale", "good", "forgiven", "stalled", "rounds", "history")


def listed(names: tuple[str, ...], most: int = 3) -> str:
    """The first few names, and how many there are beside them."""
    if not names:
        return "a parameter that nobody named"
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
