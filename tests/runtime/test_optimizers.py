"""Settings that half parameters turn into others; each claim is checked against what torch then does."""

import warnings

import pytest
import torch
from torch import nn

from precision_runtime.runtime import PrecisionRuntime
from precision_runtime.stepping.optimizers import OptimizerWarning, hazards

HALF = {"16-true": torch.float16, "bf16-true": torch.bfloat16}


def made(kind, dtype, value=1.0, **settings):
    p = nn.Parameter(torch.full((4,), value, dtype=dtype))
    return p, kind([p], **settings)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RMSprop])
@pytest.mark.parametrize("eps", [1e-10, 2.0**-25, 2.0**-24, 1e-4])
@pytest.mark.parametrize("dtype", HALF.values(), ids=str)
def test_an_eps_is_called_fatal_exactly_where_torch_writes_nan(kind, eps, dtype):
    p, opt = made(kind, dtype, eps=eps)
    fatal = [h for h in hazards(opt) if h.severity == "fatal"]
    p.grad = torch.zeros_like(p)
    opt.step()
    assert bool(fatal) == bool(p.isnan().any())
    for hazard in fatal:
        assert (hazard.setting, hazard.value, hazard.becomes, hazard.dtype) == ("eps", eps, 0.0, "float16")
        safe = float(hazard.message.split("eps=")[1].split(",")[0])
        p, opt = made(kind, dtype, eps=safe)
        p.grad = torch.zeros_like(p)
        opt.step()
        assert p.isfinite().all()


def test_fused_kernels_add_eps_in_float32():
    p, opt = made(torch.optim.Adam, torch.float16, fused=True)
    p.grad = torch.zeros_like(p)
    opt.step()
    assert p.isfinite().all()
    assert not [h for h in hazards(opt) if h.severity == "fatal"]


@pytest.mark.parametrize("dtype", HALF.values(), ids=str)
@pytest.mark.parametrize("beta", [0.9, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9997, 0.9998, 0.9999])
def test_a_beta_is_named_exactly_where_no_average_falls(dtype, beta):
    named = [h for h in hazards(made(torch.optim.Adam, dtype, betas=(0.5, beta), eps=1e-4)[1]) if "beta" in h.setting]
    bits = -int(torch.tensor(torch.finfo(dtype).eps).log2())
    averages = (1 + torch.arange(2**bits, dtype=torch.float64) / 2**bits).to(dtype)  # every significand
    stuck = torch.equal(averages.clone().mul_(beta), averages)
    assert [h.setting for h in named] == (["betas[1]"] if stuck else [])


@pytest.mark.parametrize("dtype", HALF.values(), ids=str)
def test_the_share_of_weights_that_a_step_cannot_move_is_what_adam_leaves_unmoved(dtype):
    torch.manual_seed(0)
    p = nn.Parameter(torch.logspace(-6, 1, 500).to(dtype))
    opt = torch.optim.Adam([p], lr=1e-4, eps=1e-4)
    (hazard,) = [h for h in hazards(opt) if h.setting == "lr"]
    before = p.detach().clone()
    p.grad = torch.full_like(p, 100.0)  # large beside eps: Adam's first step is the learning rate
    opt.step()
    assert f" {(p == before).sum().item():,} of {p.numel():,} weights" in hazard.message


def test_nothing_is_said_of_float32_parameters_or_of_others_optimizers():
    class Mine(torch.optim.Adam):
        pass

    assert hazards(made(torch.optim.Adam, torch.float32)[1]) == []
    assert hazards(made(Mine, torch.float16)[1]) == []
    assert hazards(made(torch.optim.SGD, torch.float16, lr=0.1)[1]) == []
    assert hazards(made(torch.optim.Adafactor, torch.float16)[1]) == []


def test_hazards_change_nothing():
    p, opt = made(torch.optim.Adam, torch.float16)
    hazards(opt)
    assert not opt.state
    assert torch.equal(p, torch.ones(4, dtype=torch.float16))
    assert str(hazards(opt)[0]).startswith("Adam, group 0, eps=1e-08 in float16: it is 0 there")


def test_the_runtime_warns_at_setup_or_at_the_first_step_and_once():
    for given in (True, False):
        rt, model = PrecisionRuntime("16-true", "cpu"), nn.Linear(2, 2)
        opt = torch.optim.Adam(model.parameters())
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            rt.setup(model, opt) if given else rt.setup(model)
            assert len(told) == given
            rt.step(opt)
            rt.step(opt)
        assert [(w.category, w.filename) for w in told] == [(OptimizerWarning, __file__)]
        assert "updates='stochastic' or 'kahan'" in str(told[0].message)


@pytest.mark.parametrize("mode", ["32-true", "bf16-true", "16-mixed", "bf16-mixed", "64-true"])
def test_no_other_mode_warns_of_adam(mode):
    rt, model = PrecisionRuntime(mode, "cpu"), nn.Linear(2, 2)
    rt.setup(model, torch.optim.Adam(model.parameters()))  # a warning would be an error here
