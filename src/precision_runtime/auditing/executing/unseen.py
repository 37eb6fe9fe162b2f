"""What the audit itself computes on a run's tensors is no op of the judged code: its dispatch modes do not see it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

from precision_runtime.tree import leaves

# What needs no closer look, which takes longer than many a small module.
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, int, float, bool, str, type(None)))


def unseen(*values: Any) -> AbstractContextManager[Any]:
    """For the time of the block no dispatch mode sees what is done with the tensors in ``values``.

    Tensors that are made of other ones (nested tensors of jagged layout, among others) are themselves written in
    Python, and crash the process where dispatch to Python is off altogether, which is the faster way.
    """
    if all(_plain(value) for value in values):
        return torch._C._DisableTorchDispatch()
    if any(is_traceable_wrapper_subclass(t) for _, t in leaves(values, objects=False)):
        return _disable_current_modes()
    return torch._C._DisableTorchDispatch()


def _plain(value: Any) -> bool:
    """Whether a module's arguments, keywords or result are plain tensors and numbers, at first sight."""
    parts = value if type(value) is tuple else value.values() if type(value) is dict else (value,)
    return all(type(part) in _PLAIN for part in parts)


def made_of_others(types: Iterable[type]) -> bool:
    """Whether an op's operands (their types, as a dispatch mode is told) are tensors that are made of other ones.

    A mode that answers NotImplemented then sees the ops on those others instead: they hold the numbers.
    """
    return any(hasattr(kind, "__tensor_flatten__") for kind in types)


def transformed() -> bool:
    """Whether code runs inside a transform of ``torch.func``, where tensors carry tangents, or is read by the compiler.

    Tensors of a transform stand for others: they have no storage to take a snapshot of, and no number that Python could
    ask for. What a call with tangents (forward mode) computes is more than its inputs and results show. The compiler
    also reads the code that ``torch.cond`` and ``flex_attention`` are given.
    """
    if torch.compiler.is_compiling():
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def traced() -> bool:
    """Whether ``make_fx`` writes down what runs, on tensors whose numbers nobody may ask for; the graph runs later."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
