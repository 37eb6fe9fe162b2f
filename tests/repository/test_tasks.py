"""``tasks.py`` needs only the standard library and says what it can do."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def tasks(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script with an interpreter that sees no installed packages."""
    command = [sys.executable, "-I", "-S", str(ROOT / "tasks.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_it_imports_only_the_standard_library() -> None:
    tree = ast.parse((ROOT / "tasks.py").read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), ([], 2), (["tets"], 2)])
def test_it_explains_itself_instead_of_guessing(arguments: list[str], status: int) -> None:
    done = tasks(*arguments)
    assert done.returncode == status
    assert "tasks.py matrix" in done.stdout
    assert "tasks.py test" in done.stdout


def test_continuous_integration_runs_the_command_of_the_readme() -> None:
    command = "python3 tasks.py test"
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_constraints_hold_torch_to_one_release() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert "torch==2.13.0" in lines
