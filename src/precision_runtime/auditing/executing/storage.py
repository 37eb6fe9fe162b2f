"""What storing weights, or computing, in 8 or 4 bits costs by itself: figures of a report, no part of the judgement."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from precision_runtime.auditing.executing.runs import Run
from precision_runtime.auditing.executing.worlds import Worlds
from precision_runtime.layers import QuantizedLayer, bits_per_parameter
from precision_runtime.modes import Mode
from precision_runtime.record import Layer


def watching(mode: Mode) -> AbstractContextManager[Any]:
    """Counts underflow and saturation in FP8 layers inside; gives None in other modes."""
    if mode.family != "float8":
        return contextlib.nullcontext()
    from precision_runtime.float8 import watching as shares

    return shares()


def rounded_layers(names: Mapping[str, nn.Module], mode: Mode, shares: Any) -> list[Layer]:
    """One row for each FP8 layer that ran."""
    if shares is None:
        return []
    rows = []
    for name, module in names.items():
        counted = shares.of(module)
        if counted:
            under = {tensor: share.underflow_share for tensor, share in counted.items()}
            over = {tensor: share.saturation_share for tensor, share in counted.items()}
            rows.append(Layer(name, mode.products, underflow=under, saturation=over))
    return rows


def stored_layers(worlds: Worlds) -> tuple[list[Layer], dict[str, float]]:
    """One row for each quantised layer, in the mode's own world, and figures of them all.

    A layer's loss is known where the weight from before is. A weight that layers share counts once in the figures.
    """
    rows, layers = [], {}
    for name, module in worlds.names.items():
        if isinstance(module, QuantizedLayer):
            before = worlds.unquantized.get(id(module.weight))
            loss = None if before is None else relative_error(module.dequantized(stored=True), before)
            rows.append(Layer(name, module.storage, bits_per_parameter(module), loss))
            layers[id(module.weight)] = module
    return rows, {"bits_per_parameter": bits_per_parameter(nn.ModuleList(layers.values()))} if layers else {}


def output_loss(quantized: Run, original: Run) -> float | None:
    """How far the outputs of one FP64 run are from another's, relative to those; None without floating outputs."""
    theirs = dict(original.outputs)
    pairs = [(t, theirs[p]) for p, t in quantized.outputs if p in theirs and t.is_floating_point()]
    pairs = [(a, b) for a, b in pairs if a.shape == b.shape and bool(a.isfinite().all()) and bool(b.isfinite().all())]
    if not pairs:
        return None
    return relative_error(torch.cat([a.flatten() for a, _ in pairs]), torch.cat([b.flatten() for _, b in pairs]))


def relative_error(value: torch.Tensor, true: torch.Tensor) -> float:
    """|value - true| / |true|, in float64 (L2 norms); the error itself where ``true`` is all zeros."""
    true = true.to(torch.float64)
    error, size = torch.linalg.vector_norm(value.to(true) - true), torch.linalg.vector_norm(true)
    return float(error / size) if size else float(error)
