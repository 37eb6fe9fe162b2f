"""Nested containers as JSON and a dict of tensors, and back. No pickle, so that reading one runs no code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from precision_runtime.errors import ConfigurationError

# safetensors has no complex128 and no complex32: they are kept as pairs of reals.
_PAIRS = (torch.complex128, torch.complex32)


class Tensors:
    """The tensors of a tree under names of their own, contiguous and on the CPU, each memory once."""

    def __init__(self) -> None:
        self.by_name: dict[str, torch.Tensor] = {}
        self.tied: dict[str, str] = {}
        self.pairs: list[str] = []
        self._seen: dict[tuple[int, torch.dtype, torch.Size, tuple[int, ...]], tuple[str, torch.Tensor]] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Keep ``tensor`` as ``name``. Raises ``ConfigurationError`` where it holds no plain values."""
        if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_quantized:
            what = "on the meta device, where nothing is held" if tensor.is_meta else f"{tensor.layout}"
            raise ConfigurationError(f"{name!r} cannot be saved: it is {what}; checkpoints hold dense tensors")
        tensor = tensor.detach()
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and key in self._seen:
            self.tied[name] = self._seen[key][0]
            return
        self._seen[key] = name, tensor  # keeps the memory, whose address is the key
        if tensor.dtype in _PAIRS:
            self.pairs.append(name)
            tensor = torch.view_as_real(tensor.resolve_conj())
        plain = tensor.resolve_conj().resolve_neg().cpu().contiguous()
        whole = plain.untyped_storage().nbytes() == plain.numel() * plain.element_size()
        self.by_name[name] = plain if whole else plain.clone()

    def names(self) -> dict[str, Any]:
        """What ``restored`` needs beside the tensors, for JSON."""
        return {"tied": self.tied, "pairs": self.pairs}


def restored(tensors: Mapping[str, torch.Tensor], names: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors under all of their names, complex again."""
    found = dict(tensors)
    for name in names["pairs"]:
        # A copy: in a file numbers lie at multiples of 8 bytes, and torch's kernels for complex128 crash unless at 16.
        found[name] = torch.view_as_complex(found[name].clone())
    for name, first in names["tied"].items():
        found[name] = found[first]
    return found


def encode(value: Any, tensors: Tensors, path: str = "state") -> Any:
    """``value`` for JSON; its tensors go into ``tensors``.

    Takes dicts with any keys that are builtins, lists, tuples, builtin scalars, dtypes and tensors. Raises
    ``ConfigurationError`` for anything else, by its path.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, torch.Tensor):
        tensors.add(path, value)
        return {"tensor": path}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Mapping):
        return {"dict": [[encode(k, tensors, path), encode(v, tensors, f"{path}.{k}")] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [encode(item, tensors, f"{path}.{i}") for i, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    raise ConfigurationError(
        f"{path!r} is a {type(value).__name__}, and checkpoints hold only tensors, numbers, strings, lists, tuples and "
        "dicts: anything else would have to be pickled"
    )


def decode(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The inverse of ``encode``."""
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "dict":
        return {decode(k, tensors): decode(v, tensors) for k, v in content}
    return _DECODERS[kind](content, tensors)


_DECODERS: Mapping[str, Any] = {
    "float": lambda content, tensors: float(content),
    "tensor": lambda content, tensors: tensors[content],
    "dtype": lambda content, tensors: getattr(torch, content),
    "tuple": lambda content, tensors: tuple(decode(item, tensors) for item in content),
}
