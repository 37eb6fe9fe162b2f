"""The ledger: in which dtype each part of a model really ran, weighted by work, for one step.

    with runtime.ledger() as ledger:
        runtime.backward(loss_fn(model(x), y))
    ledger.low_precision  # share of the operations of products and convolutions in fewer bits than float32
    ledger.verify(0.9)

A mode that is set and silently not applied (autocast on a device that ignores it, layers that upcast, a switch that
somebody threw) gives right results slowly, and nothing else says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

from rich.table import Table
from torch import nn

from precision_runtime.counting.bookkeeping import OUTSIDE, Bookkeeper, Key
from precision_runtime.counting.work import Kind
from precision_runtime.errors import ConfigurationError, PrecisionError
from precision_runtime.layers import QuantizedLayer
from precision_runtime.printing import printed
from precision_runtime.setup.islands import island_around, islands_in
from precision_runtime.setup.unwrapping import inside

# Everything else that a product or reduction runs in has fewer bits of significand than float32.
FULL = frozenset(("float32", "float64", "complex64", "complex128"))


WHERE = ("forward", "backward")


@dataclass(frozen=True)
class Entry:
    """Work of one module itself (not of modules inside it). ``work``: operations of a product, elements of a reduction.

    ``dtype`` is that of a product's operands or of a reduction's result, or the format that the layer says it rounds
    operands to (``float8_e4m3fn``). ``weights``: the format that the layer stores its weight in, where that is another
    (``nf4``). ``island``: the module is, or lies in, a declared island.
    """

    module: str
    type: str
    where: str
    kind: Kind
    dtype: str
    work: float
    island: bool = False
    weights: str = ""

    @property
    def low(self) -> bool:
        """Whether the work ran in fewer bits than float32."""
        return self.dtype not in FULL


@dataclass(frozen=True)
class Part:
    """What one module did, both directions together. ``low`` is the share of ``work`` that ran in low precision."""

    module: str
    type: str
    work: float
    low: float
    dtypes: dict[str, float]  # work by dtype
    island: bool
    weights: str

    def __str__(self) -> str:
        stored = f"weights in {self.weights}" if self.weights else ""
        about = ", ".join(filter(None, (self.type, stored, "an island" if self.island else "")))
        return _shown(self.module) + (f" ({about})" if about else "")


class Ledger:
    """Records what runs inside ``with``; afterwards it holds the figures.

    ``models``: the modules that work is put down to, set up by this package or by anybody else, or not at all.
    ``lane`` says in texts how they run. ``tf32``: products of float32 are looked at for TF32. ``before`` and
    ``unknown``: entries, and ops of unknown work, that are shown as long as nothing has been recorded here. ``done`` is
    called with the ledger after a block that did not raise.
    """

    def __init__(
        self,
        *models: nn.Module,
        lane: str = "",
        tf32: bool = False,
        before: Iterable[Entry] | None = None,
        unknown: Iterable[str] = (),
        done: Callable[[Ledger], None] | None = None,
    ) -> None:
        wrong = [type(m).__name__ for m in models if not isinstance(m, nn.Module)]
        if wrong:
            raise ConfigurationError(f"a ledger takes torch.nn.Modules, got {', '.join(wrong)}")
        self.lane = lane
        self.unknown: tuple[str, ...] = tuple(unknown)
        self._models, self._tf32, self._done = tuple(map(inside, models)), tf32, done
        self._entries: tuple[Entry, ...] | None = None if before is None else tuple(before)
        self._book: Bookkeeper | None = None

    def __enter__(self) -> Ledger:
        if self._book is not None:
            raise ConfigurationError("this ledger is recording already; a ledger inside it is another Ledger object")
        self._modules = _named(self._models)
        book = Bookkeeper(self._modules, self._tf32)
        book.__enter__()
        self._book = book
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._book is not None
        book, self._book = self._book, None
        book.__exit__(kind, error, trace)
        islands = _islands(self._models)
        self._entries = tuple(
            self._entry(key, work, _is_island(key.module, islands)) for key, work in book.work.items()
        )
        self.unknown = tuple(sorted(book.unknown))
        self._modules = {}
        if self._done is not None and error is None:
            self._done(self)

    def _entry(self, key: Key, work: float, island: bool) -> Entry:
        module = self._modules.get(key.module)
        kind = "" if module is None else type(module).__name__
        stored = module.storage if isinstance(module, QuantizedLayer) and key.kind == "product" else ""
        return Entry(key.module, kind, key.where, key.kind, key.dtype, work, island, stored)

    @property
    def recorded(self) -> bool:
        """Whether there are figures."""
        return self._entries is not None

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Everything that was noted. Raises ``ConfigurationError`` where nothing has been recorded."""
        if self._entries is None:
            raise ConfigurationError(
                "this ledger has recorded nothing yet; run a step inside it: with runtime.ledger() as ledger: ..."
            )
        return self._entries

    @property
    def low_precision(self) -> float:
        """The share (0 … 1) of the work that ran in fewer bits than float32, forward and backward.

        Of matrix products and convolutions, by operations; where there was none, of reductions, by elements.
        """
        return _share(self._weighed())

    def share(self, kind: Kind = "product", where: str | None = None) -> float:
        """As ``low_precision``, of one kind of work ("product", "reduction") and one direction; NaN without work."""
        return _share([e for e in self.entries if e.kind == kind and where in (None, e.where)])

    def by_dtype(self, kind: Kind = "product") -> dict[str, float]:
        """Work of a kind by dtype, most first."""
        return _by_dtype(e for e in self.entries if e.kind == kind)

    def parts(self, kind: Kind = "product") -> list[Part]:
        """What each module did itself, most work first."""
        found: dict[str, list[Entry]] = {}
        for entry in self.entries:
            if entry.kind == kind:
                found.setdefault(entry.module, []).append(entry)
        parts = [
            Part(name, es[0].type, sum(e.work for e in es), _share(es), _by_dtype(es), es[0].island, es[0].weights)
            for name, es in found.items()
        ]
        return sorted(parts, key=lambda part: -part.work)

    def verify(self, low_precision: float = 0.9) -> float:
        """Return the share of low precision, declared islands left out; raise ``PrecisionError`` where it is less.

        The message names the modules with the most work in full precision. Raises ``ConfigurationError`` for a share
        that is none.
        """
        if not 0.0 <= low_precision <= 1.0:
            raise ConfigurationError(f"low_precision={low_precision!r} is not allowed: a share is a number from 0 to 1")
        entries = [e for e in self._weighed() if not e.island]
        lane = f" in {self.lane}" if self.lane else ""
        if not entries:
            raise PrecisionError(
                f"no matrix product, convolution or reduction ran{lane} outside of islands while the ledger recorded, "
                "so nothing shows that the mode took effect; record a whole step, the model's forward at least"
            )
        share = _share(entries)
        if share < low_precision:
            raise PrecisionError(self._shortfall(entries, share, low_precision, lane))
        return share

    def _shortfall(self, entries: list[Entry], share: float, wanted: float, lane: str) -> str:
        what = "matrix products and convolutions" if entries[0].kind == "product" else "reductions"
        total = sum(e.work for e in entries)
        full: dict[str, list[Entry]] = {}
        for entry in entries:
            if not entry.low:
                full.setdefault(entry.module, []).append(entry)
        worst = sorted(full.items(), key=lambda item: -sum(e.work for e in item[1]))[:5]
        lines = [
            f"  {_shown(name)}{f' ({es[0].type})' if es[0].type else ''}: {sum(e.work for e in es) / total:.1%} of all "
            f"work, in {' and '.join(_by_dtype(es))}, {' and '.join(w for w in WHERE if w in {e.where for e in es})}"
            for name, es in worst
        ]
        more = f"  and {len(full) - len(worst)} more" if len(full) > len(worst) else ""
        ran = ", ".join(f"{dtype} {work / total:.1%}" for dtype, work in _by_dtype(entries).items())
        return "\n".join(
            [
                f"only {share:.1%} of the work of {what} ran in low precision{lane}, {wanted:.1%} is asked for "
                f"({ran}). Most work in full precision:",
                *lines,
                *([more] if more else []),
                "A part that is to stay in float32 is declared: islands={'name': '32'}.",
            ]
        )

    def _weighed(self) -> list[Entry]:
        products = [e for e in self.entries if e.kind == "product"]
        return products or list(self.entries)

    def to_dict(self) -> dict[str, Any]:
        """Builtins only, for JSON. Shares are null where there was no work."""
        return {
            "lane": self.lane,
            "low_precision": _number(self.low_precision),
            "products": {w: _number(self.share("product", w)) for w in WHERE},
            "reductions": {w: _number(self.share("reduction", w)) for w in WHERE},
            "entries": [{**asdict(e), "low": e.low} for e in self.entries],
            "unknown_ops": list(self.unknown),
        }

    def to_json(self) -> str:
        """``to_dict`` as JSON."""
        return json.dumps(self.to_dict())

    def table(self, most: int = 20) -> Table:
        """A table of the modules with the most work, products before reductions, and of all together."""
        title = f"share of the work that really ran in low precision{f', {self.lane}' if self.lane else ''}"
        table = Table(title=title, title_justify="left")
        table.add_column("module")
        table.add_column("work")
        for column in ("of all", "low precision"):
            table.add_column(column, justify="right")
        table.add_column("ran in")
        kinds: tuple[tuple[Kind, str], ...] = (("product", "products"), ("reduction", "reductions"))
        for kind, noun in kinds:
            parts = self.parts(kind)
            total = sum(part.work for part in parts)
            if not total:
                continue
            for part in parts[:most]:
                share = f"{part.work / total:.1%}"
                table.add_row(str(part), noun, share, f"{part.low:.1%}", _ran(part.dtypes, part.work))
            if len(parts) > most:
                rest = sum(part.work for part in parts[most:])
                table.add_row(f"{len(parts) - most} more", noun, f"{rest / total:.1%}", "", "")
            ran = _ran(self.by_dtype(kind), total)
            table.add_row("all", noun, "100.0%", f"{self.share(kind):.1%}", ran, style="bold")
            table.add_section()
        if self.unknown:
            table.caption = f"not weighed, because their work is unknown: {', '.join(self.unknown)}"
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        if not self.recorded:
            return repr(self)
        return printed(self.table())

    def __repr__(self) -> str:
        if self._book is not None:
            return "<Ledger, recording>"
        if not self.recorded:
            return "<Ledger, nothing recorded yet>"
        return f"<Ledger, {self.low_precision:.1%} of the work in low precision>"


