"""What ``docs/range.md`` says comes out, does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs/range.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(python|text)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def lines(text: str) -> list[str]:
    """Without blanks and figures, which may differ between machines."""
    levelled = (re.sub(r"[-+]?\d[\d.]*(e[-+]?\d+)?", "#", line) for line in text.splitlines())
    return [" ".join(line.split()) for line in levelled if line.strip()]


def test_every_output_that_is_shown_is_said(pytester):
    scripts = [block for kind, block in BLOCKS if kind == "python" and "def test_" not in block]
    suites = [block for kind, block in BLOCKS if kind == "python" and "def test_" in block]
    script = pytester.path / "script.py"
    script.write_text("\n".join(scripts), encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pytester.makepyfile(**{f"test_page_{number}": suite for number, suite in enumerate(suites)})
    result = pytester.runpytest_inprocess("-s", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=3)
    said = lines(done.stdout) + lines(result.stdout.str())
    shown = [lines(block) for kind, block in BLOCKS if kind == "text"]
    assert len(shown) == 4
    assert all(len(block) >= 7 for block in shown)
    # pytest's dots stand before what a test prints first.
    missing = [line for block in shown for line in block if not any(each.endswith(line) for each in said)]
    assert not missing, done.stdout + result.stdout.str()
