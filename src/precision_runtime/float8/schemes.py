"""What each recipe makes of the three products of a layer, y = x w^T, dx = g w, dw = g^T x.

``forward`` gives the operands of the first product and what backward needs of them; ``backward`` gives those of the
second, and those of the third. With one scale per tensor, a rounded tensor serves in two products. Blocks lie along the
dimension that a product sums over, so a tensor with blocks is rounded anew for each product, from its full precision.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from precision_runtime.float8 import hadamard, history, regions
from precision_runtime.float8.quantizing import (
    Operand,
    by_blocks,
    by_microscaling,
    by_nvfp4,
    by_tensor,
    largest_magnitude,
    scale_for,
)
from precision_runtime.float8.recipes import (
    DelayedScaling,
    Float8BlockScaling,
    Float8CurrentScaling,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
    Recipe,
)
from precision_runtime.float8.shares import count, watched
from precision_runtime.formats import FORMATS, Format
from precision_runtime.operands import heard, tell

if TYPE_CHECKING:
    from precision_runtime.float8.layers import Float8Linear

Pair = tuple[Operand, Operand]
Saved = tuple[torch.Tensor, ...]


class Scheme(ABC):
    """The operands of a recipe. Holds no state: what changes is the layer's."""

    def __init__(self, recipe: Recipe) -> None:
        forward, backward = recipe.formats
        self.forward_format: Format = FORMATS[forward]
        self.backward_format: Format = FORMATS[backward]

    @abstractmethod
    def forward(self, layer: Float8Linear, x: torch.Tensor, weight: torch.Tensor) -> tuple[Pair, Saved]:
        """(x, w), and what backward needs."""

    @abstractmethod
    def backward(
        self, layer: Float8Linear, gradient: torch.Tensor, saved: Saved, needs_x: bool, needs_weight: bool
    ) -> tuple[Pair | None, Pair | None]:
        """(g, w^T) for the input's gradient and (g^T, x^T) for the weight's, each where it is needed."""

    def _counted(
        self, layer: Float8Linear, name: str, operand: Operand, form: Format, before: torch.Tensor | None
    ) -> Operand:
        if watched():
            count(layer, name, operand.scaled, operand.values, form)
        if before is not None and heard():
            tell(layer, name, before, operand.tensor, operand.scaled.abs() > form.max)
        return operand


