"""What did not have to be rounded: tables of constants, wherever they are made, and parameters that nothing casts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from precision_runtime import audit
from precision_runtime.auditing.executing.dispatch import LowWatch
from precision_runtime.auditing.executing.provenance import Provenance


def up(t: torch.Tensor) -> torch.Tensor:
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Table(nn.Module):
    """Times from 0 to 1, in the dtype of the input or in float32."""

    def __init__(self, careful: bool) -> None:
        super().__init__()
        self.careful = careful

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (n, t) in, (t,) out."""
        times = torch.linspace(0.0, 1.0, x.shape[-1], dtype=torch.float64)
        return times.to((up(x) if self.careful else x).dtype)


class Waves(nn.Module):
    """Multiplies by a wave of what its table says."""

    def __init__(self, careful: bool, inline: bool) -> None:
        super().__init__()
        self.times = Table(careful)
        self.inline = inline

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (n, t) in and out."""
        times = Table.forward(self.times, x) if self.inline else self.times(x)
        return x * torch.sin(100.0 * up(times)).to(x.dtype)


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("mode", ["16-true", "bf16-true"])
def test_a_table_in_half_is_found_in_whichever_module_it_is_made(mode: str, inline: bool) -> None:
    bad = audit(Waves(False, inline), inputs(8, 256), mode=mode)
    assert not bad.ok
    assert bad.findings[0].where == "forward"
    good = audit(Waves(True, inline), inputs(8, 256), mode=mode)
    assert good.ok, str(good)


class Times(nn.Module):
    """Times that depend on the input: what is computed of it has to be rounded somewhere."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (n, t) in, (t,) out."""
        return x.abs().cumsum(-1).mean(0) / x.shape[-1]


def test_what_is_computed_of_the_input_in_half_is_an_operand_still() -> None:
    model = Waves(False, False)
    model.times = Times()  # type: ignore[assignment]
    assert audit(model, inputs(8, 64), mode="16-true", gradients=False).ok


class Rotated(nn.Module):
    """Samples an image along a grid that a module of its own makes."""

    def __init__(self, careful: bool) -> None:
        super().__init__()
        self.grid = Table(careful)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (n, 1, s, s) in and out."""
        line = 2.0 * self.grid(x) - 1.0
        line = 0.9 * line + 0.01
        grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).expand(x.shape[0], -1, -1, -1)
        return functional.grid_sample(up(x), up(grid), align_corners=False).to(x.dtype)


@pytest.mark.parametrize("mode", ["16-true", "bf16-true"])
def test_it_is_the_grid_that_decides_where_an_image_is_sampled(mode: str) -> None:
    image = torch.sin(torch.linspace(0, 60, 192, dtype=torch.float64)).expand(2, 1, 192, 192).contiguous()
    assert not audit(Rotated(False), image, mode=mode, gradients=False).ok
    good = audit(Rotated(True), image, mode=mode, gradients=False)
    assert good.ok, str(good)


class Decay(torch.autograd.Function):
    """h_t = a h_{t-1} + x_t, whose backward carries its state in float32 or in the dtype of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, a: torch.Tensor, careful: bool) -> torch.Tensor:
        """Shapes (t, n) and (n,) in, (t, n) out."""
        ctx.save_for_backward(a)
        ctx.careful = careful
        state, states = torch.zeros_like(up(x[0])), []
        for row in up(x):
            state = up(a) * state + row
            states.append(state)
        return torch.stack(states).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Of x only."""
        (a,) = ctx.saved_tensors
        rows = up(grad) if ctx.careful else grad
        state, states = torch.zeros_like(rows[0]), []
        for row in reversed(rows):
            state = (a.to(rows.dtype) * state + row).to(rows.dtype)
            states.append(state)
        return torch.stack(states[::-1]).to(grad.dtype), None, None


class Scan(nn.Module):
    """Its decay is close to 1: one rounding of it to half changes how far it remembers by half."""

    def __init__(self, careful: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.careful = nn.Linear(8, 8), careful
        self.a = nn.Parameter(torch.full((8,), 0.99609375))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (t, 8) in and out."""
        result: torch.Tensor = Decay.apply(self.first(x), self.a, self.careful)  # type: ignore[no-untyped-call]
        return result


@pytest.mark.parametrize("mode", ["16-mixed", "bf16-mixed"])
def test_a_float32_parameter_that_autocast_leaves_alone_excuses_nothing(mode: str) -> None:
    bad = audit(Scan(False), inputs(256, 8), mode=mode)
    assert [f.where for f in bad.findings][:1] == ["backward"]
    good = audit(Scan(True), inputs(256, 8), mode=mode)
    assert good.ok, str(good)


def seen(made: Callable[[torch.Tensor], torch.Tensor], *buffers: torch.Tensor) -> bool:
    """Whether what is made of a random tensor is a table."""
    data = torch.randn(4)
    watch = LowWatch(torch.bfloat16)
    watch.provenance = Provenance(buffers, ())
    with watch:
        return watch.provenance.is_table(made(data))


def _written(t: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    t[:2] = data[:2]
    return t


def _foreach(t: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    torch._foreach_mul_([t], [data])
    return t


BUFFER = torch.rand(4)


@pytest.mark.parametrize(
    ("made", "table"),
    [
        (lambda x: torch.arange(4.0).cos(), True),
        (lambda x: torch.zeros_like(x) + torch.tensor([1.0, 2.0, 3.0, 4.0]), True),
        (lambda x: torch.ones(4).to(torch.bfloat16)[None].expand(2, 4), True),
        (lambda x: torch.arange(3.0) @ torch.eye(3), True),
        (lambda x: torch.full((3,), 0.5).mul_(torch.arange(3.0)), True),
        (lambda x: BUFFER.view(2, 2), True),
        (lambda x: x, False),
        (lambda x: x[None], False),
        (lambda x: torch.randn(4), False),
        (lambda x: torch.rand_like(torch.ones(4)), False),
        (lambda x: torch.arange(4.0) * x, False),
        (lambda x: _written(torch.zeros(4), x), False),
        (lambda x: _foreach(torch.ones(4), x), False),
        (lambda x: torch.full((3,), float(x[0])), False),
        (lambda x: torch.tensor([x[0].item(), 1.0]), False),
        (lambda x: torch.arange(4.0)[x.argsort()], False),
    ],
)
def test_a_table_is_made_of_constants_and_of_nothing_else(
    made: Callable[[torch.Tensor], torch.Tensor], table: bool
) -> None:
    assert seen(made, BUFFER) is table
