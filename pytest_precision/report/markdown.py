"""The run as a short page of Markdown, for the summary of a job."""

from __future__ import annotations

import re
from typing import Any

MOST = 200  # rows: a summary on GitHub may have a megabyte
LOUD = ("FAIL", "error", "crash", "xpass")


def as_markdown(facts: dict[str, Any]) -> str:
    """Headline, matrix, findings, reasons for skips. Of many tests those that did not simply hold are shown."""
    cells = {(row["case"], row["lane"]): row for row in facts["rows"]}
    cases, lanes = facts["cases"], facts["lanes"]
    shown = cases
    if len(cases) > MOST:
        loud = {row["case"] for row in facts["rows"] if row["verdict"] in LOUD}
        shown = [case for case in cases if case in loud][:MOST]
    lines = ["## Precision", "", _text(facts["headline"]), ""]
    lines += [f"- **{_text(line)}**" for line in facts["owed"]]
    if shown:
        lines += ["", "| test | " + " | ".join(_text(lane) for lane in lanes) + " |"]
        lines += ["| --- |" + " ---: |" * len(lanes)]
        lines += ["| " + " | ".join([_text(c), *(_cell(cells.get((c, lane))) for lane in lanes)]) + " |" for c in shown]
    if len(shown) < len(cases):
        lines += ["", f"{len(cases) - len(shown)} more tests are not shown."]
    for title, key in (("Findings, worst first", "findings"), ("Skipped", "skips")):
        if facts[key]:
            lines += ["", f"### {title}", "", *(f"- {_text(line)}" for line in facts[key][:MOST])]
    if facts["notes"]:
        lines += ["", "```text", *(line.replace("```", "") for line in facts["notes"]), "```"]
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"**{_text(row['word'])}**" if row["verdict"] in LOUD else _text(row["word"])


def _text(text: str) -> str:
    """Text with nothing in it that Markdown or a table would take for its own."""
    escaped = re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", text)
    return " ".join(escaped.split())
