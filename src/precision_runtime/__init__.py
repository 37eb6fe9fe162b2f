"""Run PyTorch code in any precision, and judge what the precision did to it.

Importing this package imports no torch: public names are loaded when they are first used (PEP 562). No module in here
may be called like a public function: importing it would hide the function (hence ``auditing``, ``capability``).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from precision_runtime.auditing import audit as audit
    from precision_runtime.capability import Support as Support
    from precision_runtime.capability import support as support
    from precision_runtime.counting.ledger import Ledger as Ledger
    from precision_runtime.modes import MODES as MODES
    from precision_runtime.modes import parse_mode as parse_mode
    from precision_runtime.planning.plan import Plan as Plan
    from precision_runtime.ranging import Headroom as Headroom
    from precision_runtime.ranging import Sensitivity as Sensitivity
    from precision_runtime.ranging import headroom as headroom
    from precision_runtime.ranging import sensitivity as sensitivity
    from precision_runtime.record import Finding as Finding
    from precision_runtime.record import Report as Report
    from precision_runtime.runtime import PrecisionRuntime as PrecisionRuntime
    from precision_runtime.runtime import StepResult as StepResult
    from precision_runtime.setup.keeping import Island as Island
    from precision_runtime.shrinking import Shrunk as Shrunk
    from precision_runtime.shrinking import shrink as shrink
    from precision_runtime.training import audit_training as audit_training

_HOME = {
    "MODES": "modes",
    "Finding": "record",
    "Headroom": "ranging",
    "Island": "setup.keeping",
    "Ledger": "counting.ledger",
    "Plan": "planning.plan",
    "PrecisionRuntime": "runtime",
    "Report": "record",
    "Sensitivity": "ranging",
    "Shrunk": "shrinking",
    "StepResult": "runtime",
    "Support": "capability",
    "audit": "auditing",
    "audit_training": "training",
    "headroom": "ranging",
    "parse_mode": "modes",
    "sensitivity": "ranging",
    "shrink": "shrinking",
    "support": "capability",
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'precision_runtime' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"precision_runtime.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
