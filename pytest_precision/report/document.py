"""A whole run as one dict of builtins, which every file is made from."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pytest_precision.report.row import Row
from pytest_precision.report.terminal import findings, headline, lanes_of, skips, word

VERSION = 1  # of the JSON: raised when a key changes its meaning or goes


def document(rows: Sequence[Row], owed: Sequence[str], notes: Sequence[str]) -> dict[str, Any]:
    """The run: where it ran, its tests by lanes, each lane with its checks (``Report.to_dict()``), in fixed order."""
    ordered = sorted(rows, key=lambda row: row.nodeid)
    return {
        "version": VERSION,
        "made_by": {
            "pytest-precision": _version("pytest-precision"),
            "torch": _version("torch"),
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}",
        },
        "headline": headline(ordered) if ordered else "nothing ran",
        "counts": dict(sorted(Counter(row.verdict for row in ordered).items())),
        "cases": sorted({row.case for row in ordered}),
        "lanes": lanes_of(ordered),
        "skips": skips(ordered),
        "findings": [line.strip() for line in findings(ordered)[2:]],
        "owed": list(owed),
        "notes": list(notes),
        "rows": [_row(row) for row in ordered],
    }


def as_json(facts: dict[str, Any]) -> str:
    """The document as strict JSON; inf and nan are strings."""
    return json.dumps(_strict(facts), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _row(row: Row) -> dict[str, Any]:
    return {
        "nodeid": row.nodeid,
        "case": row.case,
        "lane": row.lane,
        "mode": row.mode,
        "runs": row.runs,
        "accelerator": row.accelerator,
        "status": row.status,
        "verdict": row.verdict,
        "word": word(row),
        "reason": row.reason,
        "lost_bits": row.lost_bits,
        "before": row.before,
        "headroom": None if row.left is None else row.left.bits,
        "headroom_before": row.headroom_before,
        "worse": row.worse,
        "headrooms": list(row.headrooms),
        "checks": list(row.checks),
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # run from its source, without having been installed
        return ""


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
