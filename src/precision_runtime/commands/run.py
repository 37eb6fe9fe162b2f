"""``precision-runtime run``: a script as ``python`` would run it, with the mode chosen from outside."""

from __future__ import annotations

import argparse
import builtins
import os
import pkgutil
import runpy
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, TracebackType

from precision_runtime import environment
from precision_runtime.accelerators import ACCELERATORS, name_of
from precision_runtime.errors import ConfigurationError
from precision_runtime.modes import Mode, parse_mode

SUMMARY = "run a script in a mode"
DESCRIPTION = f"""\
Runs a script as `python` would, and tells it the mode: a runtime that it makes without a mode

  runtime = PrecisionRuntime()
  model, optimizer = runtime.setup(model, optimizer)

takes the one given here, in processes that it starts as well ({environment.MODE} in the environment,
which does the same without this command). A script that names another mode ends with an error, and so
does this command where the environment has another one already.
What follows the script is the script's; exit status and signals are the script's, too."""
EXAMPLES = """\
  precision-runtime run --precision bf16-mixed train.py --steps 100
  precision-runtime run --precision 16-true --accelerator cuda:1 train.py
  precision-runtime run --precision auto -m package.training --steps 100"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.usage = f"{parser.prog} --precision MODE [--accelerator NAME] (SCRIPT | -m MODULE) ..."
    parser.add_argument("--precision", metavar="MODE", required=True, help="a mode, as `precision-runtime modes` lists")
    parser.add_argument(
        "--accelerator", metavar="NAME", default="auto", help=f"auto (default), {', '.join(ACCELERATORS)}, cuda:1, ..."
    )
    parser.add_argument(
        "-m", dest="module", nargs=argparse.REMAINDER, help="a module instead of a script, as `python -m` takes it"
    )
    parser.add_argument("script", nargs=argparse.REMAINDER, metavar="SCRIPT ...", help="the script and its arguments")


def run(options: argparse.Namespace) -> int:
    """Run the script; return 1 where it raised, as ``python`` does. What it gives to ``sys.exit`` goes its own way."""
    mode = parse_mode(options.precision, "--precision")
    if options.accelerator.strip().lower() != "auto":  # what auto means would be asked of torch, which takes seconds
        name_of(options.accelerator, "--accelerator")
    variables = environment.for_script(mode, options.accelerator)
    given = options.module if options.module is not None else options.script
    if not given:
        raise ConfigurationError("give a script to run, or -m and a module: --precision MODE train.py --steps 100")
    target = given[0]
    if options.module is None and target.startswith("-"):
        raise ConfigurationError(f"{target!r} is no script: what belongs to this command stands before the script")
    if options.module is None and not Path(target).exists():
        raise ConfigurationError(f"cannot find the script {target!r} (from {Path.cwd()})")
    before = environment.runtimes_met()
    try:
        with _as_python(given, options.module is not None, variables):
            if options.module is not None:
                runpy.run_module(target, run_name="__main__", alter_sys=True)
            else:
                _run_path(str(Path(target).absolute()))
    except SystemExit as end:
        if not end.code:
            _check(target, mode, before)
        raise
    except Exception as error:
        _show(error)
        return 1
    _check(target, mode, before)
    return 0


def _run_path(path: str) -> None:
    """Run a script, folder or archive; ``path`` is absolute, as ``__file__`` is, for scripts that change the folder."""
    if path.endswith(".pyc") or pkgutil.get_importer(path) is not None:
        runpy.run_path(path, run_name="__main__")
        return
    # runpy would do, but for sys.argv[0], which it makes the path that it runs: Python leaves it as it was written.
    loader, main = SourceFileLoader("__main__", path), ModuleType("__main__")
    vars(main).update(__file__=path, __cached__=None, __loader__=loader, __builtins__=builtins)
    before = sys.modules["__main__"]
    sys.modules["__main__"] = main
    try:
        exec(compile(loader.get_data(path), path, "exec", dont_inherit=True), vars(main))
    finally:
        sys.modules["__main__"] = before


def _check(target: str, mode: Mode, before: int) -> None:
    """Say so where nothing took the mode: the script would seem to have run in it."""
    if environment.runtimes_met() == before:
        sys.stderr.write(
            f"precision-runtime run: {target} made no PrecisionRuntime in this process, so nothing in it ran in {mode} "
            "because of --precision\n"
        )


@contextmanager
def _as_python(arguments: list[str], module: bool, variables: Mapping[str, str]) -> Iterator[None]:
    """``sys.argv``, ``sys.path`` and the environment as the script is to find them; put back afterwards."""
    argv, path, before = sys.argv, list(sys.path), {name: os.environ.get(name) for name in variables}
    sys.argv = list(arguments)
    if not getattr(sys.flags, "safe_path", False) and sys.path:
        # Until now it is the folder of this command. Python leaves it out where -P says so.
        sys.path[0] = str(Path.cwd() if module else Path(arguments[0]).resolve().parent)
    os.environ.update(variables)
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, path
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _show(error: Exception) -> None:
    """Print the traceback as ``python`` does: it begins in the script."""
    own = (__file__, runpy.__file__, "<frozen runpy>")
    shown: TracebackType | None = error.__traceback__
    while shown is not None and shown.tb_frame.f_code.co_filename in own:
        shown = shown.tb_next
    # Without a traceback it did not get as far as the script, which does not compile, or is no module.
    sys.excepthook(type(error), error.with_traceback(shown), shown)
