"""Emulated FP8 layers. A layer becomes one by changing its class: name, hooks, parameters and identity stay."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.nn import functional

from precision_runtime.errors import ConfigurationError
from precision_runtime.float8 import history
from precision_runtime.float8.product import Product
from precision_runtime.float8.recipes import DelayedScaling, Recipe, parse_recipe
from precision_runtime.float8.regions import current, region
from precision_runtime.float8.schemes import Scheme, scheme_for

_SAVED = ("scale_fwd", "amax_history_fwd", "scale_bwd", "amax_history_bwd")


class Float8Linear(nn.Linear):
    """``nn.Linear`` whose operands are rounded as ``recipe`` says. Made by ``become_float8``.

    Takes inputs of any floating dtype and any shape; computes in float32 from rounded operands; gives the dtype of its
    weight. With a float64 weight it is a plain ``nn.Linear``, and its memory is left alone: so runs a reference.
    ``scaling`` is the memory of delayed scaling (``history``), empty under other recipes.
    """

    recipe: Recipe
    scaling: history.Memory

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The layer."""
        weight = self.weight
        if weight.dtype is torch.float64 or not input.is_floating_point() or not input.numel():
            return functional.linear(input, weight, self.bias)
        if torch.compiler.is_dynamo_compiling():
            return _in_python(self, input)
        return self.multiplied(input)

    def multiplied(self, input: torch.Tensor) -> torch.Tensor:
        """The FP8 product, in a step of its own where no set-up model is running."""
        with contextlib.nullcontext() if current() else region():
            rows = input.reshape(-1, input.shape[-1])
            result = cast(torch.Tensor, Product.apply(rows, self.weight, self.bias, self))
        return result.view(*input.shape[:-1], -1)

    @property
    def ledger_dtype(self) -> dict[str, str] | None:
        """For a ledger, which sees float32 products: the formats that their operands were rounded to."""
        if self.weight.dtype is torch.float64:
            return None
        return dict(zip(("forward", "backward"), self.recipe.formats, strict=True))

    @property
    def scheme(self) -> Scheme:
        """How the recipe rounds."""
        return scheme_for(self.recipe)

    @property
    def delayed(self) -> DelayedScaling:
        """The recipe of a layer with a memory."""
        assert isinstance(self.recipe, DelayedScaling)
        return self.recipe

    def memory(self, device: torch.device) -> history.Memory:
        """``scaling``, on the device that the layer runs on; shapes that are tried on "meta" leave no trace in it."""
        if device.type == "meta":
            return history.fresh(self.delayed, device)
        if self.scaling["scale_fwd"].device != device:
            self.scaling.update({name: tensor.to(device) for name, tensor in self.scaling.items()})
        return self.scaling

    def get_extra_state(self) -> dict[str, Any]:
        """Scales, history and recipe, under NVIDIA's names, as tensors and builtins: loads with ``weights_only``."""
        state: dict[str, Any] = {"recipe": self.recipe.to_dict()}
        for name in _SAVED if self.scaling else ():
            state[name] = self.scaling[name].detach().cpu().clone()
            if name.startswith("scale_"):
                state[name.replace("scale_", "scale_inv_")] = state[name].reciprocal()
        return state

    def set_extra_state(self, state: object) -> None:
        """The inverse of ``get_extra_state``. Also takes the dict that NVIDIA's layers pickle, once it is unpickled.

        The layer keeps its own recipe; scales of a recipe without memory say nothing to it, and a history of another
        length is cut to its newest rows or filled up. Raises ``ConfigurationError`` for what it cannot read.
        """
        if isinstance(state, torch.Tensor) and not state.numel():
            state = {}  # what NVIDIA's layers save where they have no scales
        if not isinstance(state, Mapping):
            raise ConfigurationError(
                f"the scales of an FP8 layer are a dict with {', '.join(_SAVED)}; got {type(state).__name__}. NVIDIA's "
                "layers save a pickle in a byte tensor: where you trust its origin, put "
                "pickle.loads(bytes(state_dict[key])) in its place"
            )
        self.forget()
        if not self.scaling or not any(name in state for name in _SAVED):
            return
        missing = [name for name in _SAVED if name not in state]
        if missing:
            raise ConfigurationError(f"the saved scales of an FP8 layer lack {', '.join(missing)}")
        for name in _SAVED:
            value = state[name].to(self.scaling[name])
            if name.startswith("amax"):
                value = history.with_length(value, self.delayed.amax_history_len)
            if value.shape != self.scaling[name].shape:
                raise ConfigurationError(
                    f"{name} of an FP8 layer has shape {tuple(self.scaling[name].shape)}, saved: {tuple(value.shape)}"
                )
            self.scaling[name].copy_(value)
        self.scaling["scale_fwd_before"].copy_(self.scaling["scale_fwd"])

    def forget(self) -> None:
        """Start the memory of delayed scaling anew."""
        delayed = isinstance(self.recipe, DelayedScaling)
        self.scaling = history.fresh(self.delayed, _real(self.weight.device)) if delayed else {}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """A plain model's weights load as well: the layer then starts without history, whatever ``strict`` says."""
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        key = f"{prefix}_extra_state"
        if key not in state_dict:
            self.forget()
            missing_keys[:] = [name for name in missing_keys if name != key]

    def extra_repr(self) -> str:
        """The shape and the recipe."""
        return f"{super().extra_repr()}, recipe={type(self.recipe).__name__}"


