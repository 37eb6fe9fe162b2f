"""Errors of the precision runtime, and the one way in which they are worded.

Each message answers: what failed, where, what was given, what is allowed, what to do. This file imports no torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType


class PrecisionError(Exception):
    """Base of every error that this package raises on purpose."""


class UnknownNameError(PrecisionError, ValueError):
    """One or more names (modes, accelerators, lanes, …) are not known; lists every bad one at once."""


class UnsupportedError(PrecisionError, RuntimeError):
    """This machine cannot run the mode on the accelerator; the message has the reason and what to install."""


class ConfigurationError(PrecisionError, ValueError):
    """A combination of arguments that contradict each other."""


class NothingToSwapError(ConfigurationError):
    """The mode swaps layers of a kind that the model does not have: nothing would run in it."""


class AuditError(PrecisionError, RuntimeError):
    """The audit could not be carried out (the reference itself fails, for instance); never a verdict."""


class PrecisionWarning(UserWarning):
    """Numbers are about to be wrong, or others than the code asked for, though nothing fails."""


def did_you_mean(name: str, known: Iterable[str], elsewhere: Mapping[str, Sequence[str]] = MappingProxyType({})) -> str:
    """Return ``" Did you mean 'x'?"`` for the known name nearest to ``name``, or an empty string.

    ``elsewhere`` maps, in lower case, what others call such a thing to the names that may be meant by it.
    """
    meant = {each.lower(): (each,) for each in known}
    near = difflib.get_close_matches(name.strip().lower(), [*meant, *elsewhere], n=1, cutoff=0.6)
    return f" Did you mean {' or '.join(map(repr, meant.get(near[0]) or elsewhere[near[0]]))}?" if near else ""


def unknown_names(
    what: str,
    bad: Sequence[object],
    known: Sequence[str],
    where: str = "",
    elsewhere: Mapping[str, Sequence[str]] = MappingProxyType({}),
    plural: str = "",
) -> UnknownNameError:
    """Build the error for every unknown name at once.

    ``what`` is the noun ("precision mode"), ``where`` the place that they were given in (an option, an argument).
    ``elsewhere`` maps what others call such a thing to the names that may be meant. ``plural`` is the noun's, where an
    "s" does not make it.
    """
    place = f" in {where}" if where else ""

    lines = [
        f"{what} {name!r}{place} is unknown." + (did_you_mean(name, known, elsewhere) if isinstance(name, str) else "")
        for name in bad
    ]
    return UnknownNameError("\n".join([*lines, f"Known {plural or what + 's'}: {', '.join(known)}"]))
