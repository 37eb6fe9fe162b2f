"""Tensors inside nested containers and objects: list them, or rebuild the container with each one replaced.

Containers are lists, tuples, named tuples, mappings, dataclasses, packed sequences, Hugging Face outputs and, where
asked for, any object that keeps tensors in its attributes (a KV cache). Modules, classes and functions are leaves.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import nn

_ATOMS = (
    str, bytes, int, float, complex, bool, type(None), type, range, slice,
    torch.dtype, torch.device, torch.Size, torch.Generator, torch.layout, torch.memory_format, nn.Module,
)  # fmt: skip


def leaves(value: Any, objects: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield ``(path, tensor)`` for each tensor in ``value``, in a stable order; a path is Python: ``.a[0]['b']``.

    An object met twice is visited once. With ``objects`` the attributes of other objects are searched too.
    """
    yield from _leaves(value, "", objects, set())


def _leaves(value: Any, path: str, objects: bool, seen: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, value
        return
    if isinstance(value, _ATOMS) or (callable(value) and not dataclasses.is_dataclass(value)):
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    for step, child in children(value, objects):
        yield from _leaves(child, path + step, objects, seen)


def children(value: Any, objects: bool) -> list[tuple[str, Any]]:
    """What a container (with ``objects``, any object) holds, each with its step in Python; nothing for what is none."""
    if isinstance(value, Mapping):
        return [(f"[{k!r}]", v) for k, v in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(f".{k}", getattr(value, k)) for k in value._fields]
    if isinstance(value, (list, tuple, deque)):
        return [(f"[{i}]", v) for i, v in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f".{f.name}", getattr(value, f.name)) for f in dataclasses.fields(value) if hasattr(value, f.name)]
    if objects and hasattr(value, "__dict__"):
        return [(f".{k}", v) for k, v in vars(value).items()]
    return []


def map_tensors(
    function: Callable[[torch.Tensor], torch.Tensor],
    value: Any,
    objects: bool = True,
    memo: dict[int, Any] | None = None,
) -> Any:
    """Return ``value`` rebuilt with ``function`` applied to every tensor; containers are always new, leaves shared.

    One object met twice becomes one new object, so aliasing survives (``memo`` carries that across several calls).
    Unknown objects are copied (``copy.copy``) and their attributes mapped only with ``objects``; otherwise shared.
    """
    return _Mapper(function, objects, {} if memo is None else memo)(value)


class _Mapper:
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], objects: bool, memo: dict[int, Any]) -> None:
        self.function, self.objects, self.memo = function, objects, memo

    def __call__(self, value: Any) -> Any:
        if isinstance(value, _ATOMS):
            return value
        if id(value) in self.memo:
            return self.memo[id(value)][1]
        if isinstance(value, torch.Tensor):
            return self._remember(value, self.function(value))
        if callable(value) and not dataclasses.is_dataclass(value):
            return value
        if isinstance(value, tuple):
            items = [self(v) for v in value]
            return self._remember(value, type(value)(*items) if hasattr(value, "_fields") else _tuple(value, items))
        if isinstance(value, (list, deque)):
            new = self._remember(value, copy.copy(value))
            items = [self(v) for v in value]
            new.clear()
            new.extend(items)
            return new
        if isinstance(value, set):  # a set of its own, for what is put in later; its members are found by hash
            return self._remember(value, copy.copy(value))
        if isinstance(value, MutableMapping):
            new = self._remember(value, copy.copy(value))
            for key in list(value):
                new[key] = self(value[key])
            return new
        if isinstance(value, Mapping):
            return self._remember(value, type(value)({k: self(v) for k, v in value.items()}))  # type: ignore[call-arg]
        if dataclasses.is_dataclass(value) or (self.objects and hasattr(value, "__dict__")):
            return self._object(value)
        return value

    def _object(self, value: Any) -> Any:
        try:
            new = copy.copy(value)
        except Exception:  # locks, handles: such an object cannot be copied and is shared
            return self._remember(value, value)
        self._remember(value, new)
        names = list(vars(value)) if hasattr(value, "__dict__") else [f.name for f in dataclasses.fields(value)]
        for name in names:
            before = getattr(value, name, None) if name not in getattr(value, "__dict__", {}) else vars(value)[name]
            after = self(before)
            if after is not before:
                object.__setattr__(new, name, after)
        return new

    def _remember(self, old: Any, new: Any) -> Any:
        self.memo[id(old)] = (old, new)
        return new


def _tuple(value: tuple[Any, ...], items: list[Any]) -> Any:
    return tuple(items) if type(value) is tuple else type(value)(items)
