import threading

import pytest
import torch
from torch import nn

from precision_runtime.modes import MODES
from precision_runtime.runtime import PrecisionRuntime


class Net(nn.Module):
    """Everything that a half default dtype treats otherwise than a cast does."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.z = nn.Parameter(torch.randn(2, dtype=torch.complex64))
        self.register_buffer("explicit", torch.ones(2).float() / 3)
        self.register_buffer("wide", torch.ones(2, dtype=torch.float64) / 3)
        self.register_buffer("positions", torch.sin(torch.arange(0, 300, 1.0)))
        self.register_buffer("count", torch.arange(3))


@pytest.mark.parametrize("mode", sorted({*MODES} - {"64-true"}))
def test_init_module_and_setup_give_the_same_model_bit_by_bit(mode):
    rt = PrecisionRuntime(mode, "cpu")
    torch.manual_seed(0)
    with rt.init_module():
        made = Net()
    torch.manual_seed(0)
    cast = rt.setup(Net())
    for (name, a), b in zip(made.state_dict().items(), cast.state_dict().values(), strict=True):
        assert a.dtype is b.dtype, name
        assert torch.equal(a, b), name
    assert rt.setup(made) is made
    assert torch.equal(made.wide, cast.wide)


class Drawn(nn.Module):
    """Whatever draws."""

    def __init__(self):
        super().__init__()
        self.linear, self.table, self.conv = nn.Linear(40, 40), nn.Embedding(30, 20), nn.Conv2d(3, 4, 3)
        self.lstm, self.attention = nn.LSTM(4, 4), nn.MultiheadAttention(8, 2)
        for name, draw in {
            "randn": torch.randn(40), "rand": torch.rand(3, 40), "like": torch.randn_like(torch.ones(5)),
            "normal": torch.normal(0.0, 1.0, (20,)), "around": torch.normal(torch.zeros(20), torch.ones(20)),
            "bernoulli": torch.bernoulli(torch.full((30,), 0.3)), "poisson": torch.poisson(torch.full((30,), 3.0)),
            "sided": torch.empty(8, 6).t().normal_(), "exponential": torch.empty(20).exponential_(),
            "whole": torch.randn(20, dtype=torch.float64), "order": torch.randperm(20),
        }.items():  # fmt: skip
            self.register_buffer(name, draw)


def test_64_true_draws_what_the_other_modes_draw():
    torch.manual_seed(0)
    with PrecisionRuntime("64-true", "cpu").init_module():
        made = Drawn()
    torch.manual_seed(0)
    plain = Drawn()
    for (name, a), b in zip(made.state_dict().items(), plain.state_dict().values(), strict=True):
        assert a.dtype is (torch.float64 if b.is_floating_point() else b.dtype), name
        assert torch.equal(a, b.to(a.dtype)), name


def test_64_true_computes_what_it_makes_in_float64():
    class Rotary(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("frequencies", 1 / torch.arange(1, 4.0))
            self.turns = torch.polar(torch.ones(3), torch.arange(3.0))  # neither parameter nor buffer
            self.weight = nn.init.trunc_normal_(nn.Parameter(torch.empty(50, 50)), std=0.02)

    runtime = PrecisionRuntime("64-true", "cpu")
    torch.manual_seed(0)
    with runtime.init_module():
        model = Rotary()
    torch.manual_seed(0)
    plain = Rotary()
    model = runtime.setup(model)
    assert model.frequencies.tolist() == [1.0, 1 / 2, 1 / 3]
    assert model.turns.dtype is torch.complex128
    assert torch.equal(model.turns, torch.polar(torch.ones(3).double(), torch.arange(3.0).double()))
    torch.testing.assert_close(model.weight, plain.weight.double(), rtol=1e-4, atol=1e-7)
    assert torch.get_default_dtype() is torch.float32


def test_64_true_puts_the_default_dtype_back_after_an_error_and_draws_as_the_caller_does():
    def build():
        with PrecisionRuntime("64-true", "cpu").init_module():
            raise KeyError

    with pytest.raises(KeyError):
        build()
    assert torch.get_default_dtype() is torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        with PrecisionRuntime("64-true", "cpu").init_module():
            made = nn.Linear(30, 30)
        torch.manual_seed(0)
        assert torch.equal(made.weight, nn.Linear(30, 30).weight)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_parts_have_the_dtype_of_the_mode():
    with PrecisionRuntime("bf16-true", "cpu").init_module():
        model = Net()
        loose = nn.Linear(2, 2)
    assert model.layer[0].weight.dtype is model.explicit.dtype is loose.weight.dtype is torch.bfloat16
    assert model.z.dtype is torch.complex64
    assert model.count.dtype is torch.long


def test_parameters_are_made_on_the_device():
    rt = PrecisionRuntime("bf16-true", "cpu")
    object.__setattr__(rt.strategy, "device", torch.device("meta"))  # the one other device of every machine
    with rt.init_module():
        model = nn.Linear(2, 2)
    assert (model.weight.device.type, model.weight.dtype) == ("meta", torch.bfloat16)
    assert torch.ones(1).device.type == "cpu"


def test_what_held_on_entering_holds_afterwards_not_what_held_when_the_context_was_built():
    context = PrecisionRuntime("bf16-true", "cpu").init_module()
    torch.set_default_dtype(torch.float64)
    try:
        with context:
            pass
        assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_an_exception_passes_through_and_leaves_no_hook_and_no_device():
    made = []

    def build():
        with PrecisionRuntime("16-true", "cpu").init_module():
            made.append(nn.Linear(2, 2))
            raise KeyError

    with pytest.raises(KeyError):
        build()
    assert made[0].weight.dtype is torch.float32
    assert nn.Linear(2, 2).weight.dtype is torch.float32
    assert not torch.nn.modules.module._global_parameter_registration_hooks


def test_models_made_before_or_by_other_threads_are_left_alone():
    before, elsewhere = nn.Linear(2, 2), []
    with PrecisionRuntime("16-true", "cpu").init_module():
        before(torch.ones(1, 2))
        thread = threading.Thread(target=lambda: elsewhere.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
    assert before.weight.dtype is elsewhere[0].weight.dtype is torch.float32


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
            self.b.weight = self.a.weight

    with PrecisionRuntime("16-true", "cpu").init_module():
        model = Tied()
    assert model.a.weight is model.b.weight
    assert model.a.weight.dtype is torch.float16
