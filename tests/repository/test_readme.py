"""What the README shows happens."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Return the contents of the README's fenced blocks in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


TESTS = [block for block in blocks("python") if "def test_" in block]
SCRIPTS = [block for block in blocks("python") if "def test_" not in block]


def said(text: str) -> list[str]:
    """Return the lines of a terminal's output, blanks and every figure levelled: digits may differ between machines."""
    levelled = (re.sub(r"[-+]?\d[\d.,]*(e[-+]?\d+)?", "#", line) for line in text.splitlines())
    return [" ".join(re.sub(r"[-=─━_]{3,}", "~", line).split()) for line in levelled if line.strip()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_runs(script: str, tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(script, encoding="utf-8")
    done = subprocess.run([sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_failing_example_says_what_the_readme_shows(pytester: pytest.Pytester) -> None:
    (test,) = TESTS
    pytester.makepyfile(test_block=test)
    result = pytester.runpytest_subprocess("--precision-matrix", "-p", "no:cacheprovider")
    result.assert_outcomes(failed=1, passed=2)
    (shown,) = blocks("text")
    actual = said(result.stdout.str())
    missing = [line for line in said(shown) if line != "…" and line not in actual]
    assert not missing, result.stdout.str()


def test_every_option_of_pytest_that_it_names_exists() -> None:
    done = subprocess.run([sys.executable, "-m", "pytest", "--help"], capture_output=True, text=True, check=True)
    options = set(re.findall(r"--precision-[a-z]+", README))
    assert options
    assert {option for option in options if option not in done.stdout} == set()


def test_every_file_that_it_links_to_exists() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []
