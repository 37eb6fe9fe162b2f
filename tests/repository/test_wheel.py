"""The wheel holds what it should and nothing else."""

from __future__ import annotations

import configparser
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    pytest.importorskip("hatchling", reason="building the wheel needs hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_it_has_every_module_of_both_packages(wheel: zipfile.ZipFile) -> None:
    sources = {
        path.relative_to(base).as_posix()
        for base, package in ((ROOT, "pytest_precision"), (ROOT / "src", "precision_runtime"))
        for path in (base / package).rglob("*.py")
    }
    packed = {name for name in wheel.namelist() if name.endswith(".py")}
    assert packed == sources
    assert {"pytest_precision/plugin.py", "precision_runtime/modes.py"} <= packed


def test_it_has_the_pages_templates(wheel: zipfile.ZipFile) -> None:
    assert "precision_runtime/templates/audit.html" in wheel.namelist()
    assert "pytest_precision/report/templates/matrix.html" in wheel.namelist()


@pytest.mark.parametrize("package", ["pytest_precision", "precision_runtime"])
def test_both_packages_say_that_they_are_typed(wheel: zipfile.ZipFile, package: str) -> None:
    assert f"{package}/py.typed" in wheel.namelist()


def test_it_holds_nothing_but_the_two_packages_and_its_metadata(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    (metadata,) = tops - {"pytest_precision", "precision_runtime"}
    assert metadata.endswith(".dist-info")
    assert f"{metadata}/licenses/LICENSE" in wheel.namelist()


def test_pytest_finds_the_plugin_in_it_and_the_shell_its_command(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    found = configparser.ConfigParser()
    found.read_string(wheel.read(entry_points).decode())
    assert {section: dict(found[section]) for section in found.sections()} == {
        "console_scripts": {"precision-runtime": "precision_runtime.cli:main"},
        "pytest11": {"precision": "pytest_precision.plugin"},
    }
