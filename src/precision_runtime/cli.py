"""The command ``precision-runtime``. What it can do stands in ``commands``, one file for each subcommand."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
import traceback
from collections.abc import Sequence

from precision_runtime import commands
from precision_runtime.errors import PrecisionError

# Exit statuses: 0 all is well, 1 the answer is no (a mode that does not run here), 2 the question was wrong.
WRONG = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line ``arguments`` (default: the process's own) and return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    try:
        status: int = options.run(options)
    except PrecisionError as error:
        sys.stderr.write(f"precision-runtime {options.command}: {error}\n")
        return WRONG
    except Exception:  # of the user's code, as a rule; Python's own status for it, 1, would be an answer
        traceback.print_exc()
        return WRONG
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="precision-runtime",
        description="Run PyTorch code in any precision, and find out what this machine can do.",
        epilog="precision-runtime COMMAND --help explains a command and shows examples.",
    )
    choices = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for found in pkgutil.iter_modules(commands.__path__):
        command = importlib.import_module(f"{commands.__name__}.{found.name}")
        own = choices.add_parser(
            found.name,
            help=command.SUMMARY,
            description=command.DESCRIPTION,
            epilog=f"examples:\n{command.EXAMPLES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.arguments(own)
        own.set_defaults(run=command.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
