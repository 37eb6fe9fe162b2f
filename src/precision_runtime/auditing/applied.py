"""Whether a run in a low-precision mode ever computed in it."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from precision_runtime.auditing.executing.dispatch import LowWatch
from precision_runtime.modes import Mode
from precision_runtime.record import Finding, Remark


def not_applied(mode: Mode, watch: LowWatch, weights: Iterable[torch.Tensor]) -> Finding | Remark | None:
    """What is to be said where no op produced the mode's dtype although there were products; None otherwise.

    A remark where the code itself switches autocast off around all of them, or casts up what it is given while all
    floating ``weights`` (or there are none) are in the mode's dtype; a finding everywhere else.
    """
    if not mode.low or not watch.products or getattr(torch, mode.compute) in watch.frames[0].dtypes:
        return None
    if mode.autocast and watch.products == {torch.float32}:
        return Remark(
            "not-applied",
            f"no op ran in {mode.compute}: the code switches autocast off around all of its products",
        )
    stored = {t.dtype for t in weights if t.is_floating_point()} <= {getattr(torch, mode.params)}
    if stored and not mode.autocast:
        return Remark("not-applied", f"no op ran in {mode.compute}: the code casts up weights and inputs by itself")
    ran = ", ".join(sorted(str(d).removeprefix("torch.") for d in watch.products))
    return Finding(
        kind="not-applied", where="forward", module="", op=None, lost_bits=0.0, excess=0.0,
        message=f"the mode was not applied: no op produced {mode.compute}, every matrix product ran in {ran}",
    )  # fmt: skip
