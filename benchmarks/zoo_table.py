"""Put the findings of sweeps over the zoo beside their causes, and write the page that says which are true.

    python benchmarks/zoo_table.py --sweep short-plain=FILE [--sweep 250-plain=FILE …] [--again short-plain=FILE …]
                                   [--causes docs/zoo_causes.toml] [--document docs/zoo.md]

The files are what ``benchmarks/zoo.py --json`` wrote. ``--again`` names later runs of some models of a sweep, made
after a false finding was cured: they stand beside the sweep's rows and replace none. A cause claims findings by model
and mode (``rows``: globs of "model mode") and, where it says so, by kind, module (globs), direction and sweep (globs).
What a claimed finding takes along (a module around it, or the whole) belongs to it; what nobody claims is unread, and
the page says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- begin: benchmarks/zoo_table.py -->", "<!-- end -->"
VERDICTS = ("true", "false", "cured")
# Remarks of benchmarks/zoo.py on models that could not be judged, or not wholly.
UNJUDGED = {
    "not-built": "could not be built",
    "not-run": "do not run in float32 by themselves",
    "no-gradients": "cannot be differentiated by themselves: judged forward only",
}

Row = dict[str, Any]


@dataclass
class Cause:
    """Why a group of findings came up, and whether that is a defect of what was audited."""

    title: str
    verdict: str
    text: str
    rows: list[str]
    kinds: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    where: str = ""
    sweeps: list[str] = field(default_factory=list)

    def claims(self, row: Row, finding: Sequence[Any]) -> bool:
        """Whether this is the cause of a finding of a row."""
        name = f"{row['name']} {row['mode']}"
        return (
            any(fnmatchcase(name, pattern) for pattern in self.rows)
            and (not self.kinds or finding[1] in self.kinds)
            and (not self.modules or any(fnmatchcase(finding[0], pattern) for pattern in self.modules))
            and self.where in ("", finding[2])
            and (not self.sweeps or any(fnmatchcase(row["sweep"], pattern) for pattern in self.sweeps))
        )


def main() -> int:
    """Write the page, or print it. Return 1 where a finding is unread."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sweep", action="append", type=named, default=[], metavar="NAME=FILE", required=True)
    parser.add_argument("--again", action="append", type=named, default=[], metavar="NAME=FILE")
    parser.add_argument("--causes", type=Path, default=Path("docs/zoo_causes.toml"))
    parser.add_argument("--document", type=Path, help="replace what stands between the marks in this page")
    options = parser.parse_args()
    causes = read_causes(options.causes)
    again = dict(options.again)
    unread, parts = 0, []
    for name, rows in options.sweep:
        text, left = section(name, rows, again.get(name, []), causes)
        parts.append(text)
        unread += left
    page = "\n\n".join(parts)
    if options.document:
        before, _, rest = options.document.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        options.document.write_text(f"{before}{BEGIN}\n\n{page}\n\n{END}{after}", encoding="utf-8")
    else:
        print(page)
    print(f"{unread} findings unread", file=sys.stderr)
    return int(unread > 0)


def named(text: str) -> tuple[str, list[Row]]:
    """Read ``NAME=FILE``."""
    name, _, path = text.partition("=")
    return name, [row | {"sweep": name} for row in json.loads(Path(path).read_text(encoding="utf-8"))]


def read_causes(path: Path) -> list[Cause]:
    """Read the causes; raise ``ValueError`` for a verdict that there is not."""
    import tomllib  # Python 3.11 has it, and only who writes the page needs it

    found = [Cause(**entry) for entry in tomllib.loads(path.read_text(encoding="utf-8"))["cause"]]
    for cause in found:
        if cause.verdict not in VERDICTS:
            raise ValueError(f"{cause.title!r} has the verdict {cause.verdict!r}; allowed: {', '.join(VERDICTS)}")
    return found


def sort_out(row: Row, causes: Iterable[Cause]) -> tuple[dict[int, Cause], list[int]]:
    """Return the cause of each finding of a row by its number, and the numbers of those that nobody claims."""
    owner: dict[int, Cause] = {}
    for number, finding in enumerate(row["findings"]):
        cause = next((c for c in causes if c.claims(row, finding)), None)
        if cause is not None:
            owner[number] = cause
    left = []
    for number, finding in enumerate(row["findings"]):
        if number in owner:
            continue
        inside = (n for n, f in enumerate(row["findings"]) if n in owner and around(finding[0], f[0]))
        first = next(inside, None)
        if first is None:
            left.append(number)
        else:
            owner[number] = owner[first]
    return owner, left


def around(outer: str, inner: str) -> bool:
    """Whether a module is the whole, the other one itself, or around it."""
    return outer in ("", inner) or inner.startswith(f"{outer}.")


