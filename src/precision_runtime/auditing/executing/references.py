"""FP64 runs of a whole function, made once and shared by every mode that judges the same inputs and weights."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from precision_runtime.auditing.executing.masking import Masking
from precision_runtime.auditing.executing.runs import Run
from precision_runtime.auditing.executing.uses import Place
from precision_runtime.tree import leaves


@dataclass(eq=False)
class Reference:
    """One true run, with its perturbed twins by how they were disturbed, and what it must equal to serve again."""

    name: str
    seed: int
    gradients: bool
    inputs: list[tuple[str, torch.Tensor]]
    parameters: list[torch.Tensor]
    buffers: list[torch.Tensor]
    run: Run
    parameter_grads: dict[str, torch.Tensor]  # by name: parameter objects differ from lane to lane
    masking: Masking
    fallbacks: frozenset[str] = frozenset()
    uses: dict[str, frozenset[Place]] = field(default_factory=dict)  # of the parameters, by name
    samples: dict[Hashable, list[Sample]] = field(default_factory=dict)


@dataclass(eq=False)
class Sample:
    """Outputs and gradients of one perturbed run, by the name of the tensor."""

    forward: dict[str, torch.Tensor]
    backward: dict[str, torch.Tensor]
    inner: dict[tuple[str, int], Sample] = field(default_factory=dict)  # calls without floating inputs


class References:
    """A cache of references. It checks itself that an entry fits: same function name, seed, inputs and weights.

    With ``keep`` 0 it keeps none: then nobody needs the values of all calls at the same time.
    """

    def __init__(self, keep: int = 8) -> None:
        self.size = keep
        self._entries: list[Reference] = []

    def find(
        self, name: str, seed: int, gradients: bool, inputs: Any, parameters: Mapping[int, torch.Tensor],
        buffers: Mapping[tuple[int, str], torch.Tensor], masking: Masking,
    ) -> Reference | None:  # fmt: skip
        """The entry for exactly these values and that masks the same scores, or None."""
        given = list(leaves(inputs))
        for entry in self._entries:
            if (
                (entry.name, entry.seed, entry.gradients) == (name, seed, gradients)
                and entry.masking.serves(masking)
                and [p for p, _ in entry.inputs] == [p for p, _ in given]
                and _equal([t for _, t in entry.inputs], [t for _, t in given])
                and _equal(entry.parameters, list(parameters.values()))
                and _equal(entry.buffers, list(buffers.values()))
            ):
                return entry
        return None

    def keep(self, entry: Reference) -> None:
        """Add an entry; the oldest goes when there are more than ``keep``."""
        self._entries.append(entry)
        del self._entries[: max(0, len(self._entries) - self.size)]


def _equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape
        and x.dtype == y.dtype
        and (torch.equal(x, y) or bool(((x == y) | (x.isnan() & y.isnan())).all()))
        for x, y in zip(a, b, strict=True)
    )
