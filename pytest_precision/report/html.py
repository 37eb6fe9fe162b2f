"""The run as one page of HTML, with everything in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from precision_runtime import page
from precision_runtime.ranging.room import Headroom
from precision_runtime.record import Report, bits
from pytest_precision.headroom import bits_of_headroom

TEMPLATES = Path(__file__).parent / "templates"


def as_html(facts: dict[str, Any]) -> str:
    """Render the document."""
    cells = {(row["case"], row["lane"]): number for number, row in enumerate(facts["rows"])}
    return page.render(
        "matrix.html", TEMPLATES, facts=facts, cells=cells, details=_details(facts), rooms=_rooms(facts), bits=bits,
        bits_of_headroom=bits_of_headroom,
    )  # fmt: skip


def _rooms(facts: dict[str, Any]) -> dict[int, list[str]]:
    """By a row's number, the tables of its measurements of headroom."""
    measured = ((number, row["headrooms"]) for number, row in enumerate(facts["rows"]))
    return {number: [str(Headroom.from_dict(dict(each))) for each in given] for number, given in measured if given}


def _details(facts: dict[str, Any]) -> dict[int, list[dict[str, Any]]]:
    """By a row's number, those of its checks that have more to say than a figure, as reports and as their text."""
    told: dict[int, list[dict[str, Any]]] = {}
    for number, row in enumerate(facts["rows"]):
        for place, check in enumerate(row["checks"]):
            report = Report.from_dict(dict(check))
            if not report.ok or report.layers or report.remarks:
                told.setdefault(number, []).append({"place": place + 1, "report": report})
    return told
