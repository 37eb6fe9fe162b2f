"""The sentinel at forward's door: names each input that the mode's cast makes inf or 0.

Targets of 1e5 become inf in float16, and a loss of NaN is all that a user sees of it. Off, nothing of this is there:
the sentinel is a patch of its own above the mode's, and is put there only where it was asked for.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo

from precision_runtime.casting import CastTable
from precision_runtime.errors import PrecisionError, unknown_names
from precision_runtime.planning.toll import Toll, toll
from precision_runtime.pointing import users_line
from precision_runtime.setup.forwarding import PatchedForward, is_suspended, patch_of
from precision_runtime.strategies import Strategy
from precision_runtime.tree import leaves

ANSWERS = ("keep", "warn", "raise")


class InputWarning(UserWarning):
    """The mode's cast of an input lost values."""


class InputError(PrecisionError, ValueError):
    """The mode's cast of an input would lose values; forward has not run."""


def answer_of(inputs: object) -> str:
    """The argument ``inputs``, checked. Raises ``UnknownNameError`` for anything but one of ``ANSWERS``."""
    if inputs not in ANSWERS:
        raise unknown_names("answer", [inputs], ANSWERS, "inputs")
    return str(inputs)


class Sentinel(PatchedForward):
    """The forward of a set-up module that looks at its inputs before they are cast.

    ``answer`` is "warn" (``InputWarning``) or "raise" (``InputError``). Whoever compiles the model gets a break in the
    graph here: values can be looked at only where they are.
    """

    def __init__(self, module: nn.Module, strategy: Strategy, answer: str) -> None:
        super().__init__(module)
        self.strategy, self.answer = strategy, answer

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Look, then run what stands below."""
        _look(self, args, kwargs)
        assert self.own is not None
        return self.own(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<{self.own!r}, inputs watched>"


def watch(module: nn.Module, strategy: Strategy, answer: str) -> None:
    """Watch the inputs of a set-up ``module``; another answer replaces the former, "keep" takes the sentinel away."""
    there = patch_of(module, Sentinel)
    if there is None:
        if answer != "keep":
            Sentinel(module, strategy, answer)
        return
    there.answer = answer
    if answer == "keep" and module.__dict__[PatchedForward.method] is there:
        there.undo()


def lost_inputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], table: CastTable
) -> Iterator[tuple[str, torch.Tensor, torch.dtype, Toll]]:
    """Each leaf of a call's arguments that loses values, by its path from the parameter's name on: ``batch.targets``.

    What ``cast_tree`` leaves alone is not looked at.
    """
    for path, tensor in _leaves(module, args, kwargs):
        target = table.get(tensor.dtype)
        paid = None if target is None else toll(tensor, target)
        if target is not None and paid is not None and (paid.inf or paid.zero):
            yield path, tensor, target, paid


@_disable_dynamo
def _look(sentinel: Sentinel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if is_suspended() or sentinel.answer == "keep":
        return
    strategy = sentinel.strategy
    found = [_sentence(*row) for row in lost_inputs(sentinel.module, args, kwargs, strategy.input_table)]
    if not found:
        return
    name = type(sentinel.module).__name__
    message = (
        f"{strategy.mode} casts the inputs of {name}.forward, and values are lost: {'; '.join(found)}. Scale them "
        "beforehand, keep what is no input of a product (targets, weights of a loss) outside of forward, or use a mode "
        "that keeps inputs wide (bf16-mixed, 16-mixed, 32-true)"
    )
    if sentinel.answer == "raise":
        raise InputError(f"{message}. Forward has not run; inputs='warn' only warns.")
    warnings.warn(message, InputWarning, stacklevel=users_line())


def _sentence(path: str, tensor: torch.Tensor, target: torch.dtype, paid: Toll) -> str:
    counts = [f"{paid.inf} inf"] if paid.inf else []
    counts += [f"{paid.zero} became 0"] if paid.zero else []
    before, after = (str(d).removeprefix("torch.") for d in (tensor.dtype, target))
    return f"{path}: {', '.join(counts)} (of {tensor.numel()}, {before} to {after})"


def _leaves(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in _arguments(module, args, kwargs):
        for path, tensor in leaves(value, objects=False):
            yield f"{name}{path}", tensor


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Values with the names that forward gives them; those of ``*args`` and ``**kwargs`` by their places and keys."""
    try:
        signature = inspect.signature(module.forward)
        bound = signature.bind(*args, **kwargs).arguments
    except (TypeError, ValueError):  # forward itself says best what is wrong with its arguments
        yield from ((f"args[{i}]", value) for i, value in enumerate(args))
        yield from kwargs.items()
        return
    for name, value in bound.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            yield from value.items()
        else:
            yield name, value
