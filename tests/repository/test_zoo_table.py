"""The page about the zoo: a finding has a cause that claims it, goes with one that has, or is unread."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("zoo_table", ROOT / "benchmarks" / "zoo_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "zoo_table", module)
    spec.loader.exec_module(module)
    return module


def row(mode: str, *findings: list[Any]) -> dict[str, Any]:
    return {"name": "net", "mode": mode, "findings": list(findings), "remarks": [], "calls": 3, "crash": None}


def finding(module: str, kind: str) -> list[Any]:
    return [module, kind, "backward", 3.0, None, "what happened"]


def test_findings_are_claimed_go_along_or_are_unread(table: Any) -> None:
    cause = table.Cause("Why", "true", "Because.", ["net 16-*"], kinds=["underflow"])
    whole, inner, other = finding("", "instability"), finding("a.b", "underflow"), finding("a.bc", "range")
    owner, left = table.sort_out(row("16-true", inner, finding("a", "range"), other, whole), [cause])
    assert sorted(owner) == [0, 1, 3]  # itself, the module around it, the whole
    assert left == [2]  # a.bc is not around a.b
    assert table.sort_out(row("bf16-true", inner), [cause]) == ({}, [0])


def test_a_cause_of_one_sweep_claims_nothing_in_another(table: Any) -> None:
    cause = table.Cause("Why", "true", "Because.", ["net *"], sweeps=["*-plain"])
    flagged = row("16-true", finding("a", "range"))
    assert table.sort_out(flagged | {"sweep": "short-plain"}, [cause])[1] == []
    assert table.sort_out(flagged | {"sweep": "short-trained"}, [cause])[1] == [0]


def test_the_page_is_written_between_its_marks_and_unread_findings_fail(
    table: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tomllib")
    sweep, causes, page = tmp_path / "sweep.json", tmp_path / "causes.toml", tmp_path / "page.md"
    sweep.write_text(json.dumps([row("16-true", finding("a", "underflow")), row("bf16-true")]))
    causes.write_text('[[cause]]\ntitle = "Why"\nverdict = "true"\ntext = "Because."\nrows = ["net 16-true"]\n')
    page.write_text(f"before {table.BEGIN} old {table.END} after")
    command = ["zoo_table.py", "--sweep", f"short={sweep}", "--causes", str(causes), "--document", str(page)]
    monkeypatch.setattr(sys, "argv", command)
    assert table.main() == 0
    text = page.read_text()
    assert text.startswith("before ")
    assert text.endswith(" after")
    assert " old " not in text
    assert "| **Why.** Because. | true | net 16-true |" in text
    assert "| true | 1 | 1 | 100.0% |" in text
    causes.write_text(causes.read_text().replace("16-true", "64-true"))
    assert table.main() == 1
    assert "Unread: net 16-true (underflow backward in `a`)." in page.read_text()
    assert "1 findings unread" in capsys.readouterr().err


def test_causes_of_the_page_have_verdicts(table: Any) -> None:
    pytest.importorskip("tomllib")
    causes = table.read_causes(ROOT / "docs" / "zoo_causes.toml")
    titles = [cause.title for cause in causes]
    assert len(titles) == len(set(titles))
    text = (ROOT / "docs" / "zoo.md").read_text(encoding="utf-8")
    shown = [title for title in titles if f"| **{title}.**" in text]
    assert shown, "the page and its causes have drifted apart"