def _share(entries: Iterable[Entry]) -> float:
    entries = list(entries)
    total = sum(e.work for e in entries)
    return sum(e.work for e in entries if e.low) / total if total else float("nan")


def _number(share: float) -> float | None:
    return None if share != share else share  # noqa: PLR0124 - NaN, which JSON has not


def _by_dtype(entries: Iterable[Entry]) -> dict[str, float]:
    found: dict[str, float] = {}
    for entry in entries:
        found[entry.dtype] = found.get(entry.dtype, 0.0) + entry.work
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _ran(dtypes: dict[str, float], total: float) -> str:
    return ", ".join(d if work == total else f"{d} {work / total:.1%}" for d, work in dtypes.items())


def _shown(path: str) -> str:
    return path or "the model itself"


def _prefixes(models: tuple[nn.Module, ...]) -> Iterator[tuple[str, nn.Module]]:
    """With several models each path begins with the model's class, and a number where the classes are the same."""
    counts: dict[str, int] = {}
    for model in models:
        name = type(model).__name__
        counts[name] = counts.get(name, -1) + 1
        yield ("" if len(models) == 1 else f"{name}{counts[name] or ''}"), model


def _named(models: tuple[nn.Module, ...]) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for prefix, model in _prefixes(models):
        for path, module in model.named_modules():
            if id(module) not in seen:
                seen.add(id(module))
                found[".".join(filter(None, (prefix, path)))] = module
    return found


def _islands(models: tuple[nn.Module, ...]) -> list[tuple[str, Any]]:
    return [(prefix, island) for prefix, model in _prefixes(models) for island in islands_in(model)]


def _is_island(module: str, islands: list[tuple[str, Any]]) -> bool:
    if module == OUTSIDE:
        return False
    for prefix, island in islands:
        path = module.removeprefix(prefix).removeprefix(".") if prefix else module
        if (not prefix or module == prefix or module.startswith(f"{prefix}.")) and island_around(path, [island]):
            return True
    return False
