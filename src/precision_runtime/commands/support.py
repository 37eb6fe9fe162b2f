"""``precision-runtime support``: which modes this machine runs, and how."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from precision_runtime.accelerators import ACCELERATORS, machine, name_of
from precision_runtime.modes import MODES, expand_modes
from precision_runtime.survey import Entry, present, survey

if TYPE_CHECKING:
    from rich.text import Text

SUMMARY = "show which modes run on this machine's accelerators, and how"
DESCRIPTION = """\
Every mode on every accelerator of this machine, found by trying it:

  native       the hardware computes in it
  emulated     it runs here with exact arithmetic, not with the hardware's speed
  unsupported  it does not run, with the reason and what to do

In brackets, where it differs: what PyTorch Lightning's documents promise for such an accelerator.
The exit status is 1 where a mode that was named does not run on an accelerator, and 2 for names that do not exist."""
EXAMPLES = """\
  precision-runtime support                              this machine's table
  precision-runtime support 16-mixed --accelerator cpu   one lane; the exit status is the answer
  precision-runtime support half '!bf16-true' --json     for machines"""

STYLES = {"native": "green", "emulated": "yellow", "simulated": "yellow", "unsupported": "dim"}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "modes", nargs="*", metavar="MODE", help=f"modes, groups, !name (default: all): {', '.join(MODES)}, auto"
    )
    parser.add_argument(
        "--accelerator",
        metavar="NAME",
        action="append",
        help=f"only this one; may be given again: auto, {', '.join(ACCELERATORS)}",
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON instead of a table, absent accelerators as well"
    )


def run(options: argparse.Namespace) -> int:
    """Print the table; see ``DESCRIPTION`` for the exit status."""
    modes = expand_modes(options.modes or MODES, "MODE")
    named = options.accelerator is not None
    names = list(dict.fromkeys(name_of(n, "--accelerator") for n in options.accelerator)) if named else present()
    entries = survey(modes, list(ACCELERATORS) if options.json and not named else names)
    if options.json:
        sys.stdout.write(json.dumps(_document(entries), indent=2) + "\n")
    else:
        _print(entries, names)
    return int(bool(options.modes) and not all(e.support.ok for e in entries if e.support.accelerator in names))


def _document(entries: Iterable[Entry]) -> dict[str, object]:
    import torch

    absent = {name: machine().missing(name) for name in ACCELERATORS}
    return {
        "torch": torch.__version__,
        "default": machine().auto(),
        "absent": {name: reason for name, reason in absent.items() if reason is not None},
        "entries": [entry.to_dict() for entry in entries],
    }


def _print(entries: list[Entry], names: list[str]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("mode", no_wrap=True)
    for name in names:
        table.add_column(name, overflow="fold")
    cells = {(e.support.mode, e.support.accelerator): e for e in entries}
    for mode in dict.fromkeys(e.support.mode for e in entries):
        table.add_row(mode, *(_cell(cells[mode, name]) for name in names))
    console.print(table)
    for reason, lanes in _reasons(entries, len(names) > 1).items():
        console.print(f"\n{', '.join(lanes)}:", style="bold", soft_wrap=True)
        console.print(f"  {reason}", markup=False, soft_wrap=True)
    absent = [name for name in ACCELERATORS if name not in names and machine().missing(name) is not None]
    if absent:
        console.print("")
    for name in absent:
        console.print(f"{name}: {machine().missing(name)}", markup=False, soft_wrap=True)


def _cell(entry: Entry) -> Text:
    from rich.text import Text

    here = entry.support
    said = " ".join(filter(None, (here.status, f"as {here.runs}" if here.runs else "")))
    text = Text(said, style=STYLES[here.status])
    if _surprising(entry):
        text.append(f" (docs: {entry.promised})", style="default")
    return text


def _surprising(entry: Entry) -> bool:
    """Whether the documents promised something else."""
    if entry.promised == "no":
        return entry.support.ok
    return bool(entry.promised) and entry.support.status != "native"


def _reasons(entries: Iterable[Entry], several: bool) -> dict[str, list[str]]:
    """The lanes for each reason; those that are native under their own name need none."""
    found: dict[str, list[str]] = {}
    for entry in entries:
        here = entry.support
        if here.status != "native" or here.runs:
            lane = f"{here.mode} on {here.accelerator}" if several else here.mode
            found.setdefault(here.reason, []).append(lane)
    return found
