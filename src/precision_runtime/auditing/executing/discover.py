"""Find the modules that a function runs: the function itself, what it closes over, what is passed to it."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from precision_runtime.setup.unwrapping import bare, inside

_DEPTH = 4  # functions within functions that are followed


def find_modules(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Return the root modules by the name that findings give them; ``""`` for a module that is itself judged.

    A lambda, a bound method (of a module or of an object that holds modules), a ``functools.partial`` and modules among
    the arguments are followed. A module inside another root is not a root of its own. Of a framework's wrapper the
    model inside counts.
    """
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, wrapper in _everything(function, args, kwargs):
        module = inside(wrapper)
        found.setdefault(id(module), (name, module))
    inner = {id(m) for _, root in found.values() for n, m in root.named_modules() if n}
    roots: dict[str, nn.Module] = {}
    for name, module in found.values():
        if id(module) not in inner:
            roots[_unique(name, roots)] = module
    return roots


def as_written(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> AbstractContextManager[None]:
    """Context in which no framework casts around the modules that ``function`` runs."""
    return bare([module for _, module in _everything(function, args, kwargs)])


def name_of(function: Any) -> str:
    """What a report calls the function: a module's class, a function's name."""
    if isinstance(function, nn.Module):
        return type(inside(function)).__name__
    if isinstance(function, functools.partial):
        return name_of(function.func)
    # torch's functions are methods of a class that nobody knows: _VariableFunctionsClass.relu.
    known = getattr(torch, str(getattr(function, "__name__", "")), None) is function
    name = function.__name__ if known else getattr(function, "__qualname__", type(function).__name__)
    return str(name).rpartition("<locals>.")[2]


def _everything(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[tuple[str, nn.Module]]:
    yield from _search(function, "", 0, set())
    for name, value in ((f"args[{i}]", value) for i, value in enumerate(args)):
        if isinstance(value, nn.Module):
            yield name, value
    for name, value in kwargs.items():
        if isinstance(value, nn.Module):
            yield name, value


def _search(value: Any, name: str, depth: int, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    if id(value) in seen or depth > _DEPTH:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        yield name, value
    elif isinstance(value, functools.partial):
        for inner in (value.func, *value.args, *value.keywords.values()):
            yield from _search(inner, name, depth + 1, seen)
    elif isinstance(value, types.MethodType):
        # A module's own method is judged like the module: names are relative to it.
        yield from _search(value.__self__, name, depth + 1, seen)
        yield from _search(value.__func__, name, depth + 1, seen)
    elif isinstance(value, types.FunctionType):
        for key, inner in _captured(value):
            yield from _search(inner, key, depth + 1, seen)
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            if _may_hold(inner):
                yield from _search(inner, f"{name}[{i}]", depth + 1, seen)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if _may_hold(inner):
                yield from _search(inner, f"{name}[{key!r}]", depth + 1, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, (type, types.ModuleType)):
        for key, inner in vars(value).items():
            if isinstance(inner, (nn.Module, list, tuple, dict)):
                yield from _search(inner, f"{name}.{key}" if name else key, depth + 1, seen)
        if callable(value):
            yield from _search(type(value).__call__, name, depth + 1, seen)


def _captured(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Names that the function's code can reach, with the values that they have now."""
    variables = inspect.getclosurevars(function)
    for scope in (variables.nonlocals, variables.globals):
        for key, value in scope.items():
            if _may_hold(value) and not isinstance(value, type):
                yield key, value
    for value in function.__defaults__ or ():
        if isinstance(value, nn.Module):
            yield type(value).__name__.lower(), value
    for key, value in (function.__kwdefaults__ or {}).items():
        if isinstance(value, nn.Module):
            yield key, value


def _may_hold(value: Any) -> bool:
    return isinstance(
        value, (nn.Module, types.FunctionType, types.MethodType, functools.partial, list, tuple, dict)
    ) or (hasattr(value, "__dict__") and not isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType)))


def _unique(name: str, taken: Mapping[str, Any]) -> str:
    if name not in taken:
        return name
    number = 2
    while f"{name}#{number}" in taken:
        number += 1
    return f"{name}#{number}"
