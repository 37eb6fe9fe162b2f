"""What is learnt on the way beside findings: remarks, figures and scores of the report."""

from __future__ import annotations

from dataclasses import dataclass, field

from precision_runtime.record import Remark


@dataclass(eq=False)
class Notes:
    """Filled while a training is examined."""

    remarks: list[Remark] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    scores: list[float] = field(default_factory=list)  # measured, of what has not failed
