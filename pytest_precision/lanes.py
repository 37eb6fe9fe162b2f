"""Lanes as values, and the parser of ``--precision-lanes``: a mode on an accelerator. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from precision_runtime.accelerators import ACCELERATORS
from precision_runtime.errors import UnknownNameError
from precision_runtime.modes import MODES, expand_modes
from pytest_precision.problems import Problems

AUTO = "auto"  # the machine's default accelerator, not looked up yet
SIMULATED = "sim:"


@dataclass(frozen=True)
class Lane:
    """A mode on an accelerator, as one test runs in it.

    ``default`` says whether the accelerator is the machine's default, which test ids leave out; ``ambient`` that the
    test does not ask for the fixture and runs inside the mode's autocast and default dtype; ``asked`` that the test
    itself names the mode, so that it must apply to the test's model.
    """

    mode: str
    accelerator: str
    default: bool = True
    ambient: bool = False
    asked: bool = True

    @property
    def id(self) -> str:
        """The last part of the test's id: ``16-mixed``, or ``16-mixed@cpu`` where cpu is not the default."""
        return self.mode if self.default else f"{self.mode}@{self.accelerator}"


NO_LANE = Lane("", "")  # what a test is given that the options leave no lane; it is deselected at once


@dataclass(frozen=True)
class Rule:
    """One term of a selection: modes, perhaps on one accelerator, to keep or to take away."""

    modes: tuple[str, ...]
    accelerator: str | None
    keep: bool


@dataclass(frozen=True)
class Selection:
    """An ordered list of rules; the last one that matches a lane decides."""

    rules: tuple[Rule, ...]

    def selects(self, mode: str, accelerator: str) -> bool:
        """Whether the lane is kept. A selection that only takes away starts from everything."""
        kept = not any(rule.keep for rule in self.rules)
        for rule in self.rules:
            if mode in rule.modes and rule.accelerator in (None, accelerator):
                kept = rule.keep
        return kept

    def modes(self) -> tuple[str, ...]:
        """The modes of at least one kept lane, in the order of first mention."""
        if not any(rule.keep for rule in self.rules):
            named = dict.fromkeys(MODES)
        else:
            named = dict.fromkeys(mode for rule in self.rules if rule.keep for mode in rule.modes)
        return tuple(mode for mode in named if any(self.selects(mode, a or "") for a in ("", *self.accelerators(mode))))

    def accelerators(self, mode: str) -> tuple[str | None, ...]:
        """The accelerators that kept terms name for ``mode``; None stands for a term that names none."""
        return tuple(dict.fromkeys(rule.accelerator for rule in self.rules if rule.keep and mode in rule.modes))

    @property
    def names_accelerators(self) -> bool:
        """Whether any term names an accelerator."""
        return any(rule.accelerator is not None for rule in self.rules)


def parse_selection(text: str, where: str, problems: Problems) -> Selection:
    """Parse ``mixed``, ``all,!64-true``, ``16-mixed@cpu``, ``!half@cuda``; what is wrong goes to ``problems``."""
    rules = []
    for term in filter(None, (part.strip() for part in text.split(","))):
        name, at, accelerator = term.removeprefix("!").partition("@")
        modes = mode_names([name], where, problems)
        devices = parse_accelerators([accelerator], where, problems) if at else (None,)
        rules += [Rule(modes, device, keep=not term.startswith("!")) for device in devices]
    if not rules and not problems:
        problems.add(f"{where} names no lane")
    return Selection(tuple(rules))


def mode_names(names: Iterable[object], where: str, problems: Problems) -> tuple[str, ...]:
    """Return the canonical names of modes and groups, without duplicates; unknown ones go to ``problems``."""
    given, bad = list(names), False
    for name in given:
        try:
            expand_modes([name])
        except UnknownNameError:
            problems.unknown_mode(name, where)
            bad = True
    return () if bad else tuple(mode.name for mode in expand_modes(given))


def parse_accelerators(names: Iterable[object], where: str, problems: Problems) -> tuple[str, ...]:
    """Return the accelerators called ``names``, without duplicates; unknown ones go to ``problems``."""
    found: dict[str, None] = {}
    for name in names:
        for part in name.split(",") if isinstance(name, str) else [name]:
            key = part.strip().lower() if isinstance(part, str) else part
            if key in ACCELERATORS:
                found[str(key)] = None
            elif isinstance(key, str) and key.startswith(SIMULATED):
                problems.add(f"accelerator {key!r} in {where}: simulated ones are not available in this version")
            elif key != "":
                problems.unknown_accelerator(part, ACCELERATORS, where)
            else:
                problems.add(f"accelerator missing in {where}")
    return tuple(found)
