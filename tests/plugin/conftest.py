"""Suites are run in this process, which already has torch, and by ``subprocess=True`` in one of their own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

Run = Callable[..., pytest.RunResult]

HEAD = """
import pytest
import torch
from torch import nn
"""


@pytest.fixture(autouse=True)
def libraries_stay_imported(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """After an inner run pytester forgets all that was imported in it, but torch cannot be imported twice.

    So only the suite's own modules are forgotten.
    """
    suites = tmp_path_factory.getbasetemp()

    class Snapshot:
        def __init__(self, preserve: object = None) -> None:
            self.before = set(sys.modules)

        def restore(self) -> None:
            for name in set(sys.modules) - self.before:
                file = getattr(sys.modules[name], "__file__", None)
                if file and suites in Path(file).parents:
                    del sys.modules[name]

    monkeypatch.setattr("_pytest.pytester.SysModulesSnapshot", Snapshot)


@pytest.fixture
def run(pytester: pytest.Pytester) -> Run:
    """Write a suite (HEAD and the given source) and run it with warnings as errors and strict markers."""

    def run(source: str, *arguments: str, ini: str = "", subprocess: bool = False) -> pytest.RunResult:
        pytester.makeini(f"[pytest]\naddopts = --strict-markers -W error -p no:cacheprovider\n{ini}")
        pytester.makepyfile(test_suite=HEAD + source)
        return (pytester.runpytest_subprocess if subprocess else pytester.runpytest_inprocess)(*arguments)

    return run


@pytest.fixture
def ids(run: Run) -> Callable[..., list[str]]:
    """The ids that a suite is collected as."""

    def ids(source: str, *arguments: str, ini: str = "") -> list[str]:
        result = run(source, "--collect-only", "-q", *arguments, ini=ini)
        assert result.ret in (0, 5), result.stdout.str()
        return [line.partition("::")[2] for line in result.outlines if "::" in line]

    return ids


@pytest.fixture(autouse=True)
def torch_is_left_as_it_was() -> Iterator[None]:
    """No inner suite may leak its mode into this process."""
    before = (torch.get_default_dtype(), torch.is_autocast_enabled("cpu"), torch.is_grad_enabled())
    yield
    assert (torch.get_default_dtype(), torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()) == before
