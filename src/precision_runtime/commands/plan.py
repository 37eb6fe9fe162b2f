"""``precision-runtime plan``: what modes would do to a model, before anything is done."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from precision_runtime.accelerators import name_of
from precision_runtime.capability import support
from precision_runtime.environment import ignored
from precision_runtime.errors import ConfigurationError, unknown_names
from precision_runtime.factories import make
from precision_runtime.modes import Mode, expand_modes

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from precision_runtime.planning.plan import Plan

SUMMARY = "show what a mode would cast, lose, swap and keep in a model"
DESCRIPTION = """\
Calls a factory, which returns a model (or a tuple that begins with one), and lists for each mode what setting the
model up would do, without doing it: values that would become inf or 0, whole numbers beyond the exact range, tables
and float64 values at risk, layers that would be swapped or stay, with the reason, and settings of an optimizer that
the mode's dtype cannot hold.

The exit status is 0 where nothing is lost but roundings, 1 where a row is lossy or setting up would be refused, and 2
where the question was wrong or no mode could be planned."""
EXAMPLES = """\
  precision-runtime plan package.module:make_model                           all modes
  precision-runtime plan models.py:Net --modes 16-true nf4 --optimizer Adam  with an optimizer of torch.optim
  precision-runtime plan models.py:Net --modes 16-true --island '*.rope'     with a part kept in FP32
  precision-runtime plan models.py:Net --modes half --json                   for machines"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("factory", metavar="FACTORY", help="package.module:factory or file.py:factory")
    parser.add_argument(
        "--modes", nargs="+", metavar="MODE", default=["all"], help="modes, groups, !name (default: all)"
    )
    parser.add_argument("--accelerator", metavar="NAME", default="auto", help="where (default: auto)")
    parser.add_argument("--optimizer", metavar="NAME", help="of torch.optim, such as AdamW")
    parser.add_argument("--lr", metavar="RATE", type=float, default=1e-3, help="its learning rate (default: 0.001)")
    parser.add_argument(
        "--island", metavar="NAME", action="append", default=[], help="a part to keep in FP32, by name or glob"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the model's first values (default: 0)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(options: argparse.Namespace) -> int:
    """Plan and print; see ``DESCRIPTION`` for the exit status."""
    modes = expand_modes(options.modes, "--modes")
    accelerator = name_of(options.accelerator, "--accelerator")
    model, optimizers = _made(options)
    found = [(mode, _plan(mode, accelerator, model, optimizers, options.island)) for mode in modes]
    plans = [plan for _, plan in found if not isinstance(plan, str)]
    if options.json:
        skipped = {mode.name: why for mode, why in found if isinstance(why, str)}
        document = {"plans": [plan.to_dict() for plan in plans], "skipped": skipped}
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    else:
        _print(found)
    if not plans:
        return 2
    return int(any(plan.lossy or plan.refusals for plan in plans))


def _made(options: argparse.Namespace) -> tuple[nn.Module, list[Optimizer]]:
    import torch

    model = make(options.factory, seed=options.seed).function
    if not isinstance(model, torch.nn.Module):
        raise ConfigurationError(f"{options.factory} is to make a torch.nn.Module, made {type(model).__name__}")
    if options.optimizer is None:
        return model, []
    kinds: dict[str, Any] = {
        name: kind
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    }
    if options.optimizer not in kinds:
        raise unknown_names("optimizer", [options.optimizer], list(kinds), "--optimizer")
    try:
        return model, [kinds[options.optimizer](model.parameters(), lr=options.lr)]
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"--optimizer {options.optimizer} --lr {options.lr:g}: {error}") from error


def _plan(
    mode: Mode, accelerator: str, model: nn.Module, optimizers: Sequence[Optimizer], islands: Sequence[str]
) -> Plan | str:
    """The plan, or why there is none."""
    from precision_runtime.runtime import PrecisionRuntime

    lane = support(mode, accelerator)
    if not lane.ok:
        return lane.reason
    with ignored():
        runtime = PrecisionRuntime(mode, accelerator, islands=tuple(islands))
    return runtime.plan(model, *optimizers)


def _print(found: Sequence[tuple[Mode, Plan | str]]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    for number, (mode, plan) in enumerate(found):
        if number:
            console.print("")
        if isinstance(plan, str):
            console.print(f"{mode} on this machine: skipped, {plan}", markup=False, soft_wrap=True)
        else:
            console.print(plan)
