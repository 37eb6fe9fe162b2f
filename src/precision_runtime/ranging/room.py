"""What a headroom measurement found, as plain data with its text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Axis = Literal["inputs", "values", "activations"]

_TITLES = {
    "inputs": "inputs scaled, by audits: what fails first, by module",
    "values": "each module's results and gradients as they are, against the format that holds them",
    "activations": "one module's results scaled, by audits: until anything fails",
}
_SHOWN = 12  # rows of each part; the others have more room


@dataclass(frozen=True)
class Room:
    """How far one module is from the edge. ``up`` and ``down``: doublings and halvings that still hold.

    None: all that were tried hold. -1: it does not hold as it is. ``above`` and ``below`` say what fails there: a
    finding's kind. ``format`` names what holds the values, where the row is about values.
    """

    axis: Axis
    module: str
    module_type: str
    where: str  # forward, backward
    up: int | None = None
    down: int | None = None
    above: str = ""
    below: str = ""
    format: str = ""

    @property
    def bits(self) -> int | None:
        """The smaller of ``up`` and ``down``; None where neither was reached."""
        return min((b for b in (self.up, self.down) if b is not None), default=None)


@dataclass(frozen=True)
class Headroom:
    """Bits (powers of two) of scale that are left until something overflows, underflows or becomes unstable.

    ``bits`` is the smallest over all rows, at most ``limit``, and -1 where the mode fails already: a number that may
    be compared with a baseline, larger being better. ``audits`` is what it cost.
    """

    subject: str
    mode: str
    accelerator: str
    status: str
    limit: int
    rows: tuple[Room, ...] = ()
    notes: tuple[str, ...] = ()
    audits: int = 0
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def bits(self) -> int:
        """The smallest room of all."""
        return min((r.bits for r in self.rows if r.bits is not None), default=self.limit)

    @property
    def tightest(self) -> Room | None:
        """The row that ``bits`` comes from; None where everything that was tried holds."""
        reached = [r for r in self.rows if r.bits is not None]
        return min(reached, key=lambda r: r.bits if r.bits is not None else self.limit, default=None)

    def room(self, module: str, where: str = "forward", axis: Axis | None = None) -> int | None:
        """The smallest room of one module; None where nothing fails within the limit."""
        rows = [r for r in self.rows if r.module == module and r.where == where and axis in (None, r.axis)]
        return min((r.bits for r in rows if r.bits is not None), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Builtins only."""
        return {**dataclasses.asdict(self), "bits": self.bits, "reached": self.tightest is not None}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Headroom:
        """The inverse of ``to_dict``."""
        known = {f.name: data[f.name] for f in dataclasses.fields(cls) if f.name in data}
        return cls(**{**known, "rows": tuple(Room(**r) for r in data["rows"]), "notes": tuple(data["notes"])})

    def headline(self) -> str:
        """One line: how many bits are left, and what comes then."""
        lane = f"{self.subject} in {self.mode} on {self.accelerator}" + (
            "" if self.status == "native" else f" ({self.status})"
        )
        tightest = self.tightest
        if tightest is None:
            return f"{lane}: more than {self.limit} bits of headroom in every direction that was tried"
        side = tightest.above if tightest.bits == tightest.up else tightest.below
        way = "doubled" if tightest.bits == tightest.up else "halved"
        what = {"inputs": "inputs", "values": f"{tightest.where} values", "activations": "its results"}
        return (
            f"{lane}: {_bits(tightest.bits)} of headroom; then {side} in {_name(tightest)}, {tightest.where} "
            f"({what[tightest.axis]} {way})"
        )

    def __str__(self) -> str:
        lines = [self.headline()]
        for axis, title in _TITLES.items():
            lines += _table(title, [r for r in self.rows if r.axis == axis], self.limit)
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def _table(title: str, rows: Sequence[Room], limit: int) -> list[str]:
    if not rows:
        return []
    ordered = sorted(rows, key=lambda r: limit + 1 if r.bits is None else r.bits)
    cells = [("module", "where", "doubled", "halved")]
    cells += [(_name(r), r.where, _side(r.up, r.above, limit), _side(r.down, r.below, limit)) for r in ordered[:_SHOWN]]
    widths = [max(len(row[i]) for row in cells) for i in range(4)]
    lines = [
        f"  {title}",
        *("    " + "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in cells),
    ]
    if len(ordered) > _SHOWN:
        lines.append(f"    and {len(ordered) - _SHOWN} more with as much room or more")
    return lines


def _name(row: Room) -> str:
    return (row.module or "the whole function") + (f" ({row.module_type})" if row.module_type else "")


def _side(value: int | None, kind: str, limit: int) -> str:
    if value is None:
        return kind or f"> {limit}"
    return f"{_bits(value)}, then {kind}" if value >= 0 else f"fails now: {kind}"


def _bits(value: int | None) -> str:
    return f"{value} bit{'' if value == 1 else 's'}"