class CurrentScheme(Scheme):
    """``Float8CurrentScaling``: a scale from the tensor itself."""

    def __init__(self, recipe: Float8CurrentScaling) -> None:
        super().__init__(recipe)
        self.power_of_two = recipe.use_power_2_scales

    def forward(self, layer: Float8Linear, x: torch.Tensor, weight: torch.Tensor) -> tuple[Pair, Saved]:
        """See ``Scheme.forward``. The numbers are saved in bfloat16, which holds FP8 exactly in half the space."""
        scales = self.forward_scales(layer, x, weight)
        operands = [
            self._counted(layer, name, by_tensor(tensor, self.forward_format, scale), self.forward_format, tensor)
            for name, tensor, scale in zip(("input", "weight"), (x, weight), scales, strict=True)
        ]
        saved = [t for o in operands for t in (o.values.bfloat16(), o.factor) if t is not None]
        return (operands[0], operands[1]), tuple(saved)

    def backward(
        self, layer: Float8Linear, gradient: torch.Tensor, saved: Saved, needs_x: bool, needs_weight: bool
    ) -> tuple[Pair | None, Pair | None]:
        """See ``Scheme.backward``."""
        x, x_factor, weight, weight_factor = saved
        scale = self.backward_scale(layer, gradient)
        form = self.backward_format
        g = self._counted(layer, "gradient", by_tensor(gradient, form, scale), form, gradient)
        return (
            (g, _stored(weight, weight_factor)) if needs_x else None,
            (_transposed(g), _stored(x, x_factor)) if needs_weight else None,
        )

    def forward_scales(
        self, layer: Float8Linear, x: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The scales of x and w."""
        form, power = self.forward_format, self.power_of_two
        return scale_for(largest_magnitude(x), form, power), scale_for(largest_magnitude(weight), form, power)

    def backward_scale(self, layer: Float8Linear, gradient: torch.Tensor) -> torch.Tensor:
        """The scale of g."""
        return scale_for(largest_magnitude(gradient), self.backward_format, self.power_of_two)


class DelayedScheme(CurrentScheme):
    """``DelayedScaling``: scales from the steps before, and a note of this one."""

    def __init__(self, recipe: DelayedScaling) -> None:
        Scheme.__init__(self, recipe)

    def forward_scales(
        self, layer: Float8Linear, x: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The scales of x and w as the history has them."""
        memory, region = layer.memory(x.device), regions.current()
        if region is not None and region.training and memory is layer.scaling:
            for column, tensor in ((history.INPUT, x), (history.WEIGHT, weight)):
                history.collect(memory, "fwd", column, largest_magnitude(tensor))
            region.touch(layer)
        again = regions.recomputing() and not (region is not None and region.touched(layer))
        scale = memory["scale_fwd_before" if again else "scale_fwd"].clone()
        return scale[history.INPUT], scale[history.WEIGHT]

    def backward_scale(self, layer: Float8Linear, gradient: torch.Tensor) -> torch.Tensor:
        """The scale of g as the history has it."""
        memory = layer.memory(gradient.device)
        history.collect(memory, "bwd", history.GRADIENT, largest_magnitude(gradient))
        regions.after_backward(layer)
        return memory["scale_bwd"][history.GRADIENT].clone()


class BlockScheme(Scheme):
    """Recipes with blocks. The tensors themselves are saved: backward rounds them along another dimension."""

    def forward(self, layer: Float8Linear, x: torch.Tensor, weight: torch.Tensor) -> tuple[Pair, Saved]:
        """See ``Scheme.forward``."""
        form = self.forward_format
        operands = (
            self._counted(layer, "input", self.quantized(x, "x", form, 1), form, x),
            self._counted(layer, "weight", self.quantized(weight, "w", form, 1), form, weight),
        )
        return operands, (x, weight)

    def backward(
        self, layer: Float8Linear, gradient: torch.Tensor, saved: Saved, needs_x: bool, needs_weight: bool
    ) -> tuple[Pair | None, Pair | None]:
        """See ``Scheme.backward``. The input's gradient sums over the outputs, the weight's over the rows."""
        x, weight = saved
        forward, backward = self.forward_format, self.backward_format
        first = second = None
        if needs_x:
            first = self.quantized(gradient, "grad", backward, 1), self.quantized(weight, "w", forward, 0)
            self._counted(layer, "gradient", first[0], backward, gradient)
        if needs_weight:
            turned = self.turned(gradient)
            g = self.quantized(turned, "grad", backward, 0)
            if first is None:  # nobody could place what a rotated tensor lost
                self._counted(layer, "gradient", g, backward, gradient if turned is gradient else None)
            second = _transposed(g), self.quantized(self.turned(x), "x", forward, 0)
        return first, second

    @abstractmethod
    def quantized(self, matrix: torch.Tensor, role: str, form: Format, along: int) -> Operand:
        """``matrix`` in its role: "x", "w" or "grad". The product sums over its dimension ``along``, 0 or 1."""

    def turned(self, matrix: torch.Tensor) -> torch.Tensor:
        """An operand of the weight's gradient before it is rounded."""
        return matrix


def _block(along: int, length: int, across: int) -> tuple[int, int]:
    """Rows and columns of a block that is ``length`` long in dimension ``along``."""
    return (across, length) if along == 1 else (length, across)


class Float8Blocks(BlockScheme):
    """``Float8BlockScaling``."""

    def __init__(self, recipe: Float8BlockScaling) -> None:
        super().__init__(recipe)
        self.power_of_two = not recipe.use_f32_scales
        self.across = {
            role: 128 if getattr(recipe, f"{role}_block_scaling_dim") == 2 else 1 for role in ("x", "w", "grad")
        }

    def quantized(self, matrix: torch.Tensor, role: str, form: Format, along: int) -> Operand:
        """See ``BlockScheme.quantized``."""
        return by_blocks(matrix, form, _block(along, 128, self.across[role]), self.power_of_two)


class Microscaling(BlockScheme):
    """``MXFP8BlockScaling``."""

    def __init__(self, recipe: MXFP8BlockScaling) -> None:
        super().__init__(recipe)
        self.across = {"x": 1, "w": 32 if recipe.enable_2d_quantization else 1, "grad": 1}

    def quantized(self, matrix: torch.Tensor, role: str, form: Format, along: int) -> Operand:
        """See ``BlockScheme.quantized``."""
        return by_microscaling(matrix, form, _block(along, 32, self.across[role]))


class Float4Blocks(BlockScheme):
    """``NVFP4BlockScaling``."""

    def __init__(self, recipe: NVFP4BlockScaling) -> None:
        super().__init__(recipe)
        self.rotates = not recipe.disable_rht
        self.by_chance = not recipe.disable_stochastic_rounding
        self.across = {"x": 1, "w": 1 if recipe.disable_2d_quantization else 16, "grad": 1}

    def quantized(self, matrix: torch.Tensor, role: str, form: Format, along: int) -> Operand:
        """See ``BlockScheme.quantized``."""
        return by_nvfp4(matrix, _block(along, 16, self.across[role]), self.by_chance and role == "grad")

    def turned(self, matrix: torch.Tensor) -> torch.Tensor:
        """Rotated along the rows, filled up with zeros to whole blocks: the fill takes part and has to stay."""
        if not self.rotates:
            return matrix
        return hadamard.rotated(functional.pad(matrix.float(), (0, 0, 0, -len(matrix) % hadamard.SIZE)))


_SCHEMES: dict[type[Recipe], Callable[..., Scheme]] = {
    DelayedScaling: DelayedScheme,
    Float8CurrentScaling: CurrentScheme,
    Float8BlockScaling: Float8Blocks,
    MXFP8BlockScaling: Microscaling,
    NVFP4BlockScaling: Float4Blocks,
}


@functools.cache
def scheme_for(recipe: Recipe) -> Scheme:
    """The scheme of ``recipe``."""
    return _SCHEMES[type(recipe)](recipe)


def _stored(values: torch.Tensor, factor: torch.Tensor) -> Operand:
    """A saved operand, for a product that sums over its first dimension."""
    wide = values.float()
    return Operand(wide, factor, wide, wide)


def _transposed(operand: Operand) -> Operand:
    return Operand(operand.values.t(), operand.factor, operand.scaled.t(), operand.codes.t())
