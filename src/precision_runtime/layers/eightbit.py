"""Layers whose weight is stored in 8 bits (int8), or rounded to 8 bits for each product (int8-training).

In train() on a CPU the weight alone is rounded, in eval() and on GPUs the inputs are, too, as bitsandbytes does.
int8-training rounds its weight anew in every forward: bitsandbytes keeps the codes between calls, which are those from
before the optimizer's last step in the first eval(), and for ever where gradients are set to 0 and not to None.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn import functional

from precision_runtime.errors import ConfigurationError
from precision_runtime.layers.base import ELSEWHERE, QuantizedLayer, check_shape, like, rows_of
from precision_runtime.layers.library import bnb
from precision_runtime.layers.packing import pack8, unpack8
from precision_runtime.layers.products import DequantizedProduct, Int8Product, rounded_rows
from precision_runtime.operands import heard, tell

# Columns of inputs that reach it are multiplied in the compute dtype (LLM.int8(), section 3.2). Without it the largest
# value of a row decides how finely the others are rounded: ten times the error on activations with outliers.
THRESHOLD = 6.0


class Packed8(bnb.nn.Int8Params):
    """8-bit codes as a parameter, with the scales of its rows. Unlike its base it survives pickling."""

    @classmethod
    def of(cls, codes: torch.Tensor, scales: torch.Tensor) -> Packed8:
        """The parameter for what ``packing.pack8`` returns."""
        parameter: Packed8 = cls(codes, requires_grad=False, has_fp16_weights=False, CB=None, SCB=scales)
        return parameter

    @classmethod
    def quantized(cls, weight: torch.Tensor, storage: str) -> Packed8:
        """The parameter for a floating weight."""
        return cls.of(*pack8(weight))

    def with_data(self, codes: torch.Tensor) -> Packed8:
        """The same with other codes, on another device for instance."""
        return type(self).of(codes, self.SCB)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self).of, (self.data, self.SCB)


class _Layer8(QuantizedLayer):
    """What the layers stored in 8 bits share."""

    @property
    def shape(self) -> tuple[int, ...]:
        """See ``QuantizedLayer.shape``."""
        return tuple(self.weight.shape)

    def dequantized(self, *, stored: bool = False) -> torch.Tensor:
        """See ``QuantizedLayer.dequantized``; whole-number products round no weight."""
        dtype = torch.float32 if stored or self._rounds_inputs() else self.compute_dtype
        return unpack8(self.weight.data, self.weight.SCB, dtype).to(torch.float32)

    def statistics(self) -> dict[str, torch.Tensor]:
        """See ``QuantizedLayer.statistics``: what bitsandbytes' own layers save; 0 stands for rows in their order."""
        if self.weight.is_floating_point():
            return {}
        return {"SCB": self.weight.SCB, "weight_format": torch.tensor(0, dtype=torch.uint8)}

    def kept(self) -> list[torch.Tensor]:
        """See ``QuantizedLayer.kept``."""
        return [self.weight.data, self.weight.SCB]

    def read(self, entries: dict[str, torch.Tensor]) -> None:
        """See ``QuantizedLayer.read``: codes with their scales, or a floating weight, which is quantised."""
        codes, scales, device = entries["weight"], entries.get("SCB"), self.weight.device
        if codes.is_floating_point():
            check_shape(codes.shape, self.shape)
            codes, scales = pack8(codes.to(device))
        elif codes.dtype is not torch.int8 or scales is None:
            raise ConfigurationError(f"these {codes.dtype} values are no int8 weight with its SCB; {ELSEWHERE}")
        elif int(entries.get("weight_format", torch.tensor(0))):
            raise ConfigurationError("these int8 values are in an order that only one kind of GPU reads")
        else:
            check_shape(codes.shape, self.shape)
            codes, scales = codes.to(device, copy=True), scales.to(device, copy=True)
        weight = self.weight
        weight.SCB = scales
        self._take(weight, codes)

    def follow(self, device: torch.device) -> None:
        """See ``QuantizedLayer.follow``."""
        scales = self.weight.SCB
        self.weight.SCB = torch.empty_like(scales, device=device) if scales.is_meta else scales.to(device)

    def _rounds_inputs(self) -> bool:
        return False


class Linear8(_Layer8, bnb.nn.Linear8bitLt):
    """nn.Linear with an 8-bit weight."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The product in ``compute_dtype`` or whole numbers, returned in the dtype of ``input``."""
        if self.weight.is_floating_point():
            return functional.linear(input, self.weight, self.bias)
        return _product(self, input, None, self.weight.data, self.weight.SCB)

    def _rounds_inputs(self) -> bool:
        return _rounds_inputs(self, self.weight.device)


class Linear8Training(QuantizedLayer, bnb.nn.Linear8bitLt):
    """nn.Linear with a floating weight that is trained, and rounded to 8 bits for each product."""

    @property
    def shape(self) -> tuple[int, ...]:
        """See ``QuantizedLayer.shape``."""
        return tuple(self.weight.shape)

    def dequantized(self, *, stored: bool = False) -> torch.Tensor:
        """See ``QuantizedLayer.dequantized``: the weight as the next product will round it."""
        dtype = torch.float32 if stored or _rounds_inputs(self, self.weight.device) else self.compute_dtype
        return unpack8(*pack8(self.weight), dtype).to(torch.float32)

    def statistics(self) -> dict[str, torch.Tensor]:
        """See ``QuantizedLayer.statistics``: none."""
        return {}

    def kept(self) -> list[torch.Tensor]:
        """See ``QuantizedLayer.kept``."""
        return [self.weight.data]

    def read(self, entries: dict[str, torch.Tensor]) -> None:
        """See ``QuantizedLayer.read``: a floating weight only."""
        weight = entries["weight"]
        if not weight.is_floating_point():
            raise ConfigurationError(f"int8-training has floating weights, these are {weight.dtype}; {ELSEWHERE}")
        check_shape(weight.shape, self.shape)
        with torch.no_grad():
            self.weight.copy_(weight)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The product in ``compute_dtype`` or whole numbers, returned in the dtype of ``input``."""
        weight = self.weight
        if weight.dtype is torch.float64:  # the audit's reference
            return functional.linear(input, weight, self.bias)
        return _product(self, input, weight, *pack8(weight))


class Embedding8(_Layer8, bnb.nn.Embedding8bit):
    """nn.Embedding with an 8-bit weight; only the rows that are asked for are dequantised."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The rows, in ``compute_dtype``."""
        weight = self.weight
        if weight.is_floating_point():
            return functional.embedding(input, weight, self.padding_idx)
        index = input.reshape(-1)
        return unpack8(weight.data[index], weight.SCB[index], self.compute_dtype).view(*input.shape, -1)


def _rounds_inputs(layer: Any, device: torch.device) -> bool:
    return not (layer.training and device.type in ("cpu", "xpu"))


def _product(
    layer: Any, input: torch.Tensor, weight: torch.Tensor | None, codes: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    rows, bias = rows_of(input, layer.compute_dtype), layer.bias
    if bias is not None:
        bias = bias.to(rows.dtype)
    if rows.numel() and _rounds_inputs(layer, rows.device):
        if heard():
            tell(layer, "input", rows, rounded_rows(rows, layer.state.threshold))
        product = Int8Product.apply(rows, weight, bias, codes, scales, layer.state.threshold)
    else:
        product = DequantizedProduct.apply(rows, weight, bias, partial(unpack8, codes, scales))
    return like(product, input)
