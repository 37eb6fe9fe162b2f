"""Code that writes in place is judged exactly as its twin that does not: what a call got and gave is kept as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from precision_runtime import audit
from precision_runtime.record import Report


class Wrong(nn.Module):
    """A variance by E[x^2] - E[x]^2, which cancels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of each row."""
        return x * ((x * x).mean(-1, keepdim=True) - x.mean(-1, keepdim=True) ** 2)


def by_method(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return y.mul_(3.0).add_(x)


def by_list(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    torch._foreach_mul_([y], 3.0)
    torch._foreach_add_([y], [x])
    return y


def by_out(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    torch.mul(y, 3.0, out=y)
    return torch.add(y, x, out=y)


def by_view(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    rows = y.view(-1)
    rows[:] = (3.0 * y).add(x).view(-1)
    return y


def by_numbers(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y.data.mul_(3.0)  # a version of its own: the counter of y does not see it
    y.data.add_(x)
    return y


def by_stealth(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    with torch.utils._python_dispatch._disable_current_modes():  # as compiled code and extensions hide their ops
        return y.mul_(3.0).add_(x)


def apart(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return y * 3.0 + x


class Parent(nn.Module):
    """Goes on with its part's result, in one of the ways above, and hands on what it wrote to."""

    def __init__(self, part: nn.Module, write: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.part, self.last, self.write = part, nn.Linear(64, 64), write

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (n, 64) in and out."""
        result: torch.Tensor = self.last(self.write(self.part(x), x))
        return result


def judged(part: nn.Module, write: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], gradients: bool) -> Report:
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)) + 30.0
    return audit(Parent(part, write), x, mode="bf16-true", gradients=gradients)


def of_the_part(report: Report) -> float:
    """The excess of the one finding on the part's forward."""
    (found,) = (f for f in report.findings if (f.module, f.where) == ("part", "forward"))
    return found.excess


@pytest.mark.parametrize(
    ("write", "gradients"),
    [
        *((write, False) for write in (by_method, by_list, by_out, by_view, by_numbers, by_stealth)),
        *((write, True) for write in (by_method, by_list, by_view, by_numbers)),  # torch does not differentiate out=
    ],
)
def test_a_wrong_part_is_named_although_its_result_is_written_to(
    write: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], gradients: bool
) -> None:
    ours, twin = judged(Wrong(), write, gradients), judged(Wrong(), apart, gradients)
    assert of_the_part(ours) == pytest.approx(of_the_part(twin), rel=1e-6)


@pytest.mark.parametrize("write", [by_method, by_list, by_view])
def test_a_right_one_is_not(write: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    assert judged(nn.Identity(), write, True).ok


def test_so_is_it_by_compiled_code() -> None:
    def write(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return y.mul_(3.0).add_(x)

    compiled = torch.compile(write, backend="aot_eager")
    ours, twin = judged(Wrong(), compiled, False), judged(Wrong(), apart, False)
    assert of_the_part(ours) == pytest.approx(of_the_part(twin), rel=1e-6)
