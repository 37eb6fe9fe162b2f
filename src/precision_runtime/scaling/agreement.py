"""Overflow is decided together: where parameters are sharded over processes, each holds only a part of a gradient.

A process that skips a step which the others take trains another model from then on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed
from torch.optim import Optimizer


def is_sharded(optimizer: Optimizer) -> bool:
    """Whether any parameter is a part of one that is spread over processes (FSDP1, FSDP2, tensor parallelism)."""
    return any(
        hasattr(p, "to_local") or getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False)
        for group in optimizer.param_groups
        for p in group["params"]
    )


def anyone(mine: bool, optimizer: Optimizer, group: Any, device: torch.device) -> bool:
    """Whether any process of ``group`` says yes; all of its processes must ask. Without a group: all processes, where
    the parameters of ``optimizer`` are sharded, and this one alone where they are not.

    Data-parallel gradients (DDP) are averaged before anyone looks: all processes see the same inf without asking.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return mine
    if group is None and not is_sharded(optimizer):
        return mine
    flag = torch.tensor(float(mine), device=device)
    distributed.all_reduce(flag, op=distributed.ReduceOp.MAX, group=group)
    return bool(flag.item())
