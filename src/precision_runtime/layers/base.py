"""What every quantised layer can do, whatever library computes its products. Imports no optional package."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from precision_runtime.errors import ConfigurationError


class QuantizedLayer(nn.Module):
    """A layer whose weight is stored in 4 or 8 bits, or rounded to 8 bits for each product.

    ``storage`` names the format ("nf4-dq"), ``compute_dtype`` is what inputs and weight are brought to for the product.
    Where the data of ``weight`` are exchanged for floating values of the original shape, the layer is a plain one in
    that dtype: a reference in float64 runs so, and putting the old data back puts the layer back.
    """

    storage: str
    compute_dtype: torch.dtype
    weight: Any
    bias: Any
    in_features: int  # of a linear layer
    num_embeddings: int  # of an embedding
    embedding_dim: int
    padding_idx: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that the stored one stands for."""
        raise NotImplementedError

    def dequantized(self, *, stored: bool = False) -> torch.Tensor:
        """The weight as float32, exactly the values that the product uses: rounded to ``compute_dtype`` where it is.

        ``stored=True`` gives code times scale, unrounded. In nf4 and fp4, quantising those again gives them again.
        """
        raise NotImplementedError

    def statistics(self) -> dict[str, torch.Tensor]:
        """The tensors that are stored beside the weight's codes, by their names in a state_dict."""
        raise NotImplementedError

    def stored_bits(self) -> int:
        """Bits that weight, scales and tables take in memory; no bias."""
        tensors = self.kept()
        return 8 * sum(t.numel() * t.element_size() for t in tensors)

    def kept(self) -> list[torch.Tensor]:
        """The weight's data and every tensor that is kept in memory for it."""
        raise NotImplementedError

    def read(self, entries: dict[str, torch.Tensor]) -> None:
        """Take the weight over from a state_dict's entries, by their names in this layer.

        Raises ``ConfigurationError`` where they do not fit.
        """
        raise NotImplementedError

    def follow(self, device: torch.device) -> None:
        """Bring what belongs to the weight to the device that the weight has been moved to."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """As ``nn.Module._apply``, which ``.to()`` and the like go through; codes move, but nothing may cast them."""
        weight = self._parameters["weight"]
        if weight is None or weight.is_floating_point():
            return super()._apply(fn, recurse)
        moved = fn(weight.data)
        if moved.dtype is not weight.dtype or moved.shape != weight.shape:
            raise ConfigurationError(
                f"the {self.storage} codes of a {type(self).__name__} cannot become {moved.dtype}: they are no "
                "numbers. Use .to(dtype), which leaves them alone, or layers.dequantized_state_dict(model)"
            )
        self._parameters["weight"] = None  # keeps its place while the others are cast
        try:
            super()._apply(fn, recurse)
        finally:
            self._parameters["weight"] = weight
        if moved is not weight.data:
            self._take(weight, moved)
        self.follow(moved.device)
        return self

    def _take(self, weight: Any, data: torch.Tensor) -> None:
        """Give ``weight`` other data, and keep the object where torch allows it: two layers may share it."""
        if torch._has_compatible_shallow_copy_type(weight, data):
            weight.data = data
        else:  # from or to the meta device
            self._parameters["weight"] = weight.with_data(data)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        for name, tensor in self.statistics().items():
            destination[prefix + name] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        own = {key[len(prefix) :]: state_dict.pop(key) for key in list(self._own(state_dict, prefix))}
        if "weight" in own:
            try:
                self.read(own)
            except ConfigurationError as error:
                error_msgs.append(f"{prefix}weight: {error}")
            state_dict[f"{prefix}weight"] = self.weight  # what stands there now: torch finds nothing left to do
        nn.Module._load_from_state_dict(
            self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    @staticmethod
    def _own(state_dict: dict[str, Any], prefix: str) -> Iterator[str]:
        for key in state_dict:
            name = key[len(prefix) :] if key.startswith(prefix) else ""
            if name in ("weight", "SCB", "weight_format") or name.startswith("weight."):
                yield key


def rows_of(input: torch.Tensor, compute: torch.dtype) -> torch.Tensor:
    """``input`` as a matrix of ``compute``: the library's products take no vectors, nor all take three dimensions.

    Raises ``ConfigurationError`` for whole numbers and complex inputs, which a cast would damage.
    """
    if not input.is_floating_point():
        raise ConfigurationError(f"a quantised layer takes floating inputs, got {input.dtype}")
    rows = input.to(compute)
    return rows.unsqueeze(0) if rows.dim() == 1 else rows.flatten(0, -2)


def like(rows: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
    """A product's ``rows`` in the dtype of ``input`` and with its leading dimensions."""
    return rows.to(input.dtype).view(*input.shape[:-1], rows.shape[-1])


# What to do with a checkpoint that a layer cannot take.
ELSEWHERE = (
    "load it into a model in the mode that it was saved in, or load layers.dequantized_state_dict(state) of it, which "
    "is quantised again"
)


def check_shape(given: Sequence[int], own: Sequence[int]) -> None:
    """Raise ``ConfigurationError`` where a saved weight has another shape than the layer's own."""
    if tuple(given) != tuple(own):
        raise ConfigurationError(f"size mismatch: the saved weight is {tuple(given)}, this layer's {tuple(own)}")
