"""What loading a checkpoint changed, as rows."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from precision_runtime.printing import printed

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


@dataclass(frozen=True)
class Change:
    """One thing that is not what it was when it was saved.

    ``kind``: mode, recipe, switch, island, scaler, updates, weight, optimizer. ``inf`` and ``zero`` count values that
    became that. ``lossy``: more is lost than a rounding of each value.
    """

    kind: str
    name: str
    before: str
    after: str
    note: str = ""
    inf: int = 0
    zero: int = 0
    lossy: bool = False

    def __str__(self) -> str:
        what = f"{self.kind} {self.name}" if self.name else self.kind
        return f"{what}: {self.before} -> {self.after}{f' ({self.note})' if self.note else ''}"


@dataclass(frozen=True)
class ProbeResult:
    """How the outputs of the probe came out again, one output at ``output``.

    ``difference``: |new - saved| / |saved| (L2 norms). ``lost_bits``: how far the saved outputs, and those in the
    present mode, are from the FP64 outputs of the loaded weights, beyond what the two modes must cost; the larger one.
    """

    output: str
    difference: float
    lost_bits: float
    budget: float
    message: str = ""

    @property
    def ok(self) -> bool:
        """Whether they are the same function's outputs."""
        return self.lost_bits <= self.budget

    def __str__(self) -> str:
        verdict = "as it must be" if self.ok else f"NOT the same function: {self.message}"
        return (
            f"probe{self.output}: differs by {self.difference:.2g}, {self.lost_bits:.1f} bits beyond what the modes "
            f"must cost; {verdict}"
        )


@dataclass(frozen=True)
class Changes:
    """The rows, and the probe's results where the checkpoint has one."""

    rows: tuple[Change, ...]
    probe: tuple[ProbeResult, ...] = ()

    @property
    def lossy(self) -> tuple[Change, ...]:
        """The rows that lose more than roundings."""
        return tuple(row for row in self.rows if row.lossy)

    @property
    def ok(self) -> bool:
        """Whether every output of the probe came out again; True without a probe."""
        return all(result.ok for result in self.probe)

    def to_dict(self) -> dict[str, Any]:
        """Builtins only."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "probe": [{**asdict(result), "ok": result.ok} for result in self.probe],
            "ok": self.ok,
        }

    def to_json(self) -> str:
        """``to_dict`` as JSON."""
        return json.dumps(self.to_dict())

    def _nothing(self) -> str:
        return "\n".join(["loading changed nothing", *map(str, self.probe)])

    def table(self, most: int = 40) -> Table:
        """A table of the rows, lossy ones first, with the probe below."""
        from rich.table import Table

        table = Table(title=f"what loading changed: {len(self.rows)}", title_justify="left")
        for column in ("what", "name", "was", "is", "inf", "0", "why"):
            table.add_column(column, justify="right" if column in ("inf", "0") else "left")
        rows = sorted(self.rows, key=lambda row: not row.lossy)
        for row in rows[:most]:
            counts = (str(row.inf or ""), str(row.zero or ""))
            style = "bold" if row.lossy else None
            table.add_row(row.kind, row.name, row.before, row.after, *counts, row.note, style=style)
        rest = [f"{len(rows) - most} more"] if len(rows) > most else []
        table.caption = "\n".join([*rest, *map(str, self.probe)]) or None
        table.caption_justify = "left"
        return table

    def __rich__(self) -> Table | Text:
        from rich.text import Text

        return self.table() if self.rows else Text(self._nothing())

    def __str__(self) -> str:
        return printed(self.table()) if self.rows else self._nothing()
