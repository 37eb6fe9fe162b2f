"""The public names are there, and importing the packages costs nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import precision_runtime
import pytest_precision

ROOT = Path(__file__).parents[2]


def imports_torch(statement: str) -> bool:
    """Whether a fresh interpreter has torch loaded after this statement."""
    code = f"{statement}\nimport sys\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {"True": True, "False": False}[done.stdout.strip()]


@pytest.mark.parametrize(
    "module",
    [
        "precision_runtime",
        "precision_runtime.automatic",
        "precision_runtime.cli",
        "precision_runtime.errors",
        "precision_runtime.formats",
        "precision_runtime.modes",
        "precision_runtime.record",
        "precision_runtime.survey",
        "pytest_precision.plugin",
    ],
)
def test_importing_it_imports_no_torch(module: str) -> None:
    assert not imports_torch(f"import {module}")


def test_the_check_for_torch_can_fail() -> None:
    assert imports_torch("from precision_runtime import audit")


@pytest.mark.parametrize("name", precision_runtime.__all__)
def test_a_public_name_loads_and_is_what_its_module_calls_so(name: str) -> None:
    value = getattr(precision_runtime, name)
    assert value is getattr(precision_runtime, name)
    assert getattr(value, "__name__", name) == name


def test_a_public_name_is_not_hidden_by_a_module() -> None:
    code = (
        "import precision_runtime, importlib, pkgutil\n"
        "for module in pkgutil.walk_packages(precision_runtime.__path__, 'precision_runtime.'):\n"
        "    importlib.import_module(module.name)\n"
        "print([n for n in precision_runtime.__all__ if type(getattr(precision_runtime, n)).__name__ == 'module'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'audti'; it has .*\baudit\b"):
        precision_runtime.audti  # noqa: B018 - looking it up is the test


@pytest.mark.parametrize("package", [precision_runtime, pytest_precision])
def test_the_copy_under_test_is_this_repository_s(package: object) -> None:
    assert Path(str(getattr(package, "__file__", ""))).is_relative_to(ROOT)
