"""The one place where values become builtins, so that they can cross processes and enter JUnit files.

xdist's channel takes exact builtin types: a ``numpy.float64``, a ``str`` enumeration, a tensor or a dtype ends the
whole run with an internal error.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from typing import Any


def plain(value: object) -> Any:
    """Return ``value`` as None, bool, int, float, str, list or dict with str keys, of exactly these types.

    Arrays and tensors of one element become that number, others nested lists; what is nothing of the kind, its text.
    """
    if value is None or value is True or value is False:
        return value
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__index__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in _ordered(value)]
    if callable(tolist := getattr(value, "tolist", None)):  # tensors, arrays, numpy's scalars; none is imported here
        listed = tolist()
        return repr(value) if hasattr(listed, "tolist") else plain(_only(listed))
    return str.__str__(str(value))


def _ordered(value: Iterable[object]) -> Iterable[object]:
    return sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value


def _only(value: object) -> object:
    """The one number in lists of one element, else the lists as they are."""
    inner = value
    while isinstance(inner, list) and len(inner) == 1:
        inner = inner[0]
    return value if isinstance(inner, list) else inner
