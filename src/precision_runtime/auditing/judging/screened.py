"""What an FP64 run found of a call whose tensors it has let go."""

from __future__ import annotations

from dataclasses import dataclass, field

from precision_runtime.auditing.judging.excess import Judgement

Site = tuple[str, str]  # ("forward" | "backward", tensor)


@dataclass(eq=False)
class Screened:
    """Judgements by site, and sentences on what could not be put side by side."""

    judged: dict[Site, Judgement] = field(default_factory=dict)
    apart: list[str] = field(default_factory=list)
