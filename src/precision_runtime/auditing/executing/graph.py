"""Gradients of a graph that may hold reentrant checkpoints, which ``torch.autograd.grad`` refuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_REENTRANT = "CheckpointFunctionBackward"


def gradients(
    outputs: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], incoming: Sequence[torch.Tensor], retain: bool
) -> Sequence[torch.Tensor | None]:
    """The gradients of ``outputs`` with respect to ``targets``, None where one does not depend on any output.

    ``incoming`` are the outputs' own; ``retain`` keeps the graph. Nobody's ``grad`` is another one afterwards.
    """
    leaves = _leaves_beside_checkpoints(outputs)
    if leaves is None:
        return torch.autograd.grad(outputs, targets, incoming, allow_unused=True, retain_graph=retain)
    held = {id(t): (t, t.grad) for t in (*targets, *leaves)}
    try:
        for t, _ in held.values():
            t.grad = None
        torch.autograd.backward(outputs, incoming, retain_graph=retain)
        return [t.grad for t in targets]
    finally:
        for t, grad in held.values():
            t.grad = grad


def _leaves_beside_checkpoints(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
    """The leaves of a graph with a reentrant checkpoint in it; None where there is none."""
    waiting: list[Any] = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen, leaves, found = set(waiting), list[torch.Tensor](), False
    while waiting:
        node = waiting.pop()
        found = found or node.name() == _REENTRANT
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        for after, _ in node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                waiting.append(after)
    return leaves if found else None
