"""Each defect on the page of findings is still there: a reproduction that no longer shows it is good news, and told."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "found.md"
# Kernels are chosen by what the processor has.
FEATURES = {"avx512_bf16": torch.cpu._is_avx512_bf16_supported}

# The libraries' own warnings are no business of this page.
pytestmark = pytest.mark.filterwarnings("ignore")


class Found(NamedTuple):
    """One section: what it says, what it was seen with, and the reproduction."""

    title: str
    seen: str
    code: str

    def versions(self) -> dict[str, str]:
        """Return what the defect was seen with: names of distributions and their versions."""
        return dict(re.findall(r"\b(torch|transformers|bitsandbytes|[a-z_]+) (\d+\.\d+)\b", self.seen))


def sections() -> Iterator[Found]:
    """Read the page."""
    for text in PAGE.read_text(encoding="utf-8").split("\n### ")[1:]:
        title, _, rest = text.partition("\n")
        section = rest.partition("\n## ")[0]
        seen = re.search(r"^Seen with [^\n]*?\.(?= |$)", section, flags=re.MULTILINE)
        (code,) = re.findall(r"^```python\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
        yield Found(title, seen.group() if seen else "", code)


FOUND = {found.title: found for found in sections()}


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    """Undo what a reproduction, or a library that it imports, may change."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


def number(version: str) -> tuple[int, ...]:
    """Return major and minor number."""
    return tuple(int(part) for part in version.split(".")[:2])


@pytest.mark.parametrize("title", FOUND)
def test_the_defect_is_still_there(title: str) -> None:
    found = FOUND[title]
    for name in found.versions():
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    for feature, there in FEATURES.items():
        if feature in found.seen and not there():
            pytest.skip(f"this processor has no {feature}")
    here = {name: importlib.metadata.version(name) for name in found.versions()}
    older = [f"{name} {v}" for name, v in here.items() if number(v) < number(found.versions()[name])]
    newer = [f"{name} {v}" for name, v in here.items() if number(v) > number(found.versions()[name])]
    try:
        exec(found.code, {"__name__": "reproduction"})
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        if older or (newer and not isinstance(error, AssertionError)):
            pytest.skip(f"not to be shown with {', '.join(older + newer)}: {said}")
        pytest.fail(f"mended in {', '.join(newer) or 'the versions that the page names'}? Then say so there. {said}")


@pytest.mark.parametrize("title", FOUND)
def test_a_section_says_what_it_was_seen_with_and_proves_something(title: str) -> None:
    found = FOUND[title]
    assert found.versions(), "it begins with a line such as 'Seen with torch 2.13, on the CPU.'"
    assert re.search(r"^ *assert ", found.code, flags=re.MULTILINE)
    imported = set(re.findall(r"^(?:from|import) (\w+)", found.code, flags=re.MULTILINE))
    assert imported - {"types"} <= set(found.versions()), "a reproduction needs the library and nothing else"
    assert len(found.code.strip().splitlines()) <= 20, "it is short enough for a bug report"


def test_the_page_has_findings() -> None:
    """A heading or a fence of another kind would leave nothing to test."""
    assert len(FOUND) == PAGE.read_text(encoding="utf-8").count("```python")
    assert len(FOUND) >= 15
