"""The audit: code run in a mode, run in FP64, judged."""

from __future__ import annotations

from precision_runtime.auditing.comparison import compare
from precision_runtime.auditing.executing.originals import Originals
from precision_runtime.auditing.executing.references import References
from precision_runtime.auditing.procedure import audit

__all__ = ["Originals", "References", "audit", "compare"]
