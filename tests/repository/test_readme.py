"""What the README and the pages in ``docs`` show happens."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}


def blocks(page: str, language: str) -> list[str]:
    """Return the contents of a page's fenced blocks in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXTS[page], flags=re.MULTILINE | re.DOTALL)


SUITES = [(page, block) for page in TEXTS for block in blocks(page, "python") if "def test_" in block]
# The blocks of a page are one story, and run one after the other; but for those that have a test of their own.
SCRIPTS = {
    page: "\n".join(block for block in blocks(page, "python") if "def test_" not in block)
    for page in TEXTS
    if page != "docs/found.md" and len([suite for suite, _ in SUITES if suite == page]) < len(blocks(page, "python"))
}


def said(text: str) -> list[str]:
    """Return the lines of a terminal's output, blanks and every figure levelled: digits may differ between machines."""
    levelled = (re.sub(r"[-+]?\d[\d.,]*(e[-+]?\d+)?", "#", line) for line in text.splitlines())
    return [" ".join(re.sub(r"[-=─━_]{3,}", "~", line).split()) for line in levelled if line.strip()]


@pytest.mark.parametrize("page", SCRIPTS)
def test_the_scripts_of_a_page_run(page: str, tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(SCRIPTS[page], encoding="utf-8")
    done = subprocess.run([sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("page", "suite"), [(page, suite) for page, suite in SUITES if page != "README.md"])
def test_the_tests_of_a_page_pass(page: str, suite: str, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_page=suite)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-W", "error")
    assert result.ret == 0, result.stdout.str()
    assert result.parseoutcomes().keys() == {"passed"}


def test_the_failing_example_says_what_the_readme_shows(pytester: pytest.Pytester) -> None:
    ((_, test),) = [suite for suite in SUITES if suite[0] == "README.md"]
    pytester.makepyfile(test_block=test)
    result = pytester.runpytest_subprocess("--precision-matrix", "-p", "no:cacheprovider")
    result.assert_outcomes(failed=1, passed=2)
    (shown,) = blocks("README.md", "text")
    actual = said(result.stdout.str())
    missing = [line for line in said(shown) if line != "…" and line not in actual]
    assert not missing, result.stdout.str()


def test_every_option_of_pytest_that_is_named_exists() -> None:
    done = subprocess.run([sys.executable, "-m", "pytest", "--help"], capture_output=True, text=True, check=True)
    options = {option for text in TEXTS.values() for option in re.findall(r"--precision-[a-z-]+", text)}
    assert options
    assert {option for option in options if option not in done.stdout} == set()
    declared = set(re.findall(r"^  (--precision-[a-z-]+)", done.stdout, flags=re.MULTILINE))
    assert declared <= set(re.findall(r"--precision-[a-z-]+", TEXTS["docs/plugin.md"]))


@pytest.mark.parametrize("page", TEXTS)
def test_every_file_that_is_linked_to_exists(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", TEXTS[page])
    folder = (ROOT / page).parent
    assert [link for link in links if "://" not in link and not (folder / link).exists()] == []


def test_every_page_can_be_reached() -> None:
    linked = set(re.findall(r"\]\((docs/[^)#]+)\)", TEXTS["README.md"]))
    assert linked >= {page for page in TEXTS if page.startswith("docs/")}


def test_every_command_that_is_named_exists() -> None:
    from precision_runtime import commands

    named = {name for text in TEXTS.values() for name in re.findall(r"^\$ precision-runtime (\w+)", text, flags=re.M)}
    assert named == {module.name for module in pkgutil.iter_modules(commands.__path__)}


@pytest.mark.parametrize("page", ["docs/modes.md"])
def test_every_mode_has_its_line(page: str) -> None:
    from precision_runtime import MODES

    # "`apex-O0` to `apex-O3`" is how a range is told.
    assert {mode for mode in MODES if f"`{mode}`" not in TEXTS[page]} <= {"apex-O1", "apex-O2"}
