"""Layers whose weight is stored in 4 bits: nf4, fp4, and both with doubly quantised scales.

They are bitsandbytes' own layers, down to the parameter class and the keys of a state_dict, with another forward: on a
CPU, bitsandbytes repacks weights for its fastest kernel at the first call without gradients, which rounds the scales to
bfloat16 for good and takes no layer whose outputs are not a multiple of 32; and its dequantised values are wrong where
inputs are no multiple of 64. Here the stored values never change, and products are those of the values.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn import functional

from precision_runtime.errors import ConfigurationError
from precision_runtime.layers.base import ELSEWHERE, QuantizedLayer, check_shape, like, rows_of
from precision_runtime.layers.library import bnb
from precision_runtime.layers.packing import pack4, scales4, unpack4, whole_blocks
from precision_runtime.layers.products import DequantizedProduct


class Packed4(bnb.nn.Params4bit):
    """4-bit codes as a parameter. Unlike its base it survives pickling and does not point at a layer."""

    @classmethod
    def of(cls, codes: torch.Tensor, state: Any) -> Packed4:
        """The parameter for what ``packing.pack4`` returns."""
        parameter: Packed4 = cls(
            codes, requires_grad=False, quant_state=state, blocksize=state.blocksize, compress_statistics=state.nested,
            quant_type=state.quant_type, quant_storage=codes.dtype, bnb_quantized=True,
        )  # fmt: skip
        return parameter

    @classmethod
    def quantized(cls, weight: torch.Tensor, storage: str) -> Packed4:
        """The parameter for a floating weight."""
        return cls.of(*pack4(weight, storage))

    def with_data(self, codes: torch.Tensor) -> Packed4:
        """The same with other codes, on another device for instance."""
        return type(self).of(codes, self.quant_state)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self).of, (self.data, self.quant_state)


class _Layer4(QuantizedLayer):
    """What the 4-bit layers share."""

    @property
    def quant_state(self) -> Any:
        """How the weight is stored, in the words of bitsandbytes."""
        return self.weight.quant_state

    @property
    def shape(self) -> tuple[int, ...]:
        """See ``QuantizedLayer.shape``."""
        return tuple(self.quant_state.shape)

    def dequantized(self, *, stored: bool = False) -> torch.Tensor:
        """See ``QuantizedLayer.dequantized``."""
        dtype = torch.float32 if stored else self.compute_dtype
        return unpack4(self.weight.data, self.quant_state, dtype).to(torch.float32)

    def statistics(self) -> dict[str, torch.Tensor]:
        """See ``QuantizedLayer.statistics``: what bitsandbytes' own layers save."""
        if self.weight.is_floating_point():
            return {}
        return {f"weight.{name}": value for name, value in self.quant_state.as_dict(packed=True).items()}

    def kept(self) -> list[torch.Tensor]:
        """See ``QuantizedLayer.kept``."""
        state = self.quant_state
        outer = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
        return [self.weight.data, state.absmax, state.code, *outer]

    def read(self, entries: dict[str, torch.Tensor]) -> None:
        """See ``QuantizedLayer.read``: codes with their statistics, or a floating weight, which is quantised."""
        device = self.weight.device
        codes = entries["weight"]
        if codes.is_floating_point():
            check_shape(codes.shape, self.shape)
            self._settle(*pack4(codes.to(device), self.storage))
            return
        statistics = {k.removeprefix("weight."): v for k, v in entries.items() if k != "weight"}
        if not any(k.startswith("quant_state.bitsandbytes__") for k in statistics):
            raise ConfigurationError(
                f"these {codes.dtype} values come without the statistics of a 4-bit weight; {ELSEWHERE}"
            )
        state = bnb.functional.QuantState.from_dict(statistics, device=device)
        storage = f"{state.quant_type}{'-dq' if state.nested else ''}"
        if storage != self.storage:
            raise ConfigurationError(f"these values are stored as {storage}, this layer is {self.storage}; {ELSEWHERE}")
        check_shape(state.shape, self.shape)
        self._settle(codes.to(device, copy=True), state)

    def follow(self, device: torch.device) -> None:
        """See ``QuantizedLayer.follow``."""
        state = self.quant_state
        holders = [(state, "absmax"), (state, "code")]
        if state.nested:
            holders += [(state, "offset"), (state.state2, "absmax"), (state.state2, "code")]
        for holder, name in holders:
            value = getattr(holder, name)
            setattr(holder, name, torch.empty_like(value, device=device) if value.is_meta else value.to(device))

    def _settle(self, codes: torch.Tensor, state: Any) -> None:
        weight = self.weight
        weight.quant_state = state
        self._take(weight, codes)


class Linear4(_Layer4, bnb.nn.Linear4bit):
    """nn.Linear with a 4-bit weight."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The product in ``compute_dtype``, returned in the dtype of ``input``."""
        weight, bias = self.weight, self.bias
        if weight.is_floating_point():
            return functional.linear(input, weight, bias)
        rows = rows_of(input, self.compute_dtype)
        if bias is not None:
            bias = bias.to(rows.dtype)
        if not whole_blocks(weight.quant_state.shape):
            dequantize = partial(unpack4, weight.data, weight.quant_state)
            return like(DequantizedProduct.apply(rows, None, bias, dequantize), input)
        return like(bnb.matmul_4bit(rows, weight.data, quant_state=weight.quant_state, bias=bias), input)


class Embedding4(_Layer4, bnb.nn.Embedding4bit):
    """nn.Embedding with a 4-bit weight; where rows are whole blocks, only those asked for are dequantised."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The rows, in ``compute_dtype``."""
        weight, width = self.weight, self.embedding_dim
        if weight.is_floating_point():
            return functional.embedding(input, weight, self.padding_idx)
        state = weight.quant_state
        if width % state.blocksize:
            return functional.embedding(input, unpack4(weight.data, state, self.compute_dtype), self.padding_idx)
        index = input.reshape(-1)
        codes = weight.data.view(self.num_embeddings, width // 2)[index]
        scales = scales4(state).view(self.num_embeddings, width // state.blocksize)[index]
        rows: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            codes.view(-1, 1), scales.view(-1), state.blocksize, state.quant_type, (len(index), width),
            self.compute_dtype,
        )  # fmt: skip
        return rows.view(*input.shape, width)
