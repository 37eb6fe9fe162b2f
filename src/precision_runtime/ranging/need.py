"""What a function needs of a format, as plain data with its text."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from precision_runtime.record import bits

Need = Literal["nothing", "range", "precision", "range or precision", "range and precision"]

_SAID: dict[Need, str] = {
    "nothing": "float16 and bfloat16 hold",
    "range": "it needs range, not precision",
    "precision": "it needs precision, not range",
    "range or precision": "more range would do, and so would more precision",
    "range and precision": "it needs range and precision",
}


@dataclass(frozen=True)
class Forecast:
    """The audit's verdict in one emulated format. ``mode`` is the mode that this foretells, '' for a hybrid format.

    ``expected_error`` is what disturbed FP64 runs alone foretell of the outputs' relative error (L2), ``error`` what
    came out. ``blame`` says which module fails first, and how.
    """

    mode: str
    family: str  # "true" or "mixed"
    format: str
    precision: int
    emax: int
    ok: bool
    lost_bits: float
    expected_error: float
    error: float
    blame: str = ""


@dataclass(frozen=True)
class Sensitivity:
    """Whether a function needs range or precision, and which modes it will hold in; every row is emulated.

    ``needs`` says what float16 and bfloat16 lack, for "true" modes and for "mixed" ones.
    """

    subject: str
    budget: float
    needs: dict[str, Need]
    rows: tuple[Forecast, ...] = ()

    @property
    def holds(self) -> tuple[str, ...]:
        """The modes that are foretold to hold."""
        return tuple(r.mode for r in self.rows if r.mode and r.ok)

    def row(self, mode: str) -> Forecast:
        """The forecast for a mode. Raises ``KeyError`` for a mode that was not asked for."""
        return {r.mode: r for r in self.rows if r.mode}[mode]

    @property
    def advice(self) -> str:
        """One sentence for each family."""
        said: dict[str, list[str]] = {}
        for family, need in self.needs.items():
            said.setdefault(_SAID[need], []).append(family)
        return "; ".join(f"{' and '.join(f)}: {what}{self._use(f)}" for what, f in said.items())

    def _use(self, families: list[str]) -> str:
        if all(self.needs[f] == "nothing" for f in families):
            return ""
        good = [r.mode for r in self.rows if r.mode and r.ok and r.family in families]
        return f": use {' or '.join(good)}" if good else ": no half mode will do; see what is to blame, or use 32-true"

    def to_dict(self) -> dict[str, Any]:
        """Builtins only."""
        return {**dataclasses.asdict(self), "advice": self.advice, "holds": self.holds}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Sensitivity:
        """The inverse of ``to_dict``."""
        return cls(data["subject"], data["budget"], data["needs"], tuple(Forecast(**r) for r in data["rows"]))

    def __str__(self) -> str:
        cells = [("mode", "format", "bits", "largest", "verdict", "lost", "error", "expected", "to blame")]
        for r in self.rows:
            verdict = "holds" if r.ok else "FAILS"
            errors = (f"{r.error:.1e}", f"{r.expected_error:.1e}")
            cells.append(
                (r.mode or "-", r.format, str(r.precision), f"2^{r.emax}", verdict, bits(r.lost_bits), *errors, r.blame)
            )
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        lines = ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
        return "\n".join([f"{self.subject}, emulated: {self.advice}", *lines])
