"""A forward that is a generator: its body runs after the call, step by step, and each step is to run in the mode."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any


def generated(
    source: Generator[Any, Any, Any],
    context: Callable[[], AbstractContextManager[Any]],
    take: Callable[[Any], Any],
    give: Callable[[Any], Any],
) -> Generator[Any, Any, Any]:
    """``source`` with each step in a ``context()`` of its own, so that the caller's code between two is in none.

    What is sent in goes through ``take``; what is yielded or returned comes out through ``give``.
    """
    step: Callable[[], Any] = partial(next, source)
    while True:
        try:
            with context():
                value = step()
        except StopIteration as end:
            return give(end.value)
        try:
            sent = yield give(value)
        except GeneratorExit:
            source.close()
            raise
        except BaseException as error:
            step = partial(source.throw, error)
        else:
            step = partial(source.send, take(sent))
