#!/usr/bin/env python3
"""Set up a fresh clone and run its main job or its tests. Needs nothing but Python 3.10 or newer.

    python3 tasks.py matrix [pytest options]   judge twelve real architectures in every precision, on this machine
    python3 tasks.py test [pytest options]     run the test suite
    python3 tasks.py lint                      ruff and mypy
    python3 tasks.py setup                     only make the environment

The environment lives in ``.venv`` and is made anew whenever ``pyproject.toml``, ``constraints.txt`` or Python changes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
HOME = ROOT / ".venv"
BIN = HOME / ("Scripts" if os.name == "nt" else "bin")
STAMP = HOME / "made-from"

MATRIX = ("pytest", "--precision-matrix", "examples/real_models", "-n", "auto")
TEST = ("pytest", "-n", "auto")
LINT = (("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",))


def main(arguments: list[str]) -> int:
    """Run the task named first; what follows goes to its command."""
    task, options = (arguments[0], arguments[1:]) if arguments else ("", [])
    commands = {"matrix": (MATRIX,), "test": (TEST,), "lint": LINT, "setup": ()}.get(task)
    if commands is None:
        print(__doc__)
        return 0 if task in {"-h", "--help"} else 2
    set_up()
    # Every command runs, so that one look shows all there is to mend.
    return max([run(*command, *options) for command in commands], default=0)


def set_up() -> None:
    """Make the environment, unless the one there was made from the same files by the same Python."""
    if STAMP.exists() and STAMP.read_text() == fingerprint():
        return
    print(f"Setting up {HOME}: some minutes the first time.", flush=True)
    if HOME.exists():
        shutil.rmtree(HOME)
    try:
        venv.create(HOME, with_pip=True, symlinks=os.name != "nt")
    except subprocess.CalledProcessError:
        sys.exit(f"{sys.executable} cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv")
    install = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint", "constraints.txt")
    # torch goes first and alone: a resolver that meets it among others may fetch several builds to compare them.
    for what in (("torch",), ("--editable", ".[dev]")):
        if run("python", *install, *what):
            sys.exit("The installation failed; the reason stands above.")
    STAMP.write_text(fingerprint())


def fingerprint() -> str:
    """Name everything that the environment is made from."""
    parts = [sys.version.encode(), str(ROOT).encode()]
    parts += [(ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def run(program: str, *arguments: str) -> int:
    """Run a program of the environment in the repository's root and return its exit status."""
    print("$", program, *arguments, flush=True)
    path = os.pathsep.join([str(BIN), os.environ.get("PATH", os.defpath)])
    found = shutil.which(program, path=path) or program
    # One process for each core, so one thread in each; what the user has set counts more.
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PATH": path}
    return subprocess.run([found, *arguments], cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
