"""Judge values that a user computed by hand against a reference, with no tolerance but the mode's own rounding."""

from __future__ import annotations

from typing import Any

from precision_runtime.asked import budget_of
from precision_runtime.auditing.excess import pair
from precision_runtime.errors import ConfigurationError
from precision_runtime.modes import parse_mode
from precision_runtime.record import Finding, Report, lost_bits
from precision_runtime.tree import leaves


def compare(
    actual: Any, reference: Any, *, mode: object, accelerator: str = "cpu", budget: float = 2.0, name: str = "compare"
) -> Report:
    """Judge ``actual`` (tensors in any nesting) against ``reference`` of the same structure and shapes.

    Only one rounding of each result is granted, for nothing is known of the computation: use ``audit`` where the code
    itself can be run. Raises ``ConfigurationError`` where structures or shapes differ.
    """
    budget = budget_of(budget)
    parsed = parse_mode(mode, "compare(mode=...)")
    ours, theirs = list(leaves(actual)), list(leaves(reference))
    if [p for p, _ in ours] != [p for p, _ in theirs]:
        raise ConfigurationError(
            f"compare() got tensors at {[p or 'the top' for p, _ in ours]} and references at "
            f"{[p or 'the top' for p, _ in theirs]}; both need the same structure"
        )
    findings = []
    worst = 0.0
    for (path, a), (_, r) in zip(ours, theirs, strict=True):
        made = pair(f"actual{path}", a, r, parsed.format.unit_roundoff, parsed.format.smallest_subnormal)
        if isinstance(made, str):
            raise ConfigurationError(f"compare() cannot judge: {made}")
        judged = made.judge()
        worst = max(worst, judged.score)
        if judged.score > 2.0**budget:
            note = judged.note or (
                f"the error is {judged.excess:.3g} times (its worst element {judged.tail:.3g} times) one "
                "rounding of the result"
            )
            findings.append(
                Finding(
                    kind=judged.kind or "instability",
                    where="forward", module="", op=None, lost_bits=lost_bits(judged.score), excess=judged.score,
                    message=note, worst=judged.worst,
                )
            )  # fmt: skip
    return Report(name, parsed.name, accelerator, "native", budget, worst, worst, tuple(findings))
