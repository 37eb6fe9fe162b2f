"""What an optimizer's settings do in half precision, told beside what was found."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from precision_runtime.formats import FORMATS
from precision_runtime.stepping.optimizers import hazards


def hazards_of(optimizer: Any) -> list[str]:
    """Sentences on settings that half formats do not hold; none for what is no optimizer of torch's."""
    return [str(h) for h in hazards(optimizer)] if isinstance(optimizer, Optimizer) else []


def idle_decay(optimizer: Optimizer) -> list[str]:
    """Groups whose decoupled weight decay, ``p *= 1 - lr * weight_decay``, rounds to the weight itself."""
    told = []
    for number, group in enumerate(optimizer.param_groups):
        decay = group.get("weight_decay") or 0.0
        if not decay or not group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW)):
            continue
        step = float(group["lr"]) * float(decay)
        dtypes = {str(p.dtype).removeprefix("torch.") for p in group["params"]} & {"float16", "bfloat16"}
        told += [
            f"{type(optimizer).__name__}, group {number}, weight_decay={decay:g} in {dtype}: a step of it is "
            f"{step:.3g} of the weight, less than half a unit in its last place, and does nothing"
            for dtype in sorted(dtypes)
            if step < FORMATS[dtype].unit_roundoff / 2.0
        ]
    return told
