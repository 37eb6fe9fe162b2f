"""The end of a run: what it owes, how it compares with the baseline, and the files that it writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pytest_precision.baseline import baseline_of, compare
from pytest_precision.report.demands import unmet
from pytest_precision.report.document import document
from pytest_precision.report.row import Row
from pytest_precision.settings import settings_of


@dataclass(frozen=True)
class Ending:
    """``owed``: each fails the session. ``notes``: lines on the baseline and on files."""

    owed: Sequence[str]
    notes: Sequence[str]


def end(config: pytest.Config, rows: Sequence[Row]) -> Ending:
    """Compare with the baseline or update it, and write the files. A file that cannot be written is owed."""
    files, owed, notes = settings_of(config).files, unmet(config, rows), list[str]()
    baseline = baseline_of(config)
    if baseline is not None and files.baseline is not None:
        notes += compare(files.baseline, baseline, rows, files.update).lines()
        if files.update:
            updated = baseline.updated(rows)
            owed += _write("baseline", files.baseline, updated.write)
    facts = document(rows, owed, notes)
    for kind, path in (("json", files.json), ("html", files.html), ("summary", files.summary)):
        if path is not None:
            failed = _write(kind, path, partial(_put, _WRITERS[kind], facts))
            owed += failed
            notes += [] if failed else [f"--precision-{kind}: {path}"]
    if files.appended is not None and (rows or owed):
        owed += _write("summary", files.appended, lambda to: _append(to, _markdown(facts)))
    return Ending(owed, notes)


def _write(kind: str, path: Path, write: Callable[[Path], object]) -> list[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    except OSError as error:
        return [f"the {kind} {path} could not be written: {error}"]
    return []


def _put(how: Callable[[dict[str, Any]], str], facts: dict[str, Any], path: Path) -> None:
    path.write_text(how(facts), encoding="utf-8")


def _append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def _json(facts: dict[str, Any]) -> str:
    from pytest_precision.report.document import as_json

    return as_json(facts)


def _html(facts: dict[str, Any]) -> str:
    from pytest_precision.report.html import as_html

    return as_html(facts)


def _markdown(facts: dict[str, Any]) -> str:
    from pytest_precision.report.markdown import as_markdown

    return as_markdown(facts)


_WRITERS: dict[str, Callable[[dict[str, Any]], str]] = {"json": _json, "html": _html, "summary": _markdown}
