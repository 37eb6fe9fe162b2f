"""Generators of random numbers that belong to the audited code: a module's own, one that is passed or closed over.

Every run starts with them as the first one found them, and in the end they are as they were.
"""

from __future__ import annotations

import inspect
import random
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

_GENERATORS: ContextVar[Generators | None] = ContextVar("generators", default=None)


class Generators:
    """The generators of one audited function; a state is a list in their order."""

    def __init__(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], roots: Iterable[nn.Module]
    ) -> None:
        values = [*args, *kwargs.values(), *_captured(function)]
        for root in roots:
            for module in root.modules():
                values += vars(module).values()
        found = {id(v): v for value in values for v in _flat(value) if _is_generator(v)}
        self._found = list(found.values())
        self._start = self.states()

    def states(self) -> list[Any]:
        """The states that they are in now."""
        return [_state(g) for g in self._found]

    def put(self, states: Sequence[Any]) -> None:
        """Put them into these states."""
        for generator, state in zip(self._found, states, strict=True):
            _set(generator, state)

    def rewind(self) -> None:
        """Put them back to where they were in the beginning."""
        self.put(self._start)

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Context in which these are the code's own, and after which they are as they were."""
        token = _GENERATORS.set(self)
        try:
            yield
        finally:
            _GENERATORS.reset(token)
            self.rewind()


def own() -> Generators | None:
    """The generators of the code that is being audited, if any is."""
    return _GENERATORS.get()


def _captured(function: Callable[..., Any]) -> Iterator[Any]:
    """What a function written in Python closes over, or has as defaults."""
    if isinstance(function, types.MethodType):
        yield from vars(function.__self__).values() if hasattr(function.__self__, "__dict__") else ()
        function = function.__func__
    if isinstance(function, types.FunctionType):
        variables = inspect.getclosurevars(function)
        yield from variables.nonlocals.values()
        yield from variables.globals.values()
        yield from function.__defaults__ or ()


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        yield from value
    elif isinstance(value, dict):
        yield from value.values()
    else:
        yield value


def _is_generator(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    others = (numpy.random.Generator, numpy.random.RandomState) if numpy is not None else ()
    return isinstance(value, (torch.Generator, random.Random, *others))


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.bit_generator.state if hasattr(generator, "bit_generator") else generator.get_state()


def _set(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)
