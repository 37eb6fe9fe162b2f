"""The memory of delayed scaling: scales, and the largest magnitudes of the steps before.

A layer keeps it in a plain dict of float32 tensors, under the names that NVIDIA's layers use in checkpoints:
``scale_fwd`` and ``amax_history_fwd`` for (input, weight, output), ``scale_bwd`` and ``amax_history_bwd`` for (gradient
of the output, gradient of the input); columns of outputs and input gradients are never used, since those are not
rounded. Row 0 of a history collects the present step, the rows below it go from the oldest to the newest step.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from precision_runtime.float8.quantizing import quotient
from precision_runtime.float8.recipes import DelayedScaling
from precision_runtime.formats import FORMATS

INPUT, WEIGHT = 0, 1  # columns of *_fwd
GRADIENT = 0  # column of *_bwd
_COLUMNS = {"fwd": 3, "bwd": 2}
_LARGEST = FORMATS["float32"].max

Memory = dict[str, torch.Tensor]


def fresh(recipe: DelayedScaling, device: torch.device) -> Memory:
    """No history yet: every scale is 1. ``scale_fwd_before`` is what the last training forward was computed with."""
    with torch.inference_mode(False):  # tensors made there could not be written to later
        memory = {
            name: value
            for side, columns in _COLUMNS.items()
            for name, value in (
                (f"scale_{side}", torch.ones(columns, device=device, dtype=torch.float32)),
                (
                    f"amax_history_{side}",
                    torch.zeros(recipe.amax_history_len, columns, device=device, dtype=torch.float32),
                ),
            )
        }
        return {**memory, "scale_fwd_before": memory["scale_fwd"].clone()}


def collect(memory: Memory, side: str, column: int, amax: torch.Tensor) -> None:
    """Note a magnitude of the present step. A layer that is called twice in a step notes the larger one."""
    row = memory[f"amax_history_{side}"][0]
    row[column] = torch.maximum(row[column], amax)


def step(memory: Memory, side: str, recipe: DelayedScaling) -> None:
    """End a step: new scales from the history, present step included, and the history moves on by one row.

    Where nothing was collected (or only zeros) the column stays as it is. A magnitude that is inf or NaN leaves the
    scale. A scale beyond float32 becomes float32's largest number.
    """
    history, scale = memory[f"amax_history_{side}"], memory[f"scale_{side}"]
    if side == "fwd":
        memory["scale_fwd_before"].copy_(scale)
    newest = history[0].clone()
    seen = newest != 0
    amax = history.amax(0) if recipe.amax_compute_algo == "max" else newest
    largest = FORMATS[recipe.formats[side == "bwd"]].max
    wanted = (quotient(largest, amax) / 2.0**recipe.margin).clamp(max=_LARGEST)
    scale.copy_(torch.where(seen & torch.isfinite(amax) & (amax > 0), wanted, scale))
    moved = torch.roll(history, -1, 0)
    moved[0] = 0
    if len(moved) > 1:
        moved[-1] = newest
    history.copy_(torch.where(seen, moved, history))


def agree(memories: Iterable[Memory], side: str) -> None:
    """Let all processes of the default group note the largest magnitude that any of them has seen in this step."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return
    rows = [memory[f"amax_history_{side}"][0] for memory in memories]
    if not rows:
        return
    together = torch.cat(rows)
    distributed.all_reduce(together, op=distributed.ReduceOp.MAX)
    for row, agreed in zip(rows, together.split([len(row) for row in rows]), strict=True):
        row.copy_(agreed)


def with_length(history: torch.Tensor, length: int) -> torch.Tensor:
    """A loaded history in another recipe's length: the newest rows stay, older ones are zero where there were none."""
    present, past = history[:1], history[1:]
    past = past[max(0, len(past) - (length - 1)) :]
    missing = torch.zeros(length - 1 - len(past), history.shape[1], device=history.device, dtype=history.dtype)
    return torch.cat([present, missing, past])
