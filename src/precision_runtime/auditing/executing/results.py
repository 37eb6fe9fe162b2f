"""What a function has given, as tensors: numbers and arrays are judged, too, and a generator is read to its end."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch

from precision_runtime.errors import ConfigurationError
from precision_runtime.tree import children, leaves


def drained(value: Any) -> Any:
    """``value``, or the list of what it yields: a generator runs only as it is read, and then belongs to the run.

    Raises ``ConfigurationError`` for a coroutine, which nothing here could await.
    """
    if inspect.isawaitable(value) and not isinstance(value, torch.Tensor):
        if inspect.iscoroutine(value):
            value.close()
        raise ConfigurationError(
            f"the function gave {type(value).__name__}, which is still to be awaited; pass a function that returns its "
            "results, such as one that calls asyncio.run(...)"
        )
    return list(value) if isinstance(value, Iterator) else value


def results(value: Any) -> list[tuple[str, torch.Tensor]]:
    """The tensors in ``value`` by path, and its numbers and arrays (in containers, not in objects) as tensors."""
    return [*((path, flat(t)) for path, t in leaves(value)), *_plain(value, "", set())]


def flat(t: torch.Tensor) -> torch.Tensor:
    """The values of a nested tensor, one part after the other; any other tensor as it is. Differentiable."""
    if not t.is_nested:
        return t
    if t.layout is torch.jagged:
        return t.values()  # type: ignore[no-any-return, unused-ignore]
    return torch.cat([part.reshape(-1) for part in t.unbind()])


def _plain(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    number = _number(value)
    if number is not None:
        yield path, number
    elif _is_array(value):
        if value.dtype.kind in "biufc":
            yield path, torch.as_tensor(value)
    elif not isinstance(value, torch.Tensor) and id(value) not in seen:
        seen.add(id(value))
        held = children(value, objects=False)
        numbers = [n for n in (_number(child) for _, child in held) if n is not None]
        if type(value) in (list, tuple) and len(numbers) == len(held) > 0 and len({n.dtype for n in numbers}) == 1:
            yield path, torch.stack(numbers)  # one result, not as many as it has elements
            return
        for step, child in held:
            yield from _plain(child, path + step, seen)


def _number(value: Any) -> torch.Tensor | None:
    if isinstance(value, (float, complex)):
        return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.complex128)
    return torch.tensor(value) if isinstance(value, int) and value.bit_length() < 64 else None


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic))
