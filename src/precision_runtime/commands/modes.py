"""``precision-runtime modes``: what each mode is, what it stores, and how far it is from FP64."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import MappingProxyType

from precision_runtime.accelerators import name_of
from precision_runtime.automatic import placed
from precision_runtime.capability import support
from precision_runtime.errors import ConfigurationError
from precision_runtime.modes import MODES, Mode, expand_modes

SUMMARY = "show what each mode stores and computes in, and its error, measured here"
DESCRIPTION = """\
A table of the modes, measured on this machine:

  weights             the dtype or format that parameters are kept in
  compute             the dtype of the bulk of the arithmetic, and what else a mode rounds
  bits per parameter  as stored, masters too, of an nn.Linear(1024, 1024)
  error               of an nn.Linear(256, 128) against FP64: relative, L2
  here                native, emulated or unsupported, as `precision-runtime support` says it"""
EXAMPLES = """\
  precision-runtime modes                          all modes on the default accelerator
  precision-runtime modes quantized fp8            some of them
  precision-runtime modes --markdown > modes.md    for a document
  precision-runtime modes --write README.md        in its place between the two marks of the document"""

COLUMNS = ("mode", "weights", "compute", "bits per parameter", "error", "here")
BEGIN, END = "<!-- precision-runtime modes: begin -->", "<!-- precision-runtime modes: end -->"

_PRODUCTS = MappingProxyType({"tf32": "TF32 products", "float8_e4m3fn": "FP8 products"})


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("modes", nargs="*", metavar="MODE", help="modes, groups, !name (default: all)")
    parser.add_argument("--accelerator", metavar="NAME", default="auto", help="where to measure (default: auto)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")
    form.add_argument("--write", metavar="FILE", type=Path, help=f"put the Markdown table between {BEGIN} and {END}")


def run(options: argparse.Namespace) -> int:
    """Measure and print; 0."""
    accelerator = name_of(options.accelerator, "--accelerator")
    if options.write is not None:
        _parts(options.write)  # a file without the marks is to be known before anything is measured
    rows = [(*described(mode, accelerator), *measured(mode, accelerator)) for mode in _modes(options.modes)]
    table = [(name, weights, compute, bits, error, here) for name, weights, compute, here, bits, error in rows]
    if options.write is not None:
        before, after = _parts(options.write)
        options.write.write_text(f"{before}{BEGIN}\n{markdown(table)}{END}{after}", encoding="utf-8")
    elif options.json:
        sys.stdout.write(json.dumps([dict(zip(COLUMNS, row, strict=True)) for row in table], indent=2) + "\n")
    elif options.markdown:
        sys.stdout.write(markdown(table))
    else:
        _print(table)
    return 0


def described(mode: Mode, accelerator: str) -> tuple[str, str, str, str]:
    """Name, weights, compute and status: the columns without figures."""
    there = placed(mode, accelerator).mode
    weights = there.weights or there.params
    compute = [f"{there.compute} (autocast)" if there.autocast else there.compute, _PRODUCTS.get(there.products, "")]
    return (
        mode.name,
        f"{weights}, float32 masters" if there.masters else weights,
        ", ".join(filter(None, compute)),
        support(mode, accelerator).status,
    )


def measured(mode: Mode, accelerator: str) -> tuple[str, str]:
    """Bits per parameter and error, or dashes where the mode does not run."""
    if not support(mode, accelerator).ok:
        return "-", "-"
    from precision_runtime.measuring import measure

    figures = measure(mode, accelerator)
    return f"{figures.bits:.4g}", f"{figures.error:.1e}"


def markdown(table: Iterable[Sequence[str]]) -> str:
    """The table in Markdown, with a line break at the end."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *([f"`{row[0]}`", *row[1:]] for row in table)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _modes(names: Sequence[str]) -> list[Mode]:
    return expand_modes(names or MODES, "MODE")


def _parts(path: Path) -> tuple[str, str]:
    """What stands before and after the marks of a document."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigurationError(
            f"{path} has no line {BEGIN!r} with a line {END!r} after it: put both where the table goes"
        )
    return before, after


def _print(table: Iterable[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in COLUMNS:
        shown.add_column(column, no_wrap=column == "mode", overflow="fold")
    for row in table:
        shown.add_row(*row)
    Console(highlight=False).print(shown)
