"""The contract of a strategy. A strategy is an immutable value: it holds no model and no state."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import GeneratorType
from typing import Any, ClassVar

import torch
from torch import nn

from precision_runtime.casting import (
    CASTS_TO,
    NOTHING,
    TO,
    Casts,
    CastTable,
    cast_call,
    cast_module,
    cast_tree,
    casts,
)
from precision_runtime.modes import Mode
from precision_runtime.options import Options
from precision_runtime.setup.building import Building
from precision_runtime.setup.generating import generated
from precision_runtime.setup.swapping import Swap


@dataclass(frozen=True)
class Strategy:
    """What ``mode`` does on ``device``. Subclasses state their tables; only autocast changes how ``call`` runs.

    What derives from the mode is worked out once, into plain attributes: ``call`` runs at every forward, and the
    compiler must see through it.
    """

    mode: Mode
    device: torch.device
    options: Options = field(default_factory=Options)
    dtype: torch.dtype = field(init=False, repr=False, compare=False)  # of parameters
    compute: torch.dtype = field(init=False, repr=False, compare=False)  # of the bulk of the arithmetic
    module_table: CastTable = field(init=False, repr=False, compare=False)
    input_table: CastTable = field(init=False, repr=False, compare=False)
    input_casts: Casts = field(init=False, repr=False, compare=False)  # the same as functions

    # Whether floating outputs go to the default dtype, so that a loss outside is computed as in any other mode.
    default_outputs: ClassVar[bool] = False

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.mode, self.device, self.options)  # what was computed from them is computed again

    def __deepcopy__(self, memo: object) -> Strategy:
        return self

    def __post_init__(self) -> None:
        tables = self.tables(getattr(torch, self.mode.params))
        derived = (getattr(torch, self.mode.params), getattr(torch, self.mode.compute), *tables, casts(tables[1]))
        names = ("dtype", "compute", "module_table", "input_table", "input_casts")
        for name, value in zip(names, derived, strict=True):
            object.__setattr__(self, name, value)  # the documented way into a frozen dataclass

    def tables(self, dtype: torch.dtype) -> tuple[CastTable, CastTable]:
        """How parameters and buffers, and how forward's inputs, are cast in a mode with parameters of ``dtype``."""
        return NOTHING, NOTHING

    def convert(self, module: nn.Module) -> nn.Module:
        """Cast ``module`` in place and return it.

        Changes only ``param.data``, entries of ``_parameters``, ``_buffers`` and ``_modules``, instance attributes and
        the class of a module, so whoever keeps those can put everything back.
        """
        return cast_module(module, self.module_table)

    def convert_all(self, modules: list[nn.Module]) -> None:
        """Convert what was made together, in ``init_module``: parts of a model, perhaps."""
        for module in modules:
            self.convert(module)

    def swaps(self, module: nn.Module) -> list[Swap]:
        """The layers that ``convert`` would swap, and those of their kind that it would leave, with the reason."""
        return []

    def cast_inputs(self, tree: Any) -> Any:
        """``tree`` (any nesting) as forward gets it."""
        return cast_tree(tree, self.input_table)

    def cast_outputs(self, tree: Any) -> Any:
        """``tree`` as forward's caller gets it; a generator's values, and each of its steps runs in the mode."""
        if isinstance(tree, GeneratorType):
            return generated(tree, self.autocast, self.cast_inputs, self.cast_outputs)
        if not self.default_outputs:
            return tree
        return cast_tree(tree, TO[torch.get_default_dtype()])

    def autocast(self) -> AbstractContextManager[Any]:
        """The context that forward runs in; null in modes without autocast."""
        return contextlib.nullcontext()

    def backward(self) -> AbstractContextManager[Any]:
        """The context that the backward pass runs in; null where only the forward pass decides."""
        return contextlib.nullcontext()

    def stepped(self) -> None:
        """An optimizer has stepped. On XLA, which only notes down what it is told to do, this is when it is done."""
        if self.device.type == "xla":
            import torch_xla  # type: ignore[import-not-found]

            torch_xla.sync()

    def init_context(self) -> AbstractContextManager[None]:
        """Modules made inside are on the device, and after it in the mode, as ``convert`` would have made them."""
        return Building(self)

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run ``function(*args, **kwargs)`` as a forward: ``args`` and ``kwargs`` cast, the result cast."""
        # A layer's call, one tensor in and one out, goes without detours: they would cost 2 µs of 7, measured in turns.
        if len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor):
            (value,) = args
            cast = self.input_casts.get(value.dtype)
            result = function(value if cast is None else cast(value))
        else:
            args, kwargs = cast_call(args, kwargs, self.input_table)
            result = function(*args, **kwargs)
        if not isinstance(result, torch.Tensor):
            return self.cast_outputs(result)
        if not self.default_outputs:
            return result
        cast = CASTS_TO[torch.get_default_dtype()].get(result.dtype)
        return result if cast is None else cast(result)
