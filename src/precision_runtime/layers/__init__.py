"""Quantised layers, and what can be asked of a model that has some. Importing it imports no optional package."""

from __future__ import annotations

from precision_runtime.layers.base import QuantizedLayer
from precision_runtime.layers.checkpoints import dequantized_state_dict, load_state_dict
from precision_runtime.layers.figures import bits_by_layer, bits_per_parameter, quantization_loss, quantized_layers

__all__ = [
    "QuantizedLayer",
    "bits_by_layer",
    "bits_per_parameter",
    "dequantized_state_dict",
    "load_state_dict",
    "quantization_loss",
    "quantized_layers",
]
