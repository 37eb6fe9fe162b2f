"""What quantisation saves and costs: bits per parameter as stored, and the loss of the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from precision_runtime.layers.base import QuantizedLayer


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantised layers of ``model`` by their names; "" is the model itself."""
    return {name: part for name, part in model.named_modules() if isinstance(part, QuantizedLayer)}


def bits_per_parameter(model: nn.Module) -> float:
    """Bits that the weights of all quantised layers take, with scales and tables, for each weight that they stand for.

    A weight that two layers share counts once. NaN where there is no quantised layer. In theory 4.5 for nf4 and fp4
    (a float32 scale for 64 weights), 4 + 8/64 + 32/(64 * 256) = 4.127 for nf4-dq and fp4-dq, 8 + 32/in_features for
    int8; tables of 16 (and 256) values add to that in small layers.
    """
    layers = {id(layer.weight): layer for layer in quantized_layers(model).values()}.values()
    weights = sum(math.prod(layer.shape) for layer in layers)
    return sum(layer.stored_bits() for layer in layers) / weights if weights else math.nan


def bits_by_layer(model: nn.Module) -> dict[str, float]:
    """``bits_per_parameter`` of each quantised layer."""
    return {name: bits_per_parameter(layer) for name, layer in quantized_layers(model).items()}


def quantization_loss(model: nn.Module, originals: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """For each quantised layer: |stored values - original weight| / |original weight|, in float64 (L2 norms).

    ``originals`` has the weights from before, by their names in a state_dict ("fc.weight"); a layer that it lacks is
    left out. 0.0 where the original is all zeros and the stored weight is, too.
    """
    losses = {}
    for name, layer in quantized_layers(model).items():
        original = originals.get(f"{name}.weight" if name else "weight")
        if original is not None:
            true = original.detach().to(torch.float64)
            error = torch.linalg.vector_norm(layer.dequantized(stored=True).to(true) - true)
            size = torch.linalg.vector_norm(true)
            losses[name] = float(error / size) if size else float(error)
    return losses
