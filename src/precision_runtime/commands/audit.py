"""``precision-runtime audit``: a model judged against FP64 in many modes."""

from __future__ import annotations

import argparse
import json
import math
import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from precision_runtime import page
from precision_runtime.accelerators import name_of
from precision_runtime.capability import support
from precision_runtime.environment import ignored
from precision_runtime.errors import (
    AuditError,
    ConfigurationError,
    NothingToSwapError,
    PrecisionError,
    UnsupportedError,
)
from precision_runtime.factories import Made, make
from precision_runtime.modes import Mode, expand_modes
from precision_runtime.record import bits

if TYPE_CHECKING:
    from precision_runtime.auditing import References
    from precision_runtime.record import Report

SUMMARY = "judge a model in many modes against FP64"
DESCRIPTION = """\
Calls a factory, which returns a model, (model, args) or (model, args, kwargs), runs what it made in each mode and
in FP64, and says which modes hold, how many bits the others lose beyond what they must, and which module is to
blame. There is no tolerance to choose.

The exit status is 0 where every mode that could be judged holds, 1 where one fails, and 2 where nothing could be
judged or the question was wrong. A mode that this machine cannot run, or that has nothing to swap in the model, is
skipped, with the reason."""
EXAMPLES = """\
  precision-runtime audit package.module:make_block                       all modes
  precision-runtime audit models.py:Net --input 4x64 --modes half          two words instead of a factory
  precision-runtime audit models.py:GPT --input 'ids=2x16:int64<1000'      a keyword, whole numbers below 1000
  precision-runtime audit models.py:Net --input 4x64 --modes 16-true --repair
                                                                          which modules to keep in FP32
  precision-runtime audit package.module:make_block --html report.html    for people
  precision-runtime audit package.module:make_block --json                for machines"""

PASS, FAIL, SKIP, ERROR = "pass", "fail", "skip", "error"


@dataclass(frozen=True)
class Row:
    """The answer for one mode. ``why``: the first finding, or why there is no report."""

    mode: str
    status: str
    verdict: str
    why: str = ""
    report: Report | None = None

    @property
    def lost(self) -> str:
        """Lost bits, as a person reads them."""
        return "" if self.report is None else bits(self.report.lost_bits)

    @property
    def text(self) -> str:
        """The whole report, where it has more to say than the row."""
        report = self.report
        return str(report) if report is not None and (not report.ok or report.remarks or report.layers) else ""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("factory", metavar="FACTORY", help="package.module:factory or file.py:factory")
    parser.add_argument(
        "--modes", nargs="+", metavar="MODE", default=["all"], help="modes, groups, !name (default: all)"
    )
    parser.add_argument("--accelerator", metavar="NAME", default="cpu", help="where to run (default: cpu)")
    parser.add_argument(
        "--input", metavar="INPUT", action="append", default=[],
        help="an input, where the factory makes none: [NAME=]SHAPE[:DTYPE][<HIGH], such as 4x64; may be given again",
    )  # fmt: skip
    parser.add_argument(
        "--island", metavar="NAME", action="append", default=[], help="a part to keep in FP32, by name or glob"
    )
    parser.add_argument("--budget", metavar="BITS", type=float, default=2.0, help="lost bits allowed (default: 2)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of values and inputs (default: 0)")
    parser.add_argument("--no-gradients", action="store_true", help="judge the forward pass alone")
    parser.add_argument(
        "--repair", action="store_true", help="look for the smallest set of modules whose FP32 makes a mode hold"
    )
    parser.add_argument("--html", metavar="FILE", type=Path, help="write a page with every report")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table; inf and nan are strings")


def run(options: argparse.Namespace) -> int:
    """Judge and print; see ``DESCRIPTION`` for the exit status."""
    modes = expand_modes(options.modes, "--modes")
    if options.html is not None:
        page.check()
        if not options.html.resolve().parent.is_dir():
            raise ConfigurationError(f"--html {options.html}: there is no folder {options.html.resolve().parent}")
    accelerator = name_of(options.accelerator, "--accelerator")
    made = make(options.factory, options.input, options.seed)
    if not (made.args or made.kwargs) and not _takes_nothing(made.function):
        raise ConfigurationError(f"{options.factory} makes no inputs for the model: give --input, as in --input 4x64")
    try:
        rows = _rows(modes, accelerator, made, options)
    except PrecisionError:
        raise
    except Exception as error:  # a mode's failure would be a finding: this code does not run in float32
        traceback.print_exc()
        raise AuditError(f"{options.factory} does not run in float32: {type(error).__name__}: {error}") from error
    if options.html is not None:
        options.html.write_text(_page(rows, accelerator, made, options), encoding="utf-8")
    if options.json:
        sys.stdout.write(json.dumps(_document(rows, accelerator, made, options), indent=2, allow_nan=False) + "\n")
    else:
        _print(rows)
    verdicts = {row.verdict for row in rows}
    if FAIL in verdicts:
        return 1
    return 0 if PASS in verdicts and ERROR not in verdicts else 2


