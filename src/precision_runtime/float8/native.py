"""FP8 layers of NVIDIA's transformer_engine, made from a model's own: used where a GPU has the kernels.

Thin on purpose: the library is imported when it is first needed, and every number is its own. What is added here makes
both paths take the same models: rows are filled up to what the kernels need, and with float64 weights a layer is plain.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from precision_runtime.errors import UnsupportedError
from precision_runtime.float8.recipes import Recipe

# What of torch's own bookkeeping goes over from a replaced layer to its successor: hooks, and whether it trains.
_KEPT = frozenset(name for name in vars(nn.Module()) if name == "training" or name.endswith("_hooks"))


def replace(root: nn.Module, layers: list[nn.Module], recipe: Recipe, device: torch.device) -> None:
    """Put NVIDIA's layers in the places of ``layers``, wherever ``root`` has them, around the same parameters.

    Raises ``UnsupportedError`` where ``root`` itself would have to be replaced: it has no place to be replaced in.
    """
    if any(layer is root for layer in layers):
        raise UnsupportedError(
            f"transformer_engine's layers replace others in the module that holds them, and {type(root).__name__} is "
            "the model itself; put it in a module, such as nn.Sequential(layer), or use accelerator='cpu', which "
            "emulates FP8"
        )
    made = {id(layer): _successor(layer, recipe, device) for layer in layers}
    for parent in root.modules():
        for name, child in parent._modules.items():
            if id(child) in made:
                parent._modules[name] = made[id(child)]


def context(recipe: Recipe) -> AbstractContextManager[Any]:
    """The library's region of FP8 arithmetic. ``fp8_autocast`` is the name that later releases warn about."""
    te = importlib.import_module("transformer_engine.pytorch")
    theirs = library_recipe(recipe)
    later = hasattr(te, "autocast")
    region: AbstractContextManager[Any] = (
        te.autocast(enabled=True, recipe=theirs) if later else te.fp8_autocast(enabled=True, fp8_recipe=theirs)
    )
    return region


@functools.cache
def library_recipe(recipe: Recipe) -> Any:
    """NVIDIA's object for ``recipe``. Raises ``UnsupportedError`` where the installed release cannot express it."""
    common = importlib.import_module("transformer_engine.common.recipe")
    name = type(recipe).__name__
    kind = getattr(common, name, None)
    if kind is None:
        raise UnsupportedError(f"the installed transformer_engine has no recipe {name}; install a later release")
    known = {f.name for f in dataclasses.fields(kind)}
    given, unknown = {}, []
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if field.name in known:
            given[field.name] = common.Format[value] if field.name == "fp8_format" else value
        elif value != field.default:
            unknown.append(f"{field.name}={value!r}")
    if unknown:
        raise UnsupportedError(
            f"the installed transformer_engine's {name} does not know {', '.join(unknown)}; install a later release"
        )
    theirs = kind(**given)
    power = getattr(recipe, "use_power_2_scales", not getattr(recipe, "use_f32_scales", True))
    for side in ("fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad"):
        # The class works these out from an environment variable, whatever its fields say.
        before = getattr(theirs, side, None)
        if before is not None and before.power_2_scale != power:
            setattr(theirs, side, dataclasses.replace(before, power_2_scale=power))
    return theirs


def _successor(layer: nn.Module, recipe: Recipe, device: torch.device) -> nn.Module:
    classes = _classes()
    weight: Any = layer.weight
    options = {"device": device if weight.device.type == "meta" or device.type == "cuda" else weight.device}
    if isinstance(layer, nn.Linear):
        new = classes["Float8Linear"](
            layer.in_features, layer.out_features, bias=layer.bias is not None, params_dtype=weight.dtype, **options
        )
        new.float8_rows = recipe.aligned
    else:
        new = classes["Float8LayerNorm"](layer.normalized_shape, eps=layer.eps, dtype=weight.dtype, **options)
    for name, parameter in layer._parameters.items():
        if parameter is not None:
            new._parameters[name] = parameter  # the same object: optimizers and tied weights keep it
    for name in _KEPT:
        vars(new)[name] = vars(layer)[name]
    result: nn.Module = new
    return result


@functools.cache
def _classes() -> dict[str, Any]:
    """NVIDIA's layers with what this file adds, by the names that pickle finds them under."""
    te = importlib.import_module("transformer_engine.pytorch")

    class Float8Linear(te.Linear):  # type: ignore[name-defined]
        """NVIDIA's Linear, whose input may have any number of rows."""

        float8_rows = 16

        def forward(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            """The layer."""
            if self.weight.dtype is torch.float64:
                return functional.linear(input, self.weight, self._parameters.get("bias"))
            count = math.prod(input.shape[:-1])
            if count % self.float8_rows == 0:
                return super().forward(input, *args, **kwargs)
            rows = functional.pad(input.reshape(count, -1), (0, 0, 0, -count % self.float8_rows))
            result = super().forward(rows, *args, **kwargs)
            return result[:count].view(*input.shape[:-1], -1)

    class Float8LayerNorm(te.LayerNorm):  # type: ignore[name-defined]
        """NVIDIA's LayerNorm."""

        def forward(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            """The layer."""
            if self.weight.dtype is torch.float64:
                return functional.layer_norm(input, self.weight.shape, self.weight, self.bias, self.eps)
            return super().forward(input, *args, **kwargs)

    found = {"Float8Linear": Float8Linear, "Float8LayerNorm": Float8LayerNorm}
    for name, kind in found.items():
        kind.__module__, kind.__qualname__ = __name__, name
    return found


def __getattr__(name: str) -> Any:
    if name in ("Float8Linear", "Float8LayerNorm"):
        return _classes()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
