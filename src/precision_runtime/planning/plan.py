"""The plan: what ``setup`` would do to a model and its optimizers, as rows. Made by ``planning``, changes nothing.

    plan = runtime.plan(model, optimizer)
    print(plan)
    plan.lossy  # the rows that lose more than a rounding of each value
    runtime.setup(model, optimizer, strict=True, allow=("*.inv_freq",))

Imports no torch, and rich only to print.
"""

from __future__ import annotations

import fnmatch
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from precision_runtime.errors import ConfigurationError, PrecisionError, unknown_names
from precision_runtime.printing import printed

if TYPE_CHECKING:
    from rich.table import Table

Kind = Literal["parameter", "buffer", "gradient", "layer", "island", "optimizer", "refusal"]


class LossyError(PrecisionError, ValueError):
    """``setup(strict=True)`` would lose what nobody allowed it to lose. ``rows`` are the rows of the plan."""

    def __init__(self, message: str, rows: Sequence[Row] = ()) -> None:
        super().__init__(message)
        self.rows = tuple(rows)


@dataclass(frozen=True)
class Row:
    """One tensor, layer, island or setting of an optimizer; a refusal is a reason for which ``setup`` would raise.

    ``before`` and ``after`` are dtypes of tensors, storage formats (nf4), classes of layers, or values of settings.
    ``cast``: the dtype that autocast makes of a weight for each product, where that is another than ``after``.
    ``inf``, ``zero``, ``whole``: counts as in ``toll.Toll``, in ``after`` or in ``cast``; None where the values are not
    known. ``risks``: what makes the row lossy, as sentences. ``notes``: what else there is to know: why a layer stays,
    what an island is for. ``tied``: the other names of the same tensor.
    """

    name: str
    kind: Kind
    before: str
    after: str
    elements: int = 0
    cast: str = ""
    inf: int | None = 0
    zero: int | None = 0
    whole: int | None = 0
    risks: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()

    @property
    def lossy(self) -> bool:
        """Whether more is lost than a rounding of each value, which is the price of every narrower format."""
        return bool(self.risks)

    @property
    def known(self) -> bool:
        """Whether the values could be looked at."""
        return self.inf is not None

    @property
    def changes(self) -> bool:
        """Whether anything becomes something else."""
        return self.before != self.after or bool(self.cast)

    def __str__(self) -> str:
        arrow = f"{self.before} -> {self.after}" if self.before != self.after else self.before
        via = f" (products in {self.cast})" if self.cast else ""
        why = "; ".join((*self.risks, *self.notes))
        return f"{self.name} ({self.kind}): {arrow}{via}{f': {why}' if why else ''}"


