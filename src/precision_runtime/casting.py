"""Casting of trees of tensors and of modules, by tables from dtype to dtype. A dtype without an entry is left alone.

So whole numbers, bools, FP8 and quantised storage are never touched, and complex tensors only where a table names
them: casting a complex tensor to a real half dtype, as ``module.to`` does, throws its imaginary part away.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from precision_runtime.tree import leaves, map_tensors

CastTable = Mapping[torch.dtype, torch.dtype]

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def floating_to(dtype: torch.dtype) -> CastTable:
    """The table that takes the four common floating dtypes to ``dtype``."""
    return MappingProxyType({d: dtype for d in FLOATING if d is not dtype})


NOTHING: CastTable = MappingProxyType({})
TO: Mapping[torch.dtype, CastTable] = MappingProxyType({dtype: floating_to(dtype) for dtype in FLOATING})
HALF = (torch.float16, torch.bfloat16)
HALF_TO_SINGLE: CastTable = MappingProxyType(dict.fromkeys(HALF, torch.float32))
TO_DOUBLE: CastTable = MappingProxyType(
    {**floating_to(torch.float64), torch.complex32: torch.complex128, torch.complex64: torch.complex128}
)


# The named casts do what ``tensor.to(dtype)`` does in two thirds of its time (torch 2.13: 1.9 µs, not 2.9): they have
# no arguments to parse. That is noticeable when forward is a small layer.
CAST: Mapping[torch.dtype, Callable[[torch.Tensor], torch.Tensor]] = MappingProxyType(
    {
        torch.float16: torch.Tensor.half,
        torch.bfloat16: torch.Tensor.bfloat16,
        torch.float32: torch.Tensor.float,
        torch.float64: torch.Tensor.double,
        torch.complex128: lambda tensor: tensor.to(torch.complex128),
    }
)

Casts = Mapping[torch.dtype, Callable[[torch.Tensor], torch.Tensor]]


def casts(table: CastTable) -> Casts:
    """For each dtype of ``table`` the function that casts a tensor of it. A plain dict: it is read at every forward."""
    return {dtype: CAST[target] for dtype, target in table.items()}


CASTS_TO: Mapping[torch.dtype, Casts] = {dtype: casts(table) for dtype, table in TO.items()}


def cast_tree(value: Any, table: CastTable) -> Any:
    """``value`` with its tensors cast, in nested lists, tuples, mappings, dataclasses and Hugging Face outputs.

    Where nothing is to be cast the very same object comes back: a list that forward fills stays the caller's.
    Other objects (a KV cache) are passed on as they are, for the same reason.
    """
    if isinstance(value, torch.Tensor):
        target = table.get(value.dtype)
        return value if target is None else CAST[target](value)
    if not any(tensor.dtype in table for _, tensor in leaves(value, objects=False)):
        return value
    return map_tensors(lambda tensor: cast_tree(tensor, table), value, objects=False)


def cast_call(
    args: tuple[Any, ...], kwargs: dict[str, Any], table: CastTable
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, cast. One object in two places stays one object. Fast for a single tensor."""
    if len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor):
        target = table.get(args[0].dtype)
        return (args if target is None else (CAST[target](args[0]),)), kwargs
    cast: tuple[tuple[Any, ...], dict[str, Any]] = cast_tree((args, kwargs), table)
    return cast


def cast_module(module: nn.Module, table: CastTable) -> nn.Module:
    """Cast parameters, their gradients and buffers in place, and return ``module``.

    Goes through ``module._apply``, as ``module.to`` does, so that modules which override it behave as they do there.
    Parameters stay the same objects (optimizers and tied weights keep them); a buffer used twice stays one buffer.
    Parts that a Hugging Face model declares to need float32 become or stay float32 when the table leads to half.
    """
    if not table:
        return module
    kept = kept_in_float32(module, set(table.values()))
    done: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # keeps the key's tensor alive, so that no id comes twice

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in done:
            target = (TO[torch.float32] if id(tensor) in kept else table).get(tensor.dtype)
            # Not by CAST: a parameter of a lazy layer, which has no values yet, takes to() and not each of those.
            done[id(tensor)] = tensor, (tensor if target is None else tensor.to(target))
        return done[id(tensor)][1]

    module._apply(cast)
    return module


# transformers, _get_dtype_plan: the first attribute was made for bfloat16 checkpoints that are loaded in float16 and
# counts for float16 only; the strict one counts for both.
_DECLARATIONS: Mapping[torch.dtype, tuple[str, ...]] = MappingProxyType(
    {
        torch.float16: ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"),
        torch.bfloat16: ("_keep_in_fp32_modules_strict",),
    }
)


def kept_in_float32(module: nn.Module, targets: set[torch.dtype]) -> dict[int, torch.Tensor]:
    """The tensors, by id, that a Hugging Face model inside ``module`` declares to need float32.

    As when transformers loads a model, a declared name is a pattern (``*`` for anything) sought anywhere in the path
    of a parameter or buffer, from the declaring model down.
    """
    attributes = dict.fromkeys(a for target in targets for a in _DECLARATIONS.get(target, ()))
    kept: dict[int, torch.Tensor] = {}
    for owner in module.modules() if attributes else ():
        names = [n for a in attributes for n in _names(getattr(owner, a, None))]
        if not names:
            continue
        pattern = re.compile("|".join(n.replace("*", ".*") for n in names))
        for path, tensor in (
            *owner.named_parameters(remove_duplicate=False),
            *owner.named_buffers(remove_duplicate=False),
        ):
            if pattern.search(path):
                kept[id(tensor)] = tensor
                if tensor.grad is not None:
                    kept[id(tensor.grad)] = tensor.grad
    return kept


def _names(declared: object) -> list[str]:
    if not isinstance(declared, (list, tuple, set, frozenset)):
        return []
    return sorted(n for n in declared if isinstance(n, str))
