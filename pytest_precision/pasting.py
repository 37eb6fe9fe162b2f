"""The test that shows a failure again, as text to paste into the file of the test that failed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from precision_runtime import Shrunk

_TORCH = ("torch", "torch.nn.functional")  # where its functions are found, whatever their own __module__ says


@dataclass(frozen=True)
class Origin:
    """The test that failed: its node id without the lane, its module's name, what its lane needs of the marker beside
    the mode, and the budget of tests whose marker names none.
    """

    case: str = "the test that failed"
    module: str = ""
    marker: Mapping[str, Any] = field(default_factory=dict)
    budget: float = 2.0


def pasted(function: Callable[..., Any], found: Shrunk, mode: str, asked: Mapping[str, Any], origin: Origin) -> str:
    """The test, or a comment that says why no text can make it. ``asked`` are the arguments of the check's audit."""
    from precision_runtime.errors import ConfigurationError
    from precision_runtime.pasting import source_of_check

    named = expression_of(function, origin.module)
    subject, needed = named or ("subject", "")
    note = f"`subject` is what {origin.case} checks ({found.report.subject}): make it here as it is made there"
    options: dict[str, Any] = {} if asked["gradients"] else {"gradients": False}
    if asked["budget"] != origin.budget:
        options["budget"] = asked["budget"]
    try:
        return source_of_check(
            subject, mode, found.args, found.kwargs, found.draws, found.report, options, origin.marker, needed,
            "" if named else note,
        )  # fmt: skip
    except ConfigurationError as error:  # what was found stands without it
        return f"# {error}\n"


def expression_of(function: Callable[..., Any], module: str) -> tuple[str, str] | None:
    """What source text in ``module`` calls the function, and the import that it needs; None where it has no name there.

    Functions made in a test, and most models, have none: their names mean something in that test alone.
    """
    known = vars(sys.modules[module]) if module in sys.modules else {}
    for name, value in list(known.items()):
        if value is function:
            return name, ""
    name = str(getattr(function, "__name__", ""))
    for holder in _TORCH:
        if getattr(sys.modules.get(holder), name, None) is function:
            return f"{holder}.{name}", ""
    home, name = str(getattr(function, "__module__", "")), str(getattr(function, "__qualname__", ""))
    found: Any = sys.modules.get(home)
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is not function:
        return None
    return name, "" if home == module else f"from {home} import {name.partition('.')[0]}"
