"""What a function gives, in whatever form: numbers, arrays and what is yielded are judged; nothing is an error."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from precision_runtime import audit, headroom
from precision_runtime.auditing import compare
from precision_runtime.errors import ConfigurationError


def naive(x: torch.Tensor) -> torch.Tensor:
    return torch.log(1.0 + torch.exp(20.0 * x))


def steady(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.softplus(20.0 * x)


def parts(f: Callable[..., torch.Tensor], x: torch.Tensor) -> Iterator[torch.Tensor]:
    for row in x:
        yield f(row)


FORMS: dict[str, Callable[..., Any]] = {
    "tensor": lambda f, x: f(x),
    "array": lambda f, x: f(x).detach().numpy(),
    "lists": lambda f, x: {"rows": f(x).tolist()},
    "number": lambda f, x: f(x).sum().item(),
    "numpy number": lambda f, x: np.float64(f(x).sum().item()),
    "generator": parts,
    "map": map,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_result_is_judged(form: str) -> None:
    x = torch.linspace(-1.5, 1.5, 32).reshape(4, 8)
    assert not audit(lambda x: FORMS[form](naive, x), x, mode="16-true", gradients=False).ok
    assert audit(lambda x: FORMS[form](steady, x), x, mode="16-true", gradients=False).ok


def test_a_whole_number_is_a_decision() -> None:
    x = torch.arange(1.0, 65.0).reshape(8, 8)
    assert audit(lambda x: int(x.sum(-1).argmax()), x, mode="bf16-true", gradients=False).ok
    report = audit(lambda x: [int(v) for v in (x * 20.0 + 1.0).flatten()], x, mode="bf16-true", gradients=False)
    assert not report.ok, "bfloat16 has no odd numbers beyond 256, and x is exact in it"


@pytest.mark.parametrize(
    ("nothing", "said"),
    [
        (lambda x: None, r"gave None \(is a return missing\?\)"),
        (lambda x: {1, 2}, "gave a set"),
        (lambda x: nn.Linear(3, 4), "gave a Linear"),
    ],
)
def test_nothing_to_judge_is_an_error(nothing: Callable[..., Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        audit(nothing, torch.randn(3), mode="bf16-true")


def test_a_function_without_a_result_is_judged_by_its_modules() -> None:
    layer = nn.Linear(8, 8)

    def forget(x: torch.Tensor) -> None:
        layer(x)

    report = audit(forget, torch.randn(4, 8), mode="bf16-true")
    assert report.calls == 1
    assert any(r.kind == "not-judged" and "is a return missing?" in r.message for r in report.remarks)


def test_a_coroutine_is_refused_and_what_runs_it_is_not() -> None:
    async def later(x: torch.Tensor) -> torch.Tensor:
        return x * 2.0

    with pytest.raises(ConfigurationError, match="still to be awaited"):
        audit(later, torch.randn(3), mode="bf16-true")
    assert audit(lambda x: asyncio.run(later(x)), torch.randn(3), mode="bf16-true").ok


@pytest.mark.parametrize(
    ("actual", "reference", "same"),
    [
        (1.0, 5.0, False),
        (1.0, 1.0, True),
        ([1.0], [5.0], False),
        (np.ones(3), np.zeros(3), False),
        (torch.ones(3).half(), np.ones(3), True),
        (torch.ones(3, dtype=torch.int), torch.zeros(3, dtype=torch.int), False),
        (torch.tensor([True, False]), torch.tensor([True, True]), False),
        (torch.arange(3), torch.arange(3), True),
        (3, 3, True),
        (3, 4, False),
        (2 + 1j, 2 + 1j, True),
    ],
)
def test_numbers_and_arrays_are_compared_and_whole_numbers_exactly(actual: Any, reference: Any, same: bool) -> None:
    report = compare(actual, reference, mode="16-true")
    assert report.ok is same, report
    if not same:
        assert report.findings[0].worst is not None


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="nothing to compare"):
        compare(None, None, mode="16-true")


def test_headroom_asks_for_something_to_judge_as_well() -> None:
    with pytest.raises(ConfigurationError, match="nothing to judge"):
        headroom(lambda x: None, torch.randn(3), mode="16-true")
