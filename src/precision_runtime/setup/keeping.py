"""How a part of a model is kept wide: its tensors through every cast, its arithmetic at every call.

Both are instance attributes of plain classes, so they go along with ``copy.deepcopy`` and ``pickle``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import nn

from precision_runtime.casting import CAST, FLOATING, TO, TO_DOUBLE, CastTable, cast_call
from precision_runtime.setup.forwarding import PatchedApply, PatchedForward, is_suspended
from precision_runtime.tree import leaves, map_tensors

COMPLEX = MappingProxyType({torch.float32: torch.complex64, torch.float64: torch.complex128})
_REAL = MappingProxyType(
    {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}
)


@dataclass(frozen=True)
class Island:
    """One part that is kept wide. ``dtype`` is the least that its tensors have; ``reason`` says who asked for it."""

    path: str
    kind: Literal["module", "parameter", "buffer"]
    dtype: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path} ({self.kind}) stays in {self.dtype}: {self.reason}"


class IslandForward(PatchedForward):
    """The forward of an island: floating inputs to its dtype, autocast off, what it made wide back to ``outer``.

    ``outer`` is the dtype that the surrounding mode keeps activations in: half in true, quantised and FP8 modes, and
    float32 under autocast, which casts by itself what its ops need. Results without dimensions (a loss) stay wide: by
    torch's rules of promotion they widen nothing else, and rounding a loss would lose what the island was for.
    """

    def __init__(self, module: nn.Module, island: Island, outer: torch.dtype, device: str) -> None:
        super().__init__(module)
        self.island, self.device = island, device
        inner = getattr(torch, island.dtype)
        self.input_table: CastTable = dict(TO_DOUBLE if inner is torch.float64 else TO[inner])  # a proxy has no pickle
        self.output_table: CastTable = {}
        if inner is not outer:
            back = {inner: outer}
            if inner is torch.float64 and outer in COMPLEX:
                back[COMPLEX[inner]] = COMPLEX[outer]
            self.output_table = back

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Run the module wide, or plainly inside ``forwarding.suspended()``."""
        if not torch.compiler.is_dynamo_compiling() and is_suspended():
            return self.__wrapped__(*args, **kwargs)
        args, kwargs = cast_call(args, kwargs, self.input_table)
        with torch.autocast(self.device, enabled=False):
            # Not __wrapped__: torch.compile must see through this line.
            if self.own is None:
                result = type(self.module).forward(self.module, *args, **kwargs)
            else:
                result = self.own(*args, **kwargs)
        return self._back(result)

    def _back(self, result: Any) -> Any:
        table = self.output_table
        if not table:
            return result
        if isinstance(result, torch.Tensor):
            return _narrowed(result, table)
        if not any(tensor.dtype in table for _, tensor in leaves(result, objects=False)):
            return result
        return map_tensors(lambda tensor: _narrowed(tensor, table), result, objects=False)

    def __repr__(self) -> str:
        return f"<forward of {type(self.module).__name__}, an island in {self.island.dtype}>"


def _narrowed(tensor: torch.Tensor, table: CastTable) -> torch.Tensor:
    target = table.get(tensor.dtype) if tensor.dim() else None
    if target is None:
        return tensor
    return CAST[target](tensor) if target in CAST else tensor.to(target)


class Keeper(PatchedApply):
    """The ``_apply`` of a module that holds what is kept: tensors move as asked, and never become narrower.

    ``whole`` is the island that the module itself is, with everything below it, or None; ``parts`` are its own
    parameters and buffers, by name.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.whole: Island | None = None
        self.parts: dict[str, Island] = {}

    def __call__(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """As ``nn.Module._apply``."""
        whole = None if self.whole is None else getattr(torch, self.whole.dtype)
        parts = self._by_id()

        def kept(tensor: torch.Tensor) -> torch.Tensor:
            least = parts.get(id(tensor), whole)
            return fn(tensor) if least is None else at_least(least, tensor, fn)

        module: nn.Module = self.__wrapped__(kept, recurse)
        return module

    def _by_id(self) -> Mapping[int, torch.dtype]:
        found = {}
        for name, island in self.parts.items():
            tensor = self.module._parameters.get(name, self.module._buffers.get(name))
            if tensor is not None:
                found[id(tensor)] = getattr(torch, island.dtype)
                if tensor.grad is not None:
                    found[id(tensor.grad)] = getattr(torch, island.dtype)
        return found


def at_least(least: torch.dtype, before: torch.Tensor, fn: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """``fn(before)``, a cast or a move, but in ``least`` where ``fn`` would make it narrower than that.

    Whole numbers and packed storage are none of an island's business. A complex tensor stays complex.
    """
    real = _REAL.get(before.dtype)
    if real is not None:
        # What a cast does to real tensors, asked of one: on complex ones torch drops the imaginary part, and warns.
        probe = fn(torch.empty((), dtype=real, device=before.device))
        wanted = COMPLEX[wider(least, probe.dtype if probe.dtype in FLOATING else real)]
        if probe.dtype is real and before.dtype is wanted:
            return fn(before)
        return before.to(probe.device, wanted)
    after = fn(before)
    if before.dtype not in FLOATING:
        return after
    wanted = wider(least, after.dtype) if after.dtype in FLOATING else least
    if after.dtype is wanted:
        return after
    if before.device == after.device and before.stride() == after.stride():
        return before.to(wanted)
    return torch.empty_like(after, dtype=wanted).copy_(before)


def wider(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """The wider of two floating dtypes."""
    return a if torch.finfo(a).bits >= torch.finfo(b).bits else b