@dataclass(frozen=True)
class Plan:
    """What ``setup`` would do. ``rows`` are in the order of the model's modules, optimizers last."""

    model: str
    mode: str
    accelerator: str
    rows: tuple[Row, ...]

    @property
    def lossy(self) -> tuple[Row, ...]:
        """The rows that lose more than a rounding of each value."""
        return tuple(row for row in self.rows if row.lossy)

    @property
    def refusals(self) -> tuple[Row, ...]:
        """Reasons for which ``setup``, or a step after it, would raise."""
        return self.of("refusal")

    @property
    def unknown(self) -> tuple[Row, ...]:
        """Tensors whose values could not be looked at, on the meta device for instance."""
        return tuple(row for row in self.rows if not row.known)

    def of(self, *kinds: Kind) -> tuple[Row, ...]:
        """The rows of these kinds."""
        return tuple(row for row in self.rows if row.kind in kinds)

    def __getitem__(self, name: str) -> Row:
        """The row of the tensor, layer or setting of this name; a layer's has the layer's name."""
        found = next((row for row in self.rows if name == row.name or name in row.tied), None)
        if found is None:
            raise unknown_names("name", [name], [row.name for row in self.rows], f"the plan of {self.model}")
        return found

    def refuse(self, allow: str | Iterable[str] = ()) -> None:
        """Raise ``LossyError`` with every lossy row that no name or glob of ``allow`` matches.

        Rows whose values are unknown are refused as well: nobody can tell. Raises ``UnknownNameError`` for an entry of
        ``allow`` that matches no row at all.
        """
        patterns = (allow,) if isinstance(allow, str) else tuple(allow)
        wrong = [p for p in patterns if not isinstance(p, str) or not p]
        if wrong:
            raise ConfigurationError(f"allow takes names or globs of rows, such as '*.inv_freq'; got {wrong}")
        names = [name for row in self.rows for name in (row.name, *row.tied)]
        unmatched = [p for p in patterns if not any(_matches(name, p) for name in names)]
        if unmatched:
            raise unknown_names("row", unmatched, list(dict.fromkeys(names)), "allow")

        def allowed(row: Row) -> bool:
            return any(_matches(name, p) for p in patterns for name in (row.name, *row.tied))

        refused = [row for row in self.rows if (row.lossy or not row.known) and not allowed(row)]
        if refused:
            shown = "".join(f"\n  {row}" for row in refused)
            raise LossyError(
                f"{self.mode} would lose more than roundings of {self.model}, and strict=True allows only what is "
                f"named; nothing has been changed:{shown}\nKeep them wide with islands={{'name': '32'}}, or name them "
                f"in allow=({', '.join(repr(row.name) for row in refused[:2])}, ...).",
                refused,
            )

    def to_dict(self) -> dict[str, Any]:
        """Builtins only, for JSON. Counts are null where values are not known."""
        return {
            "model": self.model,
            "mode": self.mode,
            "accelerator": self.accelerator,
            "rows": [{**asdict(row), "lossy": row.lossy} for row in self.rows],
        }

    def to_json(self) -> str:
        """``to_dict`` as JSON."""
        return json.dumps(self.to_dict())

    def summary(self) -> list[str]:
        """One line for each kind of change, with numbers of tensors and values."""
        count: Counter[tuple[str, str, str, str]] = Counter()
        values: Counter[tuple[str, str, str, str]] = Counter()
        for row in self.of("parameter", "buffer", "gradient", "layer"):
            key = (row.kind, row.before, row.after, row.cast)
            count[key] += 1
            values[key] += row.elements
        lines = []
        for (kind, before, after, cast), number in count.items():
            what = f"{number} {kind}{'' if number == 1 else 's'}"
            size = "" if kind == "layer" else f", {values[kind, before, after, cast]:,} values"
            arrow = f"{before}, as before" if before == after else f"{before} -> {after}"
            lines.append(f"{what}{size}: {arrow}{f' (products in {cast})' if cast else ''}")
        return lines

    def table(self, most: int = 40) -> Table:
        """A table of the rows that need a look: refusals, lossy rows, then islands, layers that stay, and notes."""
        from rich.table import Table

        looked = sorted((row for row in self.rows if _weight(row) < _PLAIN), key=_weight)
        title = (
            f"plan of {self.model} in {self.mode} on {self.accelerator}: rows that lose something: {len(self.lossy)}"
        )
        if looked:
            table = Table(title=title, title_justify="left", min_width=len(title))
            for column in ("name", "kind", "from", "to", "inf", "0", "whole", "why"):
                table.add_column(column, justify="right" if column in ("inf", "0", "whole") else "left")
        else:  # title and summary say it all
            table = Table("", title=title, title_justify="left", min_width=len(title), box=None, show_header=False)
        for row in looked[:most]:
            counts = ["?" if n is None else str(n or "") for n in (row.inf, row.zero, row.whole)]
            to = f"{row.after}, products {row.cast}" if row.cast else row.after
            why = "; ".join((*row.risks, *row.notes))
            name = row.name or "(the model itself)"
            table.add_row(name, row.kind, row.before, to, *counts, why, style="bold" if row.lossy else None)
        rest = [f"{len(looked) - most} more rows of this kind"] if len(looked) > most else []
        table.caption = "\n".join([*rest, *self.summary()])
        table.caption_justify = "left"
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        return printed(self.table())

    def __repr__(self) -> str:
        return f"<Plan of {self.model} in {self.mode}, {len(self.rows)} rows, {len(self.lossy)} lossy>"


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatch.fnmatchcase(name, pattern)  # "betas[1]" is a name, too


_PLAIN = 6


def _weight(row: Row) -> int:
    """How early a row is shown; ``_PLAIN`` and above not at all, only counted."""
    if row.kind == "refusal":
        return 0
    if row.lossy:
        return 1
    if not row.known:
        return 2
    if row.kind == "island":
        return 3
    if row.notes:
        return 4 if row.kind in ("optimizer", "layer") else 5
    return _PLAIN if not (row.zero or row.tied) else 5
