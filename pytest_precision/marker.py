"""The marker ``precision`` as a value, checked: every mistake in one message."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from precision_runtime.errors import did_you_mean
from precision_runtime.modes import MODES
from pytest_precision.choices import Choices, parse_choices
from pytest_precision.lanes import mode_names, parse_accelerators
from pytest_precision.problems import Problems

KEYWORDS = ("accelerators", "budget", "gradients", "xfail", "reference", "runtime")
WHERE = "the marker precision"


@dataclass(frozen=True)
class Marked:
    """What a marker says; an unmarked test has the defaults. Empty modes: none are named."""

    modes: tuple[str, ...] = ()
    accelerators: tuple[str, ...] = ()
    budget: float | None = None
    gradients: bool | None = None
    xfail: Mapping[str, str] = field(default_factory=dict)
    runtime: Choices = field(default_factory=Choices)


def parse_mark(mark: pytest.Mark, problems: Problems) -> Marked:
    """Parse a marker; what is wrong with it goes to ``problems``."""
    given: dict[str, Any] = dict(mark.kwargs)
    for key in given:
        if key not in KEYWORDS:
            near = did_you_mean(key, KEYWORDS)
            problems.add(f"{WHERE} takes no argument {key!r}.{near} It takes modes and {', '.join(KEYWORDS)}")
    modes = mode_names(_singly(mark.args, problems), WHERE, problems)
    accelerators = given.get("accelerators")
    budget, gradients = given.get("budget"), given.get("gradients")
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, (int, float)) or not budget >= 0):
        problems.add(f"{WHERE}: budget is {budget!r}; it is a number of bits, 0 or more")
    if gradients is not None and not isinstance(gradients, bool):
        problems.add(f"{WHERE}: gradients is {gradients!r}; it is True or False")
    if given.get("reference", "64-true") not in ("64-true", "64", 64):
        problems.add(f"{WHERE}: reference is {given['reference']!r}; the reference is always '64-true'")
    if accelerators is None:
        accelerators = ()
    elif not isinstance(accelerators, (str, list, tuple)):
        problems.add(f"{WHERE}: accelerators is {accelerators!r}; it is a name or a list of names")
        accelerators = ()
    return Marked(
        modes=modes,
        accelerators=parse_accelerators(
            [accelerators] if isinstance(accelerators, str) else accelerators, f"{WHERE}, accelerators", problems
        ),
        budget=budget,
        gradients=gradients,
        xfail=_xfail(given.get("xfail"), modes, problems),
        runtime=parse_choices(given.get("runtime"), modes, f"{WHERE}, runtime", problems),
    )


def _singly(args: tuple[object, ...], problems: Problems) -> list[object]:
    """The modes; lists of them are a mistake, and are told how to be written."""
    for given in args:
        if isinstance(given, (list, tuple, set, frozenset)):
            problems.add(f"{WHERE} takes modes one by one: precision({', '.join(map(repr, given))}), not {given!r}")
    return [given for given in args if not isinstance(given, (list, tuple, set, frozenset))]


def _xfail(given: object, modes: tuple[str, ...], problems: Problems) -> dict[str, str]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        problems.add(f"{WHERE}: xfail is {given!r}; it is a dict of mode: reason")
        return {}
    reasons: dict[str, str] = {}
    for name, reason in given.items():
        if not isinstance(reason, str) or not reason.strip():
            problems.add(f"{WHERE}, xfail: {name!r} has the reason {reason!r}; it needs a text that says what is known")
            continue
        named = mode_names([name], f"{WHERE}, xfail", problems)
        foreign = [mode for mode in named if mode in MODES and modes and mode not in modes]
        if named and len(foreign) == len(named):  # of a group, the modes that the test runs are meant
            problems.add(f"{WHERE}, xfail: {name!r} is none of the modes that the marker names: {', '.join(modes)}")
        reasons |= dict.fromkeys((mode for mode in named if mode not in foreign), reason)
    return reasons
