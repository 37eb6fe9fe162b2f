"""A suite that does not use the plugin does not notice that it is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

import pytest_precision

WATCH = """
import sys

def pytest_unconfigure(config):
    watched = {"torch", "numpy", "rich", "precision_runtime"}
    print("loaded:", sorted(watched & set(sys.modules)) or "none")
"""


def loaded(pytester, source: str, *arguments: str, ini: str = "") -> str:
    pytester.makeconftest(WATCH)
    pytester.makeini(f"[pytest]\naddopts = --strict-markers -W error -p no:cacheprovider\n{ini}")
    pytester.makepyfile(test_suite="import pytest\n" + source)
    result = pytester.runpytest_subprocess(*arguments)
    assert result.ret in (0, 1), result.stdout.str()
    (line,) = [line for line in result.outlines if line.startswith("loaded:")]
    return line.removeprefix("loaded: ")


def test_a_run_without_precision_imports_nothing(pytester):
    assert loaded(pytester, "def test_it(): pass\ndef test_fails(): assert 0") == "none"


def test_a_run_with_precision_imports_torch_so_the_test_above_can_fail(pytester):
    assert "torch" in loaded(pytester, "def test_it(precision_ctx): pass")


SPREAD = "@pytest.mark.precision('half', accelerators=['cpu', 'cuda'])\ndef test_it(precision_ctx): pass"


def test_collect_only_imports_no_torch(pytester):
    arguments = ("--precision-matrix", "--precision-lanes=16@cpu,64", "--precision-require=16")
    assert loaded(pytester, SPREAD, "--collect-only", *arguments) == "['precision_runtime']"


def test_the_controller_of_workers_imports_no_torch(pytester):
    pytest.importorskip("xdist")
    assert "torch" not in loaded(pytester, "def test_it(precision_ctx): pass", "-n1", "-s")


def test_switched_off_a_plain_suite_runs(pytester):
    assert loaded(pytester, "def test_it(): pass", "-p", "no:precision") == "none"


def test_switched_off_its_names_are_unknown(run):
    result = run("def test_it(precision_ctx): pass", "-p", "no:precision")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*fixture 'precision_ctx' not found*"])
    assert run("", "-p", "no:precision", "--precision-matrix").ret == pytest.ExitCode.USAGE_ERROR


def test_nothing_is_printed_without_precision_tests(run):
    run("def test_it(): pass").stdout.no_fnmatch_line("*precision *")


def test_this_copy_is_the_one_that_is_tested():
    assert Path(pytest_precision.__file__).parents[1] == Path(__file__).parents[2]
