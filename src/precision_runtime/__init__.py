"""Run PyTorch code in any precision, and judge what the precision did to it.

Importing this package imports no torch: public names are loaded when they are first used (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from precision_runtime.audit import audit as audit
    from precision_runtime.modes import MODES as MODES
    from precision_runtime.modes import parse_mode as parse_mode
    from precision_runtime.record import Finding as Finding
    from precision_runtime.record import Report as Report
    from precision_runtime.runtime import PrecisionRuntime as PrecisionRuntime
    from precision_runtime.runtime import StepResult as StepResult
    from precision_runtime.support import Support as Support
    from precision_runtime.support import support as support

_HOME = {
    "MODES": "modes",
    "Finding": "record",
    "PrecisionRuntime": "runtime",
    "Report": "record",
    "StepResult": "runtime",
    "Support": "support",
    "audit": "audit",
    "parse_mode": "modes",
    "support": "support",
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'precision_runtime' has no attribute {name!r}; it has {', '.join(__all__)}")
    # Also replaces the sub-package of the same name (audit, support), which an earlier import may have bound here.
    value = getattr(importlib.import_module(f"precision_runtime.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
