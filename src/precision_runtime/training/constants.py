"""Results of modules that are made of constants and integers (a schedule, positions): nothing had to round those."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from precision_runtime.auditing.executing.dispatch import LowWatch
from precision_runtime.auditing.executing.provenance import Provenance
from precision_runtime.auditing.executing.unseen import transformed
from precision_runtime.training.course import Observer
from precision_runtime.tree import leaves

# The module's path, the number of its call in a step (from 1), and where in its result the tensor is.
Site = tuple[str, int, str]


class Constants(Observer):
    """Notes, in the first step of a training under ``seen``, which results are constants, in ``found``."""

    def __init__(self, seen: LowWatch, found: set[Site]) -> None:
        self._seen, self._found, self._done = seen, found, False
        self._handles: list[RemovableHandle] = []
        found.clear()

    def before_loss(self, model: nn.Module, batch: Any, seed: int) -> None:
        """See ``Observer.before_loss``."""
        if self._done:
            return
        provenance = self._seen.provenance = Provenance(model.buffers(), model.parameters())
        counts: dict[str, int] = {}

        def note(name: str, result: Any) -> None:
            if transformed():
                return
            number = counts[name] = counts.get(name, 0) + 1
            paths = [path for path, t in leaves(result, objects=False) if provenance.is_exact(t)]
            self._found.update((name, number, path) for path in paths)

        for name, module in model.named_modules():
            hook = module.register_forward_hook(lambda module, args, result, name=name: note(name, result))
            self._handles.append(hook)

    def after_loss(self, model: nn.Module) -> None:
        """See ``Observer.after_loss``."""
        self._done, self._seen.provenance = True, None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def constant(result: Any, name: str, number: int, found: Collection[Site]) -> set[int]:
    """The tensors of a result, by id, that are constants."""
    return {id(t) for path, t in leaves(result, objects=False) if (name, number, path) in found} if found else set()
