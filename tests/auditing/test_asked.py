"""Wrong arguments are refused in words that say what is allowed, before anything is run."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from torch import nn

from precision_runtime import audit, audit_training, headroom, sensitivity, shrink
from precision_runtime.auditing import compare
from precision_runtime.errors import ConfigurationError

X = torch.ones(2)
MODE: dict[str, Any] = {"mode": "bf16-true"}


def train(**options: Any) -> Any:
    return audit_training(lambda: nn.Linear(8, 1), None, None, [], "bf16-true", **options)


ASKERS = {
    "audit": lambda **options: audit(torch.sin, X, **MODE, **options),
    "headroom": lambda **options: headroom(torch.sin, X, **MODE, **options),
    "sensitivity": lambda **options: sensitivity(torch.sin, X, **options),
    "shrink": lambda **options: shrink(torch.sin, (X,), None, **MODE, **options),
    "audit_training": train,
}
BUDGETS = ["2", None, True, -1, float("nan"), torch.ones(2)]


@pytest.mark.parametrize("asker", ASKERS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_a_budget_is_a_number_from_zero_up(asker: str, budget: object) -> None:
    with pytest.raises(ConfigurationError, match=r"^budget=.* is not allowed: the bits that may be lost are a number"):
        ASKERS[asker](budget=budget)


@pytest.mark.parametrize("asker", ASKERS)
@pytest.mark.parametrize("seed", ["2", None, True, 1.5, 2**64])
def test_a_seed_is_a_whole_number(asker: str, seed: object) -> None:
    with pytest.raises(ConfigurationError, match=r"^seed=.* is not allowed: a seed is a whole number"):
        ASKERS[asker](seed=seed)


@pytest.mark.parametrize("limit", ["3", 0, 65, 2.5, True])
def test_a_limit_is_a_number_of_powers_of_two(limit: object) -> None:
    with pytest.raises(ConfigurationError, match=r"^limit=.* is not allowed: headroom\(\) tries 1 to 64"):
        headroom(torch.sin, X, mode="16-true", limit=limit)  # type: ignore[arg-type]


def test_numbers_of_numpy_are_numbers() -> None:
    report = audit(torch.sin, X, mode="bf16-true", budget=numpy.float64(3), seed=numpy.int64(2))
    assert report.ok
    assert type(report.budget) is float


@pytest.mark.parametrize("budget", BUDGETS)
def test_so_it_is_where_values_are_compared(budget: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^budget="):
        compare(X, X, mode="bf16-true", budget=budget)


def test_a_module_is_no_function_that_makes_one() -> None:
    with pytest.raises(ConfigurationError, match=r"got a Linear as make_model; pass a function that makes it"):
        audit_training(nn.Linear(8, 1), None, None, [], "bf16-true")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [(X, None, "got Tensor as args; pass the inputs as a tuple"), ((X,), [1], "got list as kwargs; pass a dict")],
)
def test_shrink_takes_inputs_as_a_tuple(args: Any, kwargs: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        shrink(torch.sin, args, kwargs, "16-true")


@pytest.mark.parametrize("ask", [headroom, audit])
def test_what_cannot_be_called_cannot_be_judged(ask: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"\(\) got Tensor as the function to judge"):
        ask(X, X, mode="16-true")
