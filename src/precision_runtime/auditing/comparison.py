"""Judge values that a user computed by hand against a reference, with no tolerance but the mode's own rounding."""

from __future__ import annotations

from typing import Any

from precision_runtime.asked import budget_of
from precision_runtime.auditing.executing.results import results
from precision_runtime.auditing.judging.excess import pair
from precision_runtime.errors import ConfigurationError
from precision_runtime.modes import parse_mode
from precision_runtime.record import Finding, Report, lost_bits


def compare(
    actual: Any, reference: Any, *, mode: object, accelerator: str = "cpu", budget: float = 2.0, name: str = "compare"
) -> Report:
    """Judge ``actual`` (tensors, numbers and arrays, in any nesting) against ``reference``, which is built alike.

    Only one rounding of each result is granted, for nothing is known of the computation: use ``audit`` where the code
    itself can be run. Integers and bools have to be equal. Raises ``ConfigurationError`` where structures or shapes
    differ, and where there is nothing to compare.
    """
    budget = budget_of(budget)
    parsed = parse_mode(mode, "compare(mode=...)")
    ours, theirs = results(actual), results(reference)
    if [p for p, _ in ours] != [p for p, _ in theirs]:
        raise ConfigurationError(
            f"compare() got tensors at {[p or 'the top' for p, _ in ours]} and references at "
            f"{[p or 'the top' for p, _ in theirs]}; both need the same structure"
        )
    if not ours:
        raise ConfigurationError(
            f"compare() got a {type(actual).__name__} and a {type(reference).__name__}, in which it finds nothing to "
            "compare: tensors, numbers and arrays, in any nesting"
        )
    findings = []
    worst = 0.0
    for (path, a), (_, r) in zip(ours, theirs, strict=True):
        made = pair(f"actual{path}", a, r, parsed.format.unit_roundoff, parsed.format.smallest_subnormal)
        if isinstance(made, str):
            raise ConfigurationError(f"compare() cannot judge: {made}")
        judged = made.exactly() if made.decision else made.judge()
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