def _rows(modes: Sequence[Mode], accelerator: str, made: Made, options: argparse.Namespace) -> list[Row]:
    """Judge in every mode, with a progress bar where a person looks on."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from precision_runtime.auditing import References

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rows: list[Row] = []
    references = References(1 if options.repair or len(modes) > 1 else 0)  # kept for those who come back to it
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(modes))
        for mode in modes:
            progress.update(task, description=mode.name)
            rows.append(_row(mode, accelerator, made, options, references))
            progress.advance(task)
    return rows


def _row(mode: Mode, accelerator: str, made: Made, options: argparse.Namespace, references: References) -> Row:
    from precision_runtime.auditing import audit

    lane = support(mode, accelerator)
    if not lane.ok:
        return Row(mode.name, lane.status, SKIP, lane.reason)
    try:
        with ignored():
            report = audit(
                made.function, *made.args, mode=mode, accelerator=accelerator, kwargs=made.kwargs,
                gradients=not options.no_gradients, budget=options.budget, seed=options.seed, references=references,
                islands=tuple(options.island), repair=options.repair,
            )  # fmt: skip
    except (NothingToSwapError, UnsupportedError) as reason:
        return Row(mode.name, lane.status, SKIP, str(reason))
    except AuditError as error:
        return Row(mode.name, lane.status, ERROR, str(error))
    if report.ok:
        return Row(mode.name, report.status, PASS, report=report)
    return Row(mode.name, report.status, FAIL, report.findings[0].title(), report)


def _takes_nothing(function: Any) -> bool:
    """Whether it can be called without inputs, as a function over a model can."""
    import inspect

    try:
        inspect.signature(getattr(function, "forward", function)).bind()
    except TypeError:
        return False
    return True


def _subject(made: Made, rows: Iterable[Row], options: argparse.Namespace) -> str:
    return next((row.report.subject for row in rows if row.report is not None), options.factory)


def _document(rows: list[Row], accelerator: str, made: Made, options: argparse.Namespace) -> dict[str, Any]:
    import torch

    return {
        "subject": _subject(made, rows, options),
        "accelerator": accelerator,
        "torch": torch.__version__,
        "rows": [
            {
                "mode": row.mode,
                "status": row.status,
                "verdict": row.verdict,
                "why": row.why,
                "report": None if row.report is None else _plain(row.report.to_dict()),
            }
            for row in rows
        ],
    }


def _plain(value: Any) -> Any:
    """``value`` with inf and nan, for which JSON has no numbers, as strings that ``float`` reads."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _page(rows: list[Row], accelerator: str, made: Made, options: argparse.Namespace) -> str:
    import torch

    judged = [row for row in rows if row.report is not None]
    return page.render(
        "audit.html", subject=_subject(made, rows, options), accelerator=accelerator, torch=torch.__version__,
        seed=options.seed, budget=options.budget, rows=rows, judged=len(judged),
        passed=sum(row.verdict == PASS for row in judged),
    )  # fmt: skip


_STYLES = {PASS: "green", FAIL: "bold red", SKIP: "dim", ERROR: "bold red"}


def _print(rows: list[Row]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("mode", no_wrap=True)
    table.add_column("runs")
    table.add_column("verdict", no_wrap=True)
    table.add_column("lost", no_wrap=True, justify="right")
    table.add_column("to blame, or why not judged", overflow="fold")
    for row in rows:
        style = _STYLES[row.verdict]
        table.add_row(row.mode, row.status, Text(row.verdict, style=style), row.lost, Text(row.why.partition("\n")[0]))
    console = Console(highlight=False)
    console.print(table)
    for row in rows:
        if row.verdict == FAIL:
            console.print(f"\n{row.report}", markup=False, soft_wrap=True)
