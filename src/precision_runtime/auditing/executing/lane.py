"""The context in which the judged forward pass runs, the first time and whenever a part of it is run again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from precision_runtime.auditing.executing.dispatch import LowWatch, Trace
from precision_runtime.errors import AuditError
from precision_runtime.strategies import Strategy
from precision_runtime.uncompiled import may_compile


@contextmanager
def lane(strategy: Strategy, watch: LowWatch) -> Iterator[None]:
    """The mode's own context; ``watch`` starts anew, because casting and copying the inputs is no part of the code.

    Raises ``AuditError`` where the mode is autocast and torch switched it off without a word.
    """
    device = strategy.device.type
    with strategy.autocast(), _unheard():
        if strategy.mode.autocast and not torch.is_autocast_enabled(device):
            raise AuditError(f"autocast takes no effect on {device}: torch switched it off silently")
        watch.frames[0] = Trace()
        yield


@contextmanager
def _unheard() -> Iterator[None]:
    """Without a warning of torch's compiler about inputs that are no leaves, as an audit's are.

    The compiler only keeps it from being shown, so that warnings taken for errors would end the compilation.
    """
    if not may_compile():
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
        yield
