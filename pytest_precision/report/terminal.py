"""The terminal's summary: tests by lanes with lost bits, the reasons for skips, and the findings, worst first."""

from __future__ import annotations

import io
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import pytest

from precision_runtime.modes import MODES
from precision_runtime.record import Report, bits
from pytest_precision.report.row import Row

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

MOST_CASES = 40  # shown without -v; two screens
GAP = 2  # columns between two lanes: one of padding, one of the rule

STYLES = {"pass": "green", "FAIL": "bold red", "error": "bold red", "crash": "bold red", "xfail": "yellow",
          "xpass": "yellow", "skip": "dim", "": "dim"}  # fmt: skip
WORDS = {"pass": "hold", "FAIL": "fail", "error": "in error", "crash": "crashed", "xfail": "known to fail",
         "xpass": "unexpectedly hold", "skip": "skipped"}  # fmt: skip


def summarise(
    reporter: pytest.TerminalReporter,
    config: pytest.Config,
    rows: Sequence[Row],
    demands: Sequence[str],
    notes: Sequence[str],
) -> None:
    """Write the section. Without any row, only what the run owes; ``notes`` are on the baseline and files written."""
    if not rows and not demands:
        return
    reporter.section("precision", sep="=")
    if rows:
        reporter.write_line(headline(rows))
        writer = config.get_terminal_writer()
        everything = config.get_verbosity() > 0
        for text in tables(rows, writer.fullwidth, writer.hasmarkup, everything):
            reporter.write_line("")
            reporter.write_line(text)
        for line in [*skips(rows), *findings(rows)]:
            reporter.write_line(line)
    for line in notes:
        reporter.write_line(line)
    for line in demands:
        reporter.write_line(f"precision: {line}", red=True, bold=True)


def headline(rows: Sequence[Row]) -> str:
    """``3 tests x 6 lanes: 12 hold, 4 fail, 2 skipped``."""
    counts = Counter(row.verdict for row in rows)
    told = [f"{counts[verdict]} {word}" for verdict, word in WORDS.items() if counts[verdict]]  # type: ignore[index]
    cases, lanes = len({row.case for row in rows}), len({row.lane for row in rows})
    figures = "figures: lost bits" + ("; left: bits of headroom" if any(row.left is not None for row in rows) else "")
    return f"{_count(cases, 'test')} x {_count(lanes, 'lane')}: {', '.join(told) or 'nothing ran'} ({figures})"


def tables(rows: Sequence[Row], width: int, colour: bool, everything: bool) -> list[str]:
    """The matrix as text; lanes that do not fit beside each other go into further tables."""
    from rich.console import Console

    lanes = lanes_of(rows)
    cells = {(row.case, row.lane): row for row in rows}
    cases = sorted({row.case for row in rows})
    shown = cases
    if not everything and len(cases) > MOST_CASES:
        loud = {row.case for row in rows if row.verdict != "pass"}
        shown = [case for case in cases if case in loud][:MOST_CASES]
    # Names have the room that they need, up to two thirds of the line; longer ones are folded.
    longest = max((len(line) for case in shown for line in _lines(case)), default=0)
    columns = {
        lane: max(len(word) for row in rows if row.lane == lane for word in (lane, _became(row), cell(row).plain))
        for lane in lanes
    }
    texts = []
    for beside in _fitting(columns, width - min(longest, 2 * width // 3)) if shown else ():
        table = _table(cells, shown, beside, rows)
        paper = io.StringIO()
        Console(
            file=paper,
            width=width,
            force_terminal=colour,
            color_system="standard" if colour else None,
            legacy_windows=False,
        ).print(table)
        texts.append("\n".join(line.rstrip() for line in paper.getvalue().rstrip().split("\n")))
    if len(shown) < len(cases):
        texts.append(f"{_count(len(cases) - len(shown), 'test')} not shown; -v shows all")
    return texts


def skips(rows: Iterable[Row]) -> list[str]:
    """One line for each lane and reason."""
    skipped = [row for row in rows if row.verdict == "skip"]
    told = [row.reason if row.reason.startswith(row.mode) else f"{row.lane}: {row.reason}" for row in skipped]
    return [f"skipped {_count(number, 'test')}, {text}" for text, number in sorted(Counter(told).items())]


def findings(rows: Iterable[Row]) -> list[str]:
    """One line for each failed lane, most lost bits first, with the most upstream finding of its first failed check."""
    failed = [(row, row.failed_check) for row in rows if row.verdict == "FAIL"]
    told = [(row, Report.from_dict(dict(check))) for row, check in failed if check is not None]
    told.sort(key=lambda pair: (-_finite(pair[1].lost_bits), pair[0].nodeid))
    lines = []
    for row, report in told:
        more = f" (and {len(report.findings) - 1} more)" if len(report.findings) > 1 else ""
        lines.append(f"{row.nodeid}: {bits(report.lost_bits)}; {report.findings[0].title()}{more}")
    return ["", "findings, worst first:", *(f"  {line}" for line in lines)] if lines else []


def cell(row: Row | None) -> Text:
    """What stands in the matrix for one test in one lane."""
    from rich.text import Text

    if row is None:
        return Text("")
    return Text(word(row), style=STYLES[row.verdict])


def word(row: Row) -> str:
    """The same as plain text."""
    figure = "" if row.figure is None else f"{row.figure:.1f}"
    told = (figure if row.verdict == "pass" and figure else f"{row.verdict} {figure}".strip()) or "?"
    return told if row.left is None else f"{told} ({row.left})"


def _table(cells: dict[tuple[str, str], Row], cases: Sequence[str], lanes: Sequence[str], rows: Sequence[Row]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    plain = "utf" not in (sys.stdout.encoding or "").lower()  # a rule of box characters would be escaped there
    table = Table(box=None if plain else SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(Text("test"), overflow="fold")
    for lane in lanes:
        how = sorted({row.status for row in rows if row.lane == lane} - {"", "native", "unsupported"})
        became = sorted({_became(row) for row in rows if row.lane == lane} - {""})
        table.add_column(Text("\n".join([lane, *became, *how])), justify="right", no_wrap=True)
    said = ""
    for case in cases:
        *file, name = _lines(case)
        if file and file[0] != said:
            said = file[0]
            table.add_row(Text(said, style="bold"))
        table.add_row(Text(name), *(cell(cells.get((case, lane))) for lane in lanes))
    return table


def _became(row: Row) -> str:
    return f"as {row.runs}" if row.runs else ""


def _lines(case: str) -> list[str]:
    """The file, which is written once above its tests, and the test's name."""
    file, inside, name = case.partition("::")
    return [file, f"  {name}"] if inside else [case]


def _fitting(columns: Mapping[str, int], room: int) -> Iterator[list[str]]:
    """Split lanes into groups that fit into ``room`` columns; a lane that never fits stands alone."""
    group: list[str] = []
    for lane in columns:
        if group and sum(columns[each] + GAP for each in [*group, lane]) > room:
            yield group
            group = []
        group.append(lane)
    yield group


def lanes_of(rows: Iterable[Row]) -> list[str]:
    """Lanes in the order of the modes' table, the default accelerator's before others."""
    order = {mode: place for place, mode in enumerate(MODES)}
    lanes = {row.lane: (row.lane.partition("@")[2], order.get(row.mode, len(order))) for row in rows}
    return sorted(lanes, key=lanes.__getitem__)


def _finite(value: float) -> float:
    return 1e9 if math.isinf(value) or math.isnan(value) else value


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
