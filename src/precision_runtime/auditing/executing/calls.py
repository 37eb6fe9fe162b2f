"""How calls relate: to their twins in another run, to their parts, to the whole function."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from precision_runtime.auditing.executing.recorder import Call
from precision_runtime.auditing.executing.runs import Run
from precision_runtime.tree import leaves


def match(low: Sequence[Call], true: Sequence[Call]) -> dict[int, Call]:
    """Each low call's twin in an FP64 run: the call of the same module with the same number of predecessors."""
    waiting: dict[str, list[Call]] = {}
    for call in true:
        waiting.setdefault(call.name, []).append(call)
    twins: dict[int, Call] = {}
    for call in low:
        queue = waiting.get(call.name)
        if queue:
            twins[id(call)] = queue.pop(0)
    return twins


def moved_weights(calls: Sequence[Call]) -> dict[int, torch.Tensor]:
    """How far layers' own rounding moved their weights, by id of the parameter."""
    return {id(c.module.weight): c.moved["weight"] for c in calls if "weight" in c.moved}


def is_wrapper(call: Call) -> bool:
    """Whether the call only hands its inputs to one child and that child's outputs back."""
    if len(call.children) != 1:
        return False
    child = call.children[0]
    if child.end < 0 or len(child.outputs) != len(call.outputs) or not call.outputs:
        return False
    ours, theirs = list(leaves((call.args, call.kwargs))), list(leaves((child.args, child.kwargs)))
    return len(ours) == len(theirs) and all(
        identical(a, b)
        for a, b in zip([t for _, t in ours + call.outputs], [t for _, t in theirs + child.outputs], strict=True)
    )


def anchored(call: Call, twin: Call, gradients: bool = True) -> bool:
    """Whether the twin ran on the call's own inputs: nothing floating goes in, and the rest is equal.

    Then the enclosing run is the replay; where ``gradients`` are judged, only if none comes in, for that would be the
    low run's own.
    """
    if (gradients and call.output_grads) or call.state or call.anchors is None or twin.anchors is None:
        return False
    return len(call.anchors) == len(twin.anchors) and all(
        identical(a, b) for a, b in zip(call.anchors, twin.anchors, strict=True)
    )


def covers(call: Call, run: Run) -> bool:
    """Whether the call is the whole function."""
    return len(call.outputs) == len(run.outputs) and all(
        identical(a, b) for (_, a), (_, b) in zip(call.outputs, run.outputs, strict=True)
    )


def identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal, NaN being equal to NaN."""
    if any(t.is_nested or t.layout is not torch.strided for t in (a, b)):  # some of these have no shape to ask for
        return False
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())
