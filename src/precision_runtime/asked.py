"""What audits and measurements are asked, checked where it comes in. Imports no torch."""

from __future__ import annotations

import math
import operator
from numbers import Real

from precision_runtime.errors import ConfigurationError

_SEEDS = (-(2**63), 2**64 - 1)  # what torch takes


def check_subject(function: object, asker: str) -> None:
    """Raise ``ConfigurationError`` for what cannot be called; ``asker`` is the function that was given it."""
    if not callable(function):
        raise ConfigurationError(
            f"{asker}() got {type(function).__name__} as the function to judge; pass a module or a callable, and its "
            "inputs after it"
        )


def budget_of(value: object) -> float:
    """Bits that may be lost, as a float; raises ``ConfigurationError`` for anything but a number from 0 up."""
    if isinstance(value, bool) or not isinstance(value, Real) or not float(value) >= 0:
        raise ConfigurationError(
            f"budget={value!r} is not allowed: the bits that may be lost are a number from 0 up, such as 2.0"
        )
    return float(value)


def seed_of(value: object) -> int:
    """A seed; raises ``ConfigurationError`` for what torch takes none from."""
    return whole("seed", value, *_SEEDS, "a seed is a whole number, such as 0")


def whole(name: str, value: object, low: float, high: float = math.inf, allowed: str = "") -> int:
    """``value`` as an int; raises ``ConfigurationError`` with ``allowed`` for anything but ``low`` … ``high``."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # whatever it is
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not low <= number <= high:
        raise ConfigurationError(f"{name}={value!r} is not allowed: {allowed}")
    return number
