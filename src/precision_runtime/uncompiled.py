"""Keeps torch's compiler off our code in the middle of the user's, and off the user's where each op has to show."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

# Modules that compile, the second by itself when it is called. Where neither has been loaded nothing is compiled, and
# to load the compiler for nothing would take seconds.
_COMPILING = frozenset(("torch._dynamo", "torch.nn.attention.flex_attention"))

F = TypeVar("F", bound=Callable[..., Any])


def uncompiled(function: F) -> F:
    """Have the compiler skip ``function`` and all that it calls.

    As ``torch.compiler.disable`` does, but by a mark on its code, once: a wrapper would take longer, at every call,
    than what a dispatch mode does with most operators. Without it the compiler would read the handler of a mode, op by
    op, while compiled code runs below it.
    """
    skip = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
    set_code_exec_strategy(function.__code__, skip)
    return function


def may_compile() -> bool:
    """Whether anything that compiles has been loaded."""
    return not _COMPILING.isdisjoint(sys.modules)


def stance(name: str) -> AbstractContextManager[Any]:
    """``torch.compiler.set_stance(name)`` where anything may be compiled; from the call on, to the end of the block."""
    if torch.compiler.is_compiling() or not may_compile():
        return nullcontext()
    found: AbstractContextManager[Any] = torch.compiler.set_stance(name)
    return found
