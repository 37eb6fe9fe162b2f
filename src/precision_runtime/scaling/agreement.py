"""Overflow is decided together: where parameters are sharded over processes, each holds only a part of a gradient.

A process that skips a step which the others take trains another model from then on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import distributed
from torch.optim import Optimizer

from precision_runtime.errors import ConfigurationError


def is_sharded(optimizer: Optimizer) -> bool:
    """Whether any parameter is a part of one that is spread over processes (FSDP1, FSDP2, tensor parallelism)."""
    return any(hasattr(p, "to_local") or _is_flat(p) for group in optimizer.param_groups for p in group["params"])


def _is_flat(parameter: torch.Tensor) -> bool:
    """Whether FSDP1 has it flattened: a plain tensor to look at, and only a part of the parameter."""
    return getattr(parameter, "_is_flat_param", False) or getattr(parameter, "_fsdp_flattened", False)


def refuse_flat(parameters: Iterable[torch.Tensor]) -> None:
    """Raise ``ConfigurationError`` where a norm of these gradients would be that of one process's part."""
    if any(map(_is_flat, parameters)):
        raise ConfigurationError(
            "these parameters are sharded by FSDP1, and the norm of the part held here is not their norm: call "
            "runtime.scaler.unscale(optimizer), then the model's own clip_grad_norm_(max_norm). FSDP2 "
            "(fully_shard) has no such limit."
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
