"""Modules are found behind whatever is called, under the name that a reader would use."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from precision_runtime.auditing.executing.discover import find_modules, name_of

A, B = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU())


def uses_globals(x: torch.Tensor) -> torch.Tensor:
    return B(A(x))


def with_defaults(x: torch.Tensor, layer: nn.Module = A, *, head: nn.Module = B) -> torch.Tensor:
    return head(layer(x))


class Pipeline:
    """No module, but holds some."""

    def __init__(self) -> None:
        self.encoder, self.heads = A, [B]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.heads[0](self.encoder(x))

    def run(self, x: torch.Tensor) -> torch.Tensor:
        return self(x)


def closures() -> dict[str, tuple[Callable[..., Any], dict[str, nn.Module]]]:
    net = B
    inner = lambda x: net(x)  # noqa: E731
    return {
        "module": (B, {"": B}),
        "bound method of a module": (B.forward, {"": B}),
        "closure": (inner, {"net": B}),
        "closure in a closure": (lambda x: inner(x) + 1, {"net": B}),
        "globals": (uses_globals, {"A": A, "B": B}),
        "defaults": (with_defaults, {"linear": A, "head": B}),
        "partial": (functools.partial(with_defaults, layer=A), {"linear": A, "head": B}),
        "object": (Pipeline(), {"encoder": A, "heads[0]": B}),
        "bound method": (Pipeline().run, {"encoder": A, "heads[0]": B}),
        "plain function": (torch.add, {}),
    }


@pytest.mark.parametrize("case", closures())
def test_modules_are_found(case: str) -> None:
    function, expected = closures()[case]
    found = find_modules(function, (), {})
    assert set(map(id, found.values())) == set(map(id, expected.values()))
    if case not in ("partial", "defaults"):
        assert {k: id(v) for k, v in found.items()} == {k: id(v) for k, v in expected.items()}


def test_arguments_are_roots_and_parts_of_others_are_not() -> None:
    found = find_modules(torch.add, (1, A), {"head": B, "part": B[0]})
    assert {k: id(v) for k, v in found.items()} == {"args[1]": id(A), "head": id(B)}


def test_names_are_unique() -> None:
    first, second = nn.Linear(1, 1), nn.Linear(1, 1)

    def make(net: nn.Module) -> Callable[..., Any]:
        return lambda x: net(x)

    one, two = make(first), make(second)
    assert set(find_modules(lambda x: one(x) + two(x), (), {})) == {"net", "net#2"}


def test_functions_that_call_each_other_end() -> None:
    def ping(x: Any) -> Any:
        return pong(x)

    def pong(x: Any) -> Any:
        return ping(x)

    assert find_modules(ping, (), {}) == {}


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (A, "Linear"), (functools.partial(functools.partial(B)), "Sequential"), (uses_globals, "uses_globals"),
        (Pipeline().run, "Pipeline.run"), (Pipeline(), "Pipeline"), (lambda x: x, "<lambda>"),
        (torch.relu, "relu"), (torch.nn.functional.gelu, "gelu"),
    ],
)  # fmt: skip
def test_a_report_calls_things_by_their_names(function: Any, name: str) -> None:
    assert name_of(function) == name
