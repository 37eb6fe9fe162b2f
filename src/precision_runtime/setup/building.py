"""Models made directly in a mode: what ``init_module`` opens.

Modules are made on the device in the caller's own default dtype, and cast when the block ends, exactly as ``setup``
casts. Others set a half default dtype instead, and get another model: sinusoids and rotary tables are then computed
in half, where positions above 256 are not even whole numbers, initial values are drawn in half, and whatever names
its dtype escapes the mode. Here the same seed gives the same model as ``setup(Net())``, bit by bit; in 64-true, where
the cast has nothing to save, with more digits (``doubles``).
"""

from __future__ import annotations

import threading
import weakref
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from precision_runtime.setup.islands import keep_built
from precision_runtime.setup.lazy import refuse_lazy

if TYPE_CHECKING:
    from precision_runtime.strategies import Strategy


class Building:
    """Context manager: modules that this thread makes inside are on the strategy's device, and after it in its mode.

    What held when it was entered is put back when it is left, also by an exception; then nothing is cast.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy

    def __enter__(self) -> None:
        self._made: dict[int, weakref.ref[nn.Module]] = {}
        self._thread = threading.get_ident()
        self._hooks = [
            register_module_parameter_registration_hook(self._registered),
            register_module_buffer_registration_hook(self._registered),
            register_module_module_registration_hook(self._registered),
        ]
        self._device = torch.device(self.strategy.device)
        self._device.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._device.__exit__(kind, error, trace)
        for hook in self._hooks:
            hook.remove()
        if kind is None:
            roots = self._roots()
            for root in roots:
                refuse_lazy(root, self.strategy.mode)
            keep_built(roots, self.strategy)
            self._convert(roots)

    def _convert(self, roots: list[nn.Module]) -> None:
        self.strategy.convert_all(roots)

    def _registered(self, module: nn.Module, name: str, value: Any) -> None:
        if threading.get_ident() == self._thread:
            self._made[id(module)] = weakref.ref(module)

    def _roots(self) -> list[nn.Module]:
        made = [m for m in (ref() for ref in self._made.values()) if m is not None]
        parts = {id(part) for m in made for part in m.modules() if part is not m}
        return [m for m in made if id(m) not in parts]
