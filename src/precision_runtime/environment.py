"""What the environment asks of a runtime: ``PRECISION_RUNTIME_MODE`` and ``PRECISION_RUNTIME_ACCELERATOR``.

``precision-runtime run`` sets them for a script. A runtime that names no mode takes what they say; one that names
another mode is an error, for one of the two would not get what it asked for. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from precision_runtime.errors import ConfigurationError
from precision_runtime.modes import MODES, Mode, parse_mode

MODE = "PRECISION_RUNTIME_MODE"
ACCELERATOR = "PRECISION_RUNTIME_ACCELERATOR"

_IGNORED: ContextVar[bool] = ContextVar("precision_runtime_environment_ignored", default=False)
_met = 0


@contextmanager
def ignored() -> Iterator[None]:
    """Inside, the environment asks for nothing: for runtimes in modes that a matrix or a measurement goes through."""
    token = _IGNORED.set(True)
    try:
        yield
    finally:
        _IGNORED.reset(token)


def runtimes_met() -> int:
    """How many runtimes of this process ran in the mode that the environment asks for."""
    return _met


def chosen_mode(named: Mode | None) -> Mode:
    """The mode of a runtime that was made with ``named``, None where it names none: then 32-true, or the environment's.

    Raises ``ConfigurationError`` where they contradict each other, and ``UnknownNameError`` for a name in the
    environment that does not exist.
    """
    global _met  # noqa: PLW0603  # a count of the process, as the environment is the process's
    asked = _asked(MODE)
    if not asked:
        return named or MODES["32-true"]
    wanted = parse_mode(asked, f"the environment variable {MODE}")
    if named is not None and named.name != wanted.name:
        raise ConfigurationError(
            f"this runtime is made in {named}, and the environment asks for {wanted} ({MODE}={asked}, which "
            "`precision-runtime run --precision` sets). Leave the mode out, as in PrecisionRuntime(), so that it can "
            "be chosen from outside, or unset the variable"
        )
    _met += 1
    return named or wanted


def chosen_accelerator(given: object) -> object:
    """The accelerator of a runtime that was made with ``given``: the environment's where that is "auto".

    Raises ``ConfigurationError`` where they contradict each other; "cuda" and "cuda:1" do not, and the second counts.
    """
    asked, named = _asked(ACCELERATOR), str(given).strip().lower()
    exact = _more_exact(asked, named)
    if exact is None:
        raise ConfigurationError(
            f"this runtime is made with accelerator={str(given)!r}, and the environment asks for {asked!r} "
            f"({ACCELERATOR}, which `precision-runtime run --accelerator` sets). Leave the accelerator out, or unset "
            "the variable"
        )
    return given if exact == named else exact


def for_script(mode: Mode, accelerator: str) -> dict[str, str]:
    """The variables that give a script this mode and accelerator, together with those that are set already.

    Raises ``ConfigurationError`` where ``--precision`` or ``--accelerator`` contradict what is set.
    """
    asked, place = _asked(MODE), _asked(ACCELERATOR)
    exact = _more_exact(place, accelerator.strip().lower())
    wrong = []
    if asked and parse_mode(asked, f"the environment variable {MODE}").name != mode.name:
        wrong.append(f"--precision {mode} and {MODE}={asked}")
    if exact is None:
        wrong.append(f"--accelerator {accelerator} and {ACCELERATOR}={place}")
    if wrong:
        raise ConfigurationError(f"{', '.join(wrong)}: these contradict each other; leave one out, or unset it")
    return {MODE: mode.name, ACCELERATOR: exact or "auto"}


def _more_exact(asked: str, named: str) -> str | None:
    """Which of two accelerators says more, as "cuda:1" says more than "cuda" and "auto"; None where they differ."""
    if asked in ("", "auto") or named == asked or named.startswith(f"{asked}:"):
        return named
    return asked if named == "auto" or asked.startswith(f"{named}:") else None


def _asked(variable: str) -> str:
    return "" if _IGNORED.get() else os.environ.get(variable, "").strip().lower()
