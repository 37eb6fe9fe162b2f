"""What our dispatch modes have in common: the compiler skips them, and operators that take functions run under them.

Torch refuses such operators (``torch.cond``, ``flex_attention``, …) under a mode that does not say how to run them.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch._C import DispatchKey
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

from precision_runtime.uncompiled import uncompiled


class OwnMode(TorchDispatchMode):
    """Base of the dispatch modes; their ``__torch_dispatch__`` hands a ``HigherOrderOperator`` to ``opened``."""

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch's guard against its compiler costs more than what is done here with most ops

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__torch_dispatch__" in cls.__dict__:
            uncompiled(cls.__torch_dispatch__)


# Control flow: it calls its functions, and a mode has to see what these compute.
_CALLING = frozenset(
    ("cond", "while_loop", "scan", "associative_scan", "map_impl", "invoke_subgraph", "tag_activation_checkpoint")
)
# Computes by plain operators, which a mode has to see.
_PLAIN = frozenset(("flex_attention", "flex_attention_backward"))

_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial, nn.Module)


def opened(
    mode: TorchDispatchMode, operator: HigherOrderOperator, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Run ``operator`` so that ``mode``, which it has been dispatched to, sees what it consists of.

    Operators that are neither control flow nor made of plain ones (compiled kernels, among others) run as one.
    """
    name = operator.name()
    kernel = operator.py_kernels.get(DispatchKey.CompositeExplicitAutograd) if name in _PLAIN else None
    if kernel is not None:
        with _again(mode):
            return kernel(*args, **kwargs)
    if name in _CALLING:
        args = [_seen(mode, a) if isinstance(a, _FUNCTIONS) else a for a in args]
    return operator(*args, **kwargs)


def _seen(mode: TorchDispatchMode, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function, updated=())
    def call(*args: Any, **kwargs: Any) -> Any:
        with _again(mode):
            return function(*args, **kwargs)

    return call


@contextmanager
def _again(mode: TorchDispatchMode) -> Iterator[None]:
    """The mode on top, as a mode and nothing else: entering it may do more."""
    TorchDispatchMode.__enter__(mode)
    try:
        yield
    finally:
        TorchDispatchMode.__exit__(mode, None, None, None)
