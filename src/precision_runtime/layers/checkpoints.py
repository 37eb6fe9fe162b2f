"""State of quantised layers out of, and into, models that are not quantised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from precision_runtime.layers.base import QuantizedLayer

_PACKED = "weight.quant_state.bitsandbytes__"


def dequantized_state_dict(source: nn.Module | Mapping[str, Any]) -> dict[str, Any]:
    """The state of a quantised model, or a state_dict of one, with plain float32 weights: code times scale.

    Everything else is as it was stored. It loads into a plain model with ``strict=True``, and into a quantised one,
    which quantises again.
    """
    if isinstance(source, nn.Module):
        state: dict[str, Any] = source.state_dict()
        for path, layer in source.named_modules(remove_duplicate=False):
            if isinstance(layer, QuantizedLayer) and not layer.weight.is_floating_point():
                _replace(state, f"{path}." if path else "", layer.dequantized(stored=True))
        return state
    state = dict(source)
    for prefix, storage in quantized_entries(state).items():
        entries = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        _replace(state, prefix, _values(entries, storage))
    return state


def load_state_dict(model: nn.Module, state: Mapping[str, Any], strict: bool = True) -> Any:
    """Load a state_dict of quantised layers into ``model``, plain or quantised, exactly, and return what torch returns.

    An nn.Linear (or nn.Embedding) whose weight is stored quantised becomes a quantised layer; ``setup`` in the mode,
    before or afterwards, leaves it so. Names and shapes are checked as torch checks them.
    """
    from precision_runtime.layers.swap import PACKED, swap

    parts = dict(model.named_modules(remove_duplicate=False))
    shared: dict[int, nn.Parameter] = {}
    for prefix, storage in quantized_entries(state).items():
        layer = parts.get(prefix.removesuffix("."))
        if type(layer) in (nn.Linear, nn.Embedding):
            assert layer is not None
            weight = layer._parameters["weight"]
            assert weight is not None
            if id(weight) not in shared:  # its values do not matter: they are loaded next
                shared[id(weight)] = PACKED[storage].quantized(torch.zeros_like(weight, requires_grad=False), storage)
            swap(layer, storage, torch.bfloat16, shared[id(weight)])
    return model.load_state_dict(state, strict=strict)


def quantized_entries(state: Mapping[str, Any]) -> dict[str, str]:
    """The prefix of each quantised weight in a state_dict ("blocks.0.fc."), and how it is stored."""
    found = {}
    for key in state:
        if _PACKED in key:
            prefix, _, kind = key.partition(_PACKED)
            found[prefix] = f"{kind}{'-dq' if f'{prefix}weight.nested_absmax' in state else ''}"
        elif key == "SCB" or key.endswith(".SCB"):
            found[key.removesuffix("SCB")] = "int8"
    return found


def _values(entries: dict[str, Any], storage: str) -> torch.Tensor:
    from precision_runtime.layers.library import bnb
    from precision_runtime.layers.packing import unpack4, unpack8

    codes = entries["weight"]
    if storage == "int8":
        return unpack8(codes, entries["SCB"], torch.float32)
    statistics = {k.removeprefix("weight."): v for k, v in entries.items() if k.startswith("weight.")}
    return unpack4(codes, bnb.functional.QuantState.from_dict(statistics, device=codes.device), torch.float32)


def _replace(state: dict[str, Any], prefix: str, values: torch.Tensor) -> None:
    for key in [
        k for k in state if k.startswith(f"{prefix}weight.") or k in (f"{prefix}SCB", f"{prefix}weight_format")
    ]:
        del state[key]
    state[f"{prefix}weight"] = values
