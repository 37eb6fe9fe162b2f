"""transformer-engine and transformer-engine-float16: FP8 layers in place of nn.Linear and nn.LayerNorm."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from precision_runtime.accelerators import machine
from precision_runtime.casting import cast_module, kept_in_float32
from precision_runtime.errors import ConfigurationError
from precision_runtime.float8 import native
from precision_runtime.float8.layers import LAYERS, become_float8, is_float8
from precision_runtime.float8.recipes import NVFP4BlockScaling, parse_recipe
from precision_runtime.float8.regions import region
from precision_runtime.float8.shapes import refusal
from precision_runtime.setup.fastpath import leave_fast_path
from precision_runtime.setup.forwarding import PatchedForward, is_suspended
from precision_runtime.setup.islands import island_around, islands_in, plan_islands
from precision_runtime.setup.keeping import Island
from precision_runtime.setup.swapping import Swap, matching, swaps
from precision_runtime.strategies.half import HalfStrategy


@dataclass(frozen=True)
class Float8Strategy(HalfStrategy):
    """Swaps nn.Linear and nn.LayerNorm for FP8 layers; the rest is cast to the weights' dtype as in the true modes.

    A model that has FP8 layers already, ours or NVIDIA's, is taken as its author made it. ``native``: NVIDIA's library
    computes; otherwise the emulation does, and the same layers are swapped. Raises as ``parse_recipe`` does, and
    ``ConfigurationError`` for a recipe that takes another dtype.
    """

    native: bool = field(init=False, compare=False, default=False)

    def __post_init__(self) -> None:
        recipe = parse_recipe(self.options.recipe)
        object.__setattr__(self, "options", dataclasses.replace(self.options, recipe=recipe))
        super().__post_init__()
        if isinstance(recipe, NVFP4BlockScaling) and not recipe.disable_rht and self.dtype is not torch.bfloat16:
            raise ConfigurationError(
                f"NVFP4BlockScaling rotates bfloat16 tensors only, and {self.mode} has {self.mode.params} here. "
                "Use recipe={'recipe': 'NVFP4BlockScaling', 'disable_rht': True}, or weights_dtype='bfloat16'"
            )
        there = self.device.type == "cuda" and machine().emulation("cuda", type(recipe).__name__) is None
        object.__setattr__(self, "native", there)

    def swaps(self, module: nn.Module) -> list[Swap]:
        """See ``Strategy.swaps``."""
        return self._rows(module, self.options.ignore_modules, islands_in(module) or plan_islands(module, self))

    def convert(self, module: nn.Module) -> nn.Module:
        """See ``Strategy.convert``; again: nothing happens."""
        self.convert_all([module])
        return module

    def convert_all(self, modules: list[nn.Module]) -> None:
        """See ``Strategy.convert_all``."""
        for module in modules:
            patterns = self.options.ignore_modules
            if len(modules) > 1:
                patterns = matching(module, patterns)
            self._swap(module, [row.layer for row in self._rows(module, patterns, islands_in(module)) if row.swapped])
            cast_module(module, self.module_table)

    def _rows(self, module: nn.Module, patterns: tuple[str, ...], islands: list[Island]) -> list[Swap]:
        taken = next((name for name, part in module.named_modules() if is_float8(part)), None)
        kept = kept_in_float32(module, {self.dtype})

        def refuse(name: str, layer: nn.Module) -> str:
            if taken is not None:
                return f"the model has FP8 layers already ({taken!r}) and is taken as it was made"
            island = island_around(name, islands)
            if island is not None:
                return f"an FP32 island: {island.reason}"
            if any(id(p) in kept for p in layer._parameters.values()):
                return "the model declares that it needs float32"
            if "forward" in vars(layer) and not isinstance(vars(layer)["forward"], PatchedForward):
                return "its forward was replaced on the object and may read the weight"
            return refusal(layer, self.options.recipe)

        return [row for row in swaps(module, LAYERS, patterns, refuse) if not is_float8(row.layer)]

    def _swap(self, module: nn.Module, layers: list[nn.Module]) -> None:
        if self.native:
            native.replace(module, layers, self.options.recipe, self.device)
        else:
            for layer in layers:
                become_float8(layer, self.options.recipe)
        leave_fast_path(module, is_float8)

    def autocast(self) -> AbstractContextManager[Any]:
        """One step of delayed scaling: calls of a layer inside share their scales."""
        return native.context(self.options.recipe) if self.native and not is_suspended() else region()

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See ``Strategy.call``."""
        if self.native:
            with native.context(self.options.recipe):
                return super().call(function, args, kwargs)
        if torch.compiler.is_dynamo_compiling():  # the compiler leaves FP8 layers to Python, each a region of its own
            return super().call(function, args, kwargs)
        with region():
            return super().call(function, args, kwargs)
