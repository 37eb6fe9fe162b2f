"""Which layers FP8 kernels take: the same answer where the mode is emulated, so that it does not change with the GPU.

NVIDIA's kernels need the features of a layer, and the rows of its input, to be multiples of a number that the recipe
sets (16; 32 and 128 with blocks). A layer with other features stays as it is, with the reason; rows are filled up with
zeros, which change no scale and no result, and cut off again.
"""

from __future__ import annotations

from torch import nn

from precision_runtime.float8.recipes import Recipe


def refusal(layer: nn.Module, recipe: Recipe) -> str:
    """Why ``layer``, an ``nn.Linear`` or ``nn.LayerNorm``, cannot be an FP8 layer; empty where it can."""
    return _linear(layer, recipe) if isinstance(layer, nn.Linear) else _layer_norm(layer)


def _linear(layer: nn.Linear, recipe: Recipe) -> str:
    number = recipe.aligned
    wrong = [
        f"{name}={size}"
        for name, size in (("in_features", layer.in_features), ("out_features", layer.out_features))
        if size % number or not size
    ]
    if wrong:
        return f"FP8 products under {type(recipe).__name__} take multiples of {number}; it has {' and '.join(wrong)}"
    if layer._parameters.get("weight") is None:
        return "its weight is computed at each call (a reparametrisation), not a parameter"
    if layer.weight.is_complex():
        return "its weight is complex"
    return ""


def _layer_norm(layer: nn.Module) -> str:
    missing = [name for name in ("weight", "bias") if layer._parameters.get(name) is None]
    return f"it has no {' and no '.join(missing)}, which NVIDIA's LayerNorm always has" if missing else ""
