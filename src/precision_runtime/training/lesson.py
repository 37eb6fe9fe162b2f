"""What is to be trained, as the user gave it, and checks of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from precision_runtime.errors import ConfigurationError

StepFunction = Callable[[Any, Any, Any], Any]


@dataclass(frozen=True)
class Lesson:
    """One training: how to make its parts, its batches in order, how many steps.

    ``places`` says for each batch where the same object came first: a full batch that is given again and again is
    rounded in the same way each time.
    """

    make_model: Callable[[], Any]
    make_optimizer: Callable[[Any], Any]
    loss_fn: Callable[[Any, Any], Any]
    batches: tuple[Any, ...]
    places: tuple[int, ...]
    steps: int
    step_fn: StepFunction | None
    seed: int

    def batch(self, step: int) -> tuple[int, Any]:
        """The batch of a step, and its place; after the last one comes the first again."""
        number = step % len(self.batches)
        return self.places[number], self.batches[number]


def lesson_of(
    make_model: Any, make_optimizer: Any, loss_fn: Any, batches: Iterable[Any], steps: int | None, step_fn: Any,
    seed: int,
) -> Lesson:  # fmt: skip
    """The lesson, with at most ``steps`` batches taken. Raises ``ConfigurationError`` for what cannot be one."""
    if isinstance(make_model, nn.Module):  # which can be called, but makes no model
        raise ConfigurationError(
            f"audit_training() got a {type(make_model).__name__} as make_model; pass a function that makes it, for "
            "every run trains its own: lambda: Net(), or lambda: copy.deepcopy(net)"
        )
    wanted = {"make_model": make_model, "make_optimizer": make_optimizer, "loss_fn": loss_fn}
    if step_fn is not None:
        wanted["step_fn"] = step_fn
    for name, value in wanted.items():
        if not callable(value):
            raise ConfigurationError(
                f"audit_training() got {type(value).__name__} as {name}; pass a function, for every run makes its own "
                "model and optimizer: make_model(), make_optimizer(model), loss_fn(model, batch), "
                "step_fn(model, optimizer, loss)"
            )
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ConfigurationError(f"steps={steps!r} is not allowed: give the number of steps to train, from 1 up")
    taken = tuple(itertools.islice(batches, steps))
    if not taken:
        raise ConfigurationError("audit_training() got no batches; pass at least one")
    first: dict[int, int] = {}
    places = tuple(first.setdefault(id(batch), number) for number, batch in enumerate(taken))
    return Lesson(make_model, make_optimizer, loss_fn, taken, places, steps or len(taken), step_fn, seed)
