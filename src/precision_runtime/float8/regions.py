"""When a step of delayed scaling ends: forward tensors at the end of the outermost region, gradients after backward.

A region is one forward of a set-up model, or of a layer that is called by itself. All calls of a layer inside it use
the same scales. Without gradients nothing is noted, so that an evaluation does not move the scales of training; a
forward that is repeated during backward (checkpointing) uses the scales of the first time and notes nothing.
"""

from __future__ import annotations

import threading
import weakref
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from precision_runtime.float8 import history

if TYPE_CHECKING:
    from precision_runtime.float8.layers import Float8Linear


class _Current(threading.local):
    region: region | None = None


_current = _Current()


class region:  # noqa: N801  # reads as what it is: with region():
    """Context manager; inside another region of this thread it does nothing."""

    def __enter__(self) -> None:
        self._outermost = _current.region is None
        if self._outermost:
            # Here, not in the layer: a checkpointed segment runs its first forward without gradients.
            self.training = torch.is_grad_enabled() and not recomputing()
            self._touched: dict[int, Float8Linear] = {}
            _current.region = self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._outermost:
            _current.region = None
            _end(list(self._touched.values()), "fwd")

    def touch(self, layer: Float8Linear) -> None:
        """This layer has noted magnitudes."""
        self._touched[id(layer)] = layer

    def touched(self, layer: Float8Linear) -> bool:
        """Whether the layer has noted magnitudes in this region, which have not become scales yet."""
        return id(layer) in self._touched


def current() -> region | None:
    """The region that this thread is in."""
    return _current.region


def recomputing() -> bool:
    """Whether this code runs inside backward: a forward there is a checkpointed segment's repetition."""
    return torch._C._current_graph_task_id() != -1


# Layers that noted a gradient in a backward pass that has not ended, by the number that torch gives that pass. Weakly:
# a pass that raises never ends.
_backward: dict[int, list[weakref.ref[Float8Linear]]] = {}


def after_backward(layer: Float8Linear) -> None:
    """Let ``layer``'s gradient scales follow when the present backward pass has ended. Call it inside backward."""
    number = torch._C._current_graph_task_id()
    if number not in _backward:
        _backward[number] = []
        torch.autograd.Variable._execution_engine.queue_callback(lambda: _ended(number))
    if all(ref() is not layer for ref in _backward[number]):
        _backward[number].append(weakref.ref(layer))


def _ended(number: int) -> None:
    layers = [ref() for ref in _backward.pop(number, [])]
    _end([layer for layer in layers if layer is not None], "bwd")


def _end(layers: list[Float8Linear], side: str) -> None:
    if not layers:
        return
    with torch.no_grad():
        history.agree([layer.scaling for layer in layers if layer.delayed.reduce_amax], side)
        for layer in layers:
            history.step(layer.scaling, side, layer.delayed)
