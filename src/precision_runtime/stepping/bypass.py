"""Steps that went past the runtime: ``optimizer.step()`` after ``runtime.backward(loss)``.

In a mode that scales its loss it applies gradients that are still scaled, with master weights the model never gets the
new values, and nothing raises: the loss is NaN, or stands still. Optimizers that the runtime has met tell of their
steps by a hook. Before it has met one, weights that were written to between two backward passes are the sign; later
they would be none, for averages are swapped in and weights are clipped after a step of the runtime's, too.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.optim import Optimizer

from precision_runtime.errors import PrecisionWarning
from precision_runtime.pointing import users_line


class NoWatch:
    """What the runtime has where ``optimizer.step()`` does what ``runtime.step(optimizer)`` does: nothing happens."""

    def meet(self, optimizer: Optimizer) -> None:
        """Watch an optimizer that is met for the first time."""

    def backward(self, weights: Callable[[], Iterator[torch.Tensor]]) -> None:
        """A backward pass of the runtime's begins; ``weights`` gives those of the models set up."""

    def stepping(self) -> AbstractContextManager[None]:
        """The context of the runtime's own step."""
        return contextlib.nullcontext()


class Watch(NoWatch):
    """Warns (``PrecisionWarning``), once, of a step that went past the runtime; ``harm`` says what it does."""

    def __init__(self, harm: str) -> None:
        self.harm = harm
        self._met = self._told = self._waiting = False
        self._weight: tuple[weakref.ref[torch.Tensor], int] | None = None

    def meet(self, optimizer: Optimizer) -> None:
        """See ``NoWatch.meet``."""
        self._met, self._weight = True, None
        if hasattr(optimizer, "_optimizer_step_post_hooks"):  # a wrapper may be an Optimizer by its class alone
            optimizer.register_step_post_hook(self._stepped)

    def backward(self, weights: Callable[[], Iterator[torch.Tensor]]) -> None:
        """See ``NoWatch.backward``."""
        self._waiting = True
        if self._met or self._told:
            return
        weight = None if self._weight is None else self._weight[0]()
        if weight is None:
            weight = next((w for w in weights() if w.requires_grad), None)
        elif self._weight is not None and weight._version != self._weight[1]:
            self._tell("weights have changed since the last backward()")
        self._weight = None if weight is None else (weakref.ref(weight), weight._version)

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """See ``NoWatch.stepping``."""
        self._waiting = False
        told, self._told = self._told, True
        try:
            yield
        finally:
            self._waiting, self._told = False, told  # a closure has run backward()

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._waiting and not self._told:
            self._tell(f"{type(optimizer).__name__}.step() was called after backward()")

    def _tell(self, sign: str) -> None:
        self._told = True
        warnings.warn(
            f"{sign}, and the runtime's step() was not: {self.harm}. Call runtime.step(optimizer) in place of "
            "optimizer.step(), after each runtime.backward(loss)",
            PrecisionWarning,
            stacklevel=users_line(),
        )


def watch_for(scaled: bool, masters: bool, updates: str) -> NoWatch:
    """What a runtime needs: one that scales losses and alone, that keeps masters, or whose updates are not torch's."""
    harm = {
        "gradients are multiplied by the loss scale until then, and no step is skipped that overflows": scaled,
        "the model does not get the new values of its master weights": masters,
        f"updates are rounded to nearest, not {updates!r}": updates != "nearest",
    }
    found = "; ".join(text for text, true in harm.items() if true)
    return Watch(found) if found else NoWatch()
