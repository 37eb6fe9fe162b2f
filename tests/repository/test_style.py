"""The rules of ``pyproject.toml`` are kept."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: str) -> str:
    """Run a tool of this environment and return what it says when it finds something."""
    found = shutil.which(command[0], path=str(Path(sys.executable).parent)) or shutil.which(command[0])
    if found is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run([found, *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr if done.returncode else ""


@pytest.mark.parametrize("command", ["ruff check .", "ruff format --check ."])
def test_ruff_finds_nothing(command: str) -> None:
    assert run(*command.split()) == ""


@pytest.mark.slow
def test_mypy_finds_nothing() -> None:
    assert run("mypy") == ""