class Float8LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` as it stands between FP8 layers: computed in float32, gradients too; result in the weight's
    dtype. Nothing in it is rounded to 8 bits. With float64 weights it is a plain ``nn.LayerNorm``.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The layer."""
        weight = self.weight
        if weight.dtype is torch.float64:
            return functional.layer_norm(input, self.normalized_shape, weight, self.bias, self.eps)
        return functional.layer_norm(
            input.float(), self.normalized_shape, weight.float(), self.bias.float(), self.eps
        ).to(weight.dtype)


@_disable_dynamo
def _in_python(layer: Float8Linear, input: torch.Tensor) -> torch.Tensor:
    """What a compiled model calls as it is: the layer notes magnitudes as it goes, which no graph would repeat."""
    return layer.multiplied(input)


LAYERS: Mapping[type[nn.Module], type[nn.Module]] = {nn.Linear: Float8Linear, nn.LayerNorm: Float8LayerNorm}


def become_float8(layer: nn.Module, recipe: object = None) -> nn.Module:
    """Make ``layer``, an exact ``nn.Linear`` or ``nn.LayerNorm``, an FP8 layer in place, and return it."""
    layer.__class__ = LAYERS[type(layer)]
    if isinstance(layer, Float8Linear):
        layer.recipe = parse_recipe(recipe)
        layer.forget()
    return layer


def is_float8(layer: nn.Module) -> bool:
    """Whether ``layer`` is one of ours or of NVIDIA's."""
    return isinstance(layer, tuple(LAYERS.values())) or any(
        kind.__module__.partition(".")[0] == "transformer_engine" for kind in type(layer).__mro__
    )


def without_scales(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A converted model's state for a plain model: ``plain.load_state_dict(without_scales(state))``.

    Leaves the FP8 layers' scales away, ours and NVIDIA's, which a plain ``nn.Linear`` refuses as an unexpected key;
    weights as they are.
    """
    return {name: value for name, value in state_dict.items() if not _is_scales(name, value)}


def _is_scales(name: str, value: object) -> bool:
    if name.rpartition(".")[2] != "_extra_state":
        return False
    if isinstance(value, torch.Tensor):
        return value.dtype is torch.uint8  # NVIDIA's: a pickle, or nothing
    return isinstance(value, Mapping) and "recipe" in value


def _real(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "meta" else device
