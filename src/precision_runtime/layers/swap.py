"""Give a layer a quantised class in place: name, identity, hooks, training flag and bias stay."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from precision_runtime.layers.base import QuantizedLayer
from precision_runtime.layers.eightbit import THRESHOLD, Embedding8, Linear8, Linear8Training, Packed8
from precision_runtime.layers.fourbit import Embedding4, Linear4, Packed4
from precision_runtime.layers.library import bnb

PACKED: Mapping[str, Any] = MappingProxyType(
    {**dict.fromkeys(("nf4", "nf4-dq", "fp4", "fp4-dq"), Packed4), "int8": Packed8}
)

_CLASSES = MappingProxyType(
    {
        (nn.Linear, Packed4): Linear4,
        (nn.Linear, Packed8): Linear8,
        (nn.Linear, None): Linear8Training,
        (nn.Embedding, Packed4): Embedding4,
        (nn.Embedding, Packed8): Embedding8,
    }
)


def swap(layer: nn.Module, storage: str, compute: torch.dtype, packed: nn.Parameter | None = None) -> QuantizedLayer:
    """Make ``layer``, an exact nn.Linear or nn.Embedding, a layer that stores its weight as ``storage``.

    ``packed`` is its weight quantised beforehand; None has it quantised now, or left floating for int8-training.
    """
    kind = PACKED.get(storage)
    target: Any = _CLASSES[type(layer), kind]
    if kind is not None:
        weight = layer._parameters["weight"]
        assert weight is not None
        layer._parameters["weight"] = kind.quantized(weight, storage) if packed is None else packed
    vars(layer).update(storage=storage, compute_dtype=compute, **_attributes(target, storage, compute))
    layer.__class__ = target
    assert isinstance(layer, QuantizedLayer)
    return layer


def _attributes(target: Any, storage: str, compute: torch.dtype) -> dict[str, Any]:
    """What bitsandbytes' own constructor would have set, for other libraries that read it."""
    if target is Linear4:
        return {"compute_type_is_set": True, "quant_storage": torch.uint8, "support_avx512bf16_for_cpu": False}
    if target in (Linear8, Linear8Training):
        state = bnb.MatmulLtState()
        state.threshold, state.has_fp16_weights = THRESHOLD, storage == "int8-training"
        return {"state": state, "index": None}
    return {"dtype": compute}
