import math

import pytest
import torch
from torch import nn

from precision_runtime.errors import ConfigurationError
from precision_runtime.runtime import PrecisionRuntime
from precision_runtime.setup.islands import islands_in
from precision_runtime.setup.tables import find_tables, law_of

LADDER = "values in ascending or descending order, such as frequencies or positions"


def frequencies(dim=64, base=10000.0):
    return base ** -(torch.arange(0, dim, 2) / dim)


def rescaled(freq):
    """Llama 3's rule for longer contexts: slow frequencies are divided, those between are blended."""
    turns = 8192 * freq / (2 * math.pi)
    blend = ((turns - 1) / (4 - 1)).clamp(0, 1)
    return freq / 8 * (1 - blend) + freq * blend


def sinusoids(rows, dim):
    angle = torch.outer(torch.arange(rows).float(), frequencies(dim))
    table = torch.zeros(rows, dim)
    table[:, 0::2], table[:, 1::2] = angle.sin(), angle.cos()
    return table


BETAS = torch.linspace(1e-4, 0.02, 1000)
TABLES = {
    "frequencies": frequencies(),
    "few frequencies": frequencies(8),
    "rescaled frequencies": rescaled(frequencies(128, 500000.0)),
    "positions": torch.arange(5000.0),
    "steps of a diffusion": torch.cumprod(1 - BETAS, 0),
    "edges of bins": torch.linspace(-1, 1, 255),
    "with axes of length one": frequencies()[None, :, None],
}
SINUSOIDS = {
    "sines and cosines in turns": sinusoids(512, 64),
    "long": sinusoids(20000, 32),
    "cosines of a rotary embedding": torch.outer(torch.arange(2048.0), frequencies()).cos()[None, None],
    "angles": torch.outer(torch.arange(100.0), frequencies()),
}
torch.manual_seed(0)
OTHERS = {
    "random vector": torch.randn(64),
    "random matrix": torch.randn(64, 64),
    "one random column among sinusoids": torch.cat([sinusoids(64, 8), torch.randn(64, 1)], 1),
    "constant": torch.full((64, 8), 0.1),
    "mask": torch.full((32, 32), -1e9).triu(1),
    "mask of inf": torch.full((32, 32), -torch.inf).triu(1),
    "few values": torch.tensor([0.485, 0.456, 0.406]),
    "whole numbers": torch.arange(5000),
    "flags": torch.ones(64, 64).bool(),
    "number": torch.tensor(0.1),
    "empty": torch.zeros(0),
    "five axes": torch.randn(2, 2, 2, 2, 2),
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_a_vector_in_order_is_a_table(table):
    assert law_of(table) == law_of(table.flip(0) if table.dim() == 1 else table) == LADDER


@pytest.mark.parametrize("table", SINUSOIDS.values(), ids=SINUSOIDS)
def test_sinusoids_of_positions_are_a_table(table):
    assert law_of(table) == "sinusoids of positions"


@pytest.mark.parametrize("table", OTHERS.values(), ids=OTHERS)
def test_other_values_are_no_table(table):
    assert law_of(table) == ""


def test_random_values_are_seldom_taken_for_a_table():
    # Two of the 8! orders of eight different values are in order: one in 20,160.
    generator = torch.Generator().manual_seed(1)
    found = sum(bool(law_of(torch.randn(8, generator=generator))) for _ in range(2000))
    assert found <= 2
    assert not any(law_of(torch.randn(8, 1, 3, generator=generator).squeeze()) for _ in range(500))


class Holder(nn.Module):
    def __init__(self, **buffers):
        super().__init__()
        for name, value in buffers.items():
            self.register_buffer(name, value.clone(), persistent=False)

    def forward(self, x):
        return x * next(iter(self._buffers.values())).to(x.dtype).sum()


def found(model, dtype=torch.bfloat16):
    return [(i.path, i.kind, i.dtype, i.reason) for i in find_tables(model, dtype)]


def test_a_module_without_parameters_is_the_island_otherwise_the_buffer_alone():
    model = nn.Sequential(Holder(inv_freq=frequencies()), nn.Sequential(nn.Linear(2, 2)))
    model[1].register_buffer("inv_freq", frequencies())
    model.register_buffer("places", torch.arange(5000.0))
    assert found(model) == [
        ("places", "buffer", "float32", f"auto: it holds {LADDER}"),
        ("0", "module", "float32", f"auto: its buffer 'inv_freq' holds {LADDER}"),
        ("1.inv_freq", "buffer", "float32", f"auto: it holds {LADDER}"),
    ]


def test_complex_and_float64_buffers_are_protected_whatever_they_hold():
    model = nn.Sequential(Holder(a=torch.randn(3).double(), b=torch.randn(3) + 1j, c=torch.randn(3).double() + 1j))
    assert found(model) == [
        ("0.a", "buffer", "float64", "auto: a float64 buffer"),
        ("0.b", "buffer", "float32", "auto: a complex buffer"),
        ("0.c", "buffer", "float64", "auto: a complex buffer"),
    ]


def test_what_the_cast_does_not_change_and_running_statistics_are_left():
    norm = nn.BatchNorm1d(8)
    norm.running_mean.copy_(torch.arange(8.0) + 0.1)
    exact = Holder(powers=2.0 ** torch.arange(8.0), few=torch.arange(200.0))
    assert found(nn.Sequential(norm, exact)) == []
    assert [f[0] for f in found(nn.Sequential(Holder(few=torch.arange(300.0))))] == ["0"]
    assert found(nn.Sequential(Holder(few=torch.arange(300.0))), torch.float16) == []


@pytest.mark.parametrize("mode", ["bf16-true", "16-true", "bf16-mixed", "tf32", "32-true", "64-true"])
def test_auto_keeps_tables_where_the_mode_would_harm_them(mode):
    model = nn.Sequential(Holder(inv_freq=frequencies()), nn.Linear(8, 8))
    runtime = PrecisionRuntime(mode, "cpu", islands="auto")
    runtime.setup(model)
    want = {"32-true": [], "64-true": [], "tf32": [("0", "float64")]}.get(mode, [("0", "float32")])
    assert [(i.path, i.dtype) for i in runtime.islands] == [(i.path, i.dtype) for i in islands_in(model)] == want
    if mode != "64-true":
        assert torch.equal(model[0].inv_freq.float(), frequencies())
    assert model(torch.randn(2, 8)).isfinite().all()


def test_auto_goes_along_with_names():
    model = nn.Sequential(Holder(inv_freq=frequencies()), nn.LayerNorm(8), nn.Linear(8, 8))
    runtime = PrecisionRuntime("bf16-true", "cpu", islands=("auto", "1"))
    runtime.setup(model)
    assert [i.path for i in runtime.islands] == ["0", "1"]
    assert [p.dtype for p in model.parameters()] == [torch.float32] * 2 + [torch.bfloat16] * 2


def test_auto_says_that_it_cannot_judge_what_holds_nothing():
    model = nn.Sequential(Holder(inv_freq=frequencies()).to("meta"))
    with pytest.raises(ConfigurationError, match=r"'0\.inv_freq' is on the meta device"):
        list(find_tables(model, torch.bfloat16))


def test_auto_keeps_a_product_of_positions_and_frequencies_out_of_autocast():
    class Rotary(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("inv_freq", frequencies(), persistent=False)

        def forward(self, x):
            angle = torch.arange(x.shape[-2]).float()[:, None] @ self.inv_freq[None]
            return torch.cat([angle.cos(), angle.sin()], -1)

    exact = torch.outer(torch.arange(500.0).double(), frequencies().double()).cos()
    worst = {}
    for islands in ("auto", ()):
        model = nn.Sequential(Rotary())
        PrecisionRuntime("bf16-mixed", "cpu", islands=islands).setup(model)
        worst[islands] = (model(torch.randn(500, 64))[:, :32] - exact).abs().max().item()
    assert worst["auto"] < 2.0**-14  # angles of 500 radians in float32
    assert worst[()] > 1.0  # 499 is 500 in bfloat16
