"""``precision_ctx.explore``: a search for failing inputs, what it found made as small as it can be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from precision_runtime.auditing import audit
from precision_runtime.exploring import inputs_of, search
from precision_runtime.modes import Mode
from precision_runtime.ranging.quickly import verdict
from precision_runtime.record import Report
from precision_runtime.shrinking import shrink
from pytest_precision.pasting import Origin, pasted
from pytest_precision.shrinking import AUDITS, RAISED


def explore(
    function: Callable[..., Any],
    inputs: Sequence[Any],
    low: float,
    high: float,
    max_examples: int,
    seed: int,
    kwargs: Mapping[str, Any],
    mode: Mode,
    name: str | None,
    asked: Mapping[str, Any],
    origin: Origin,
) -> tuple[Report, str]:
    """The report on the worst input that was found, and, where it fails, that input as text.

    ``asked`` are the arguments of the audit that the test or its marker settled.
    """
    strategies = inputs_of(inputs, low, high)

    def judge(args: tuple[Any, ...]) -> Report:
        report = verdict(function, args, kwargs, mode, name=name, **asked)
        # The search for the guilty op takes long, and may find that nothing fails after all.
        return report if report.ok else audit(function, *args, mode=mode, kwargs=kwargs, name=name, **asked)

    found = search(judge, strategies, max_examples=max_examples, seed=seed)
    if found.report.ok:
        return found.report, ""
    where = f"found by example {found.examples} of at most {max_examples} (seed {seed})"
    try:
        small = shrink(function, found.args, kwargs, mode, audits=AUDITS, report=found.report, **asked)
    except RAISED as error:  # on a second look; what was found stands without it
        return found.report, f"{where}; not shrunk: {type(error).__name__}: {error}"
    small = replace(small, source=pasted(function, small, mode.name, asked, origin))
    return small.report, f"{where}; {small}"
