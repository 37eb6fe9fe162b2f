"""The run as one page of HTML, with everything in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from precision_runtime import page
from precision_runtime.record import Report, bits

TEMPLATES = Path(__file__).parent / "templates"


def as_html(facts: dict[str, Any]) -> str:
    """Render the document."""
    cells = {(row["case"], row["lane"]): number for number, row in enumerate(facts["rows"])}
    return page.render("matrix.html", TEMPLATES, facts=facts, cells=cells, details=_details(facts), bits=bits)


def _details(facts: dict[str, Any]) -> dict[int, list[dict[str, Any]]]:
    """By a row's number, those of its checks that have more to say than a figure, as reports and as their text."""
    told: dict[int, list[dict[str, Any]]] = {}
    for number, row in enumerate(facts["rows"]):
        for place, check in enumerate(row["checks"]):
            report = Report.from_dict(dict(check))
            if not report.ok or report.layers or report.remarks:
                told.setdefault(number, []).append({"place": place + 1, "report": report})
    return told
