"""Who ran which product or reduction in which dtype, noted while a step runs.

A dispatch mode sits below autograd and autocast, so it sees what really runs, forward and backward. In the backward
pass the node that is being evaluated has the sequence number that autograd gave it in the forward pass, and the modules
that were open at that number are known: no hook on a tensor is needed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._ops import HigherOrderOperator

from precision_runtime.counting.work import Kind, Work, work_of
from precision_runtime.dispatching import OwnMode, opened
from precision_runtime.uncompiled import stance

OUTSIDE = "(outside of any module)"

_KNOWN = frozenset(("aten", "prim", "prims", "profiler", "c10d", "_c10d_functional", "higher_order"))
_NO_NODE = -1
_UNNUMBERED = 2**64 - 1  # nodes that add up the gradient of a leaf belong to no place in the forward pass


@dataclass(frozen=True)
class Key:
    """What work is summed by. ``dtype`` is a dtype's name, or the name of a format that a layer emulates."""

    module: str
    where: str  # forward, backward
    kind: Kind
    dtype: str


class Bookkeeper(OwnMode):
    """Sums the work of all ops that run inside, in this thread and in the backward passes that it starts.

    ``modules`` are those that work is put down to, by path. ``tf32``: products of float32 whose operands have TF32's
    bits are TF32's. Compiled modules run eagerly meanwhile, and fused fast paths of torch's transformer layers are off:
    what they would run is the same arithmetic, but nobody could see into it.
    """

    def __init__(self, modules: Mapping[str, nn.Module], tf32: bool = False) -> None:
        super().__init__()
        self.work: dict[Key, float] = {}
        self.unknown: set[str] = set()
        self._modules, self._tf32 = modules, tf32
        self._names = {id(module): path for path, module in modules.items()}
        self._plans: dict[Any, Work | None] = {}
        # Modules that are open, innermost last, each with the number of the autograd node that runs meanwhile.
        self._open: list[tuple[nn.Module, int]] = []
        # From this number of a node on, this module had been open in the forward pass.
        self._from: list[int] = [0]
        self._module: list[nn.Module | None] = [None]
        self._exits = ExitStack()

    def __enter__(self) -> Bookkeeper:
        with ExitStack() as exits:
            exits.enter_context(stance("force_eager"))
            if torch.backends.mha.get_fastpath_enabled():
                torch.backends.mha.set_fastpath_enabled(False)
                exits.callback(torch.backends.mha.set_fastpath_enabled, True)
            for module in self._modules.values():  # hooks for all modules at once would alarm the compiler
                exits.callback(module.register_forward_pre_hook(self._enter, prepend=True).remove)
                exits.callback(module.register_forward_hook(self._leave, always_call=True).remove)
            super().__enter__()
            exits.callback(super().__exit__, None, None, None)
            self._exits = exits.pop_all()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._exits.close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return opened(self, func, args, kwargs)
        result = func(*args, **kwargs)
        try:
            work = self._plans[func]
        except KeyError:
            work = self._plans[func] = self._plan(func, result)
        if work is not None:
            self._note(work, args, kwargs, result)
        return result

    def _plan(self, func: Any, result: Any) -> Work | None:
        work = work_of(func)
        if work is None and isinstance(result, torch.Tensor) and getattr(func, "namespace", "aten") not in _KNOWN:
            self.unknown.add(func._schema.name)
        return work

    def _note(self, work: Work, args: Any, kwargs: Any, result: Any) -> None:
        dtype = work.dtype(args, result)
        if dtype is None:
            return
        where, module = self._place()
        name = OUTSIDE if module is None else self._names[id(module)]
        label = _label(module, where) if work.kind == "product" else None
        if label is None:
            label = _NAMES.get(dtype) or str(dtype).removeprefix("torch.")
            if self._tf32 and dtype is torch.float32 and work.kind == "product" and _in_tf32(args[work.operand :]):
                label = "tf32"
        key = Key(name, where, work.kind, label)
        self.work[key] = self.work.get(key, 0.0) + work.amount(args, kwargs, result)

    def _place(self) -> tuple[str, nn.Module | None]:
        node = _node()
        if node == _NO_NODE or (self._open and self._open[-1][1] == node):  # the latter: a forward that is recomputed
            return "forward", self._open[-1][0] if self._open else None
        if node == _UNNUMBERED:
            return "backward", None
        return "backward", self._module[bisect_right(self._from, node) - 1]

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._open.append((module, _node()))
        self._mark()

    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        for place in range(len(self._open) - 1, -1, -1):
            if self._open[place][0] is module:
                del self._open[place:]  # above it are modules at most that were left without a word
                self._mark()
                return

    def _mark(self) -> None:
        number = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        if number >= self._from[-1]:  # another thread numbers its own nodes: what it recomputes keeps its old nodes
            self._from.append(number)
            self._module.append(self._open[-1][0] if self._open else None)


def _node() -> int:
    node = torch._C._current_autograd_node()
    return _NO_NODE if node is None else node._sequence_nr()


def _label(module: nn.Module | None, where: str) -> str | None:
    """The layer's own word for what its products run in: ``ledger_dtype``, one name or one for each direction."""
    given = getattr(module, "ledger_dtype", None)
    label = given.get(where) if isinstance(given, Mapping) else given
    return None if label is None else str(label).removeprefix("torch.")


_NAMES = {d: str(d).removeprefix("torch.") for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
_DROPPED = (1 << 13) - 1  # bits of a float32 that TF32 has not


def _in_tf32(operands: Sequence[Any]) -> bool:
    """Whether a product of float32 runs in TF32: by the switch where hardware does it, elsewhere by its operands."""
    tensors = [t for t in operands if isinstance(t, torch.Tensor) and t.dtype is torch.float32][:2]
    if tensors and tensors[0].is_cuda:
        return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
    return all(not bool((t.contiguous().view(torch.int32) & _DROPPED).any()) for t in tensors)