def section(name: str, rows: Sequence[Row], again: Sequence[Row], causes: Sequence[Cause]) -> tuple[str, int]:
    """Return the part of the page about one sweep, and how many of its findings are unread."""
    counts: dict[str, list[int]] = {verdict: [0, 0] for verdict in (*VERDICTS, "unread")}
    by_verdict: dict[str, set[str]] = defaultdict(set)
    members: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    open_: list[str] = []
    for row in rows:
        owner, left = sort_out(row, causes)
        for verdict in VERDICTS:
            counts[verdict][0] += sum(c.verdict == verdict for c in owner.values())
        counts["unread"][0] += len(left)
        for cause in {c.title: c for c in owner.values()}.values():
            by_verdict[cause.verdict].add(row["name"])
            members[cause.title][row["name"]].append(row["mode"])
        if left:
            by_verdict["unread"].add(row["name"])
            module, kind, where, *_ = row["findings"][left[0]]
            open_.append(f"{row['name']} {row['mode']} ({kind} {where} in `{module or 'the whole'}`)")
    models = {row["name"] for row in rows}
    calls = sum(row["calls"] for row in rows)
    lines = [
        f"## {name}",
        "",
        f"{len(models):,} models, {len(rows):,} audits, {calls:,} module calls. "
        f"{len({r['name'] for r in rows if r['findings']})} models have findings in some mode.",
        "",
        "| | findings | models | share of the models |",
        "|---|---|---|---|",
    ]
    for verdict, (number, _) in counts.items():
        share = len(by_verdict[verdict]) / max(1, len(models))
        lines.append(f"| {LABELS[verdict]} | {number} | {len(by_verdict[verdict])} | {share:.1%} |")
    lines += ["", *silent(again, rows, causes), "| cause | | models and modes |", "|---|---|---|"]
    for cause in causes:
        if members[cause.title]:
            who = "; ".join(f"{model} {modes_of(modes)}" for model, modes in sorted(members[cause.title].items()))
            lines.append(f"| **{cause.title}.** {cause.text} | {cause.verdict} | {who} |")
    if open_:
        lines += ["", "Unread: " + "; ".join(open_) + "."]
    lines += unjudged(rows)
    return "\n".join(lines), counts["unread"][0]


LABELS = {
    "true": "true",
    "false": "false",
    "cured": "false, and silent since its cure",
    "unread": "not read yet",
}


def modes_of(modes: Sequence[str]) -> str:
    """Name modes briefly."""
    return "all" if len(modes) == 4 else ", ".join(sorted(modes))


def silent(again: Sequence[Row], rows: Sequence[Row], causes: Sequence[Cause]) -> list[str]:
    """Say what the audits that were made again after a cure gave."""
    if not again:
        return []
    flagged = {(row["name"], row["mode"]) for row in rows if row["findings"]}
    cured = [r for r in again if (r["name"], r["mode"]) in flagged and any(claimed_cured(r, rows, causes))]
    still = [f"{r['name']} {r['mode']}" for r in cured if r["findings"] or r["crash"]]
    text = f"Audited again after the cures: {len(cured)} audits with a finding classed so, {len(cured) - len(still)} "
    text += "of them without any finding now" + (
        f"; still with one (of another cause): {', '.join(still)}" * bool(still)
    )
    return [text + ".", ""]


def claimed_cured(again: Row, rows: Sequence[Row], causes: Sequence[Cause]) -> Iterable[bool]:
    """Yield, for each finding of the sweep's row, whether its cause is cured."""
    for row in rows:
        if (row["name"], row["mode"]) == (again["name"], again["mode"]):
            yield from (cause.verdict == "cured" for cause in sort_out(row, causes)[0].values())


def unjudged(rows: Sequence[Row]) -> list[str]:
    """Say which models could not be judged, and why."""
    why: dict[str, dict[str, str]] = defaultdict(dict)
    crashed: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        for kind, _, message in row["remarks"]:
            if kind in UNJUDGED:
                why[kind].setdefault(row["name"], message)
        if row["crash"]:
            crashed[f"{row['name']}: {row['crash']}"].append(row["mode"])
    lines = []
    for kind, text in UNJUDGED.items():
        if why[kind]:
            lines += ["", f"{len(why[kind])} models {text}:", ""]
            lines += [f"- {name}: {message.removeprefix('the model alone: ')}" for name, message in why[kind].items()]
    if crashed:
        lines += ["", "Audits that gave no report:", ""]
        lines += [f"- {what} ({modes_of(modes)})" for what, modes in crashed.items()]
    return lines


if __name__ == "__main__":
    sys.exit(main())
