import gc
import weakref
from copy import deepcopy

import pytest
import torch
from torch import nn

from precision_runtime.accelerators import Machine, pretend
from precision_runtime.errors import ConfigurationError, PrecisionError, UnknownNameError, UnsupportedError
from precision_runtime.modes import ELSEWHERE, MODES
from precision_runtime.runtime import PrecisionRuntime, StepResult
from precision_runtime.scaling import DynamicScaler

UNSCALED = [m for m in MODES if not MODES[m].scaled]
TRAINABLE = [m for m in MODES if not MODES[m].weights or m == "int8-training"]  # weights that are codes are frozen


def trained(mode, steps=3, optimizer=torch.optim.SGD, **kwargs):
    torch.manual_seed(0)
    rt = PrecisionRuntime(mode, "cpu")
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    model, opt = rt.setup(model, optimizer(model.parameters(), lr=0.1, **kwargs))
    x, losses = torch.randn(16, 4), []
    for _ in range(steps):
        opt.zero_grad()
        loss = model(x).square().mean()
        rt.backward(loss)
        rt.clip_gradients(opt, max_norm=1.0)
        rt.step(opt)
        losses.append(loss.item())
    return rt, model, opt, losses


@pytest.mark.parametrize("mode", TRAINABLE)
def test_a_model_trains_in_every_mode_and_stays_near_to_float64(mode):
    losses, reference = trained(mode)[3], trained("64-true")[3]
    assert losses[-1] < losses[0]
    assert losses == pytest.approx(reference, rel=0.05)


@pytest.mark.parametrize(
    ("legacy", "mode"), [(16, "16-mixed"), ("16", "16-mixed"), ("bf16", "bf16-mixed"), (64, "64-true")]
)
def test_legacy_names_work(legacy, mode):
    assert PrecisionRuntime(legacy, "cpu").mode.name == mode


def test_unknown_names_are_errors():
    with pytest.raises(UnknownNameError, match=r"'16-mix' is unknown\. Did you mean '16-mixed'"):
        PrecisionRuntime("16-mix")
    with pytest.raises(UnknownNameError, match=r"accelerator 'cp' is unknown\. Did you mean 'cpu'"):
        PrecisionRuntime("32-true", "cp")


@pytest.mark.parametrize(("name", "meant"), [(name, meant) for name, meant in ELSEWHERE.items()])
def test_what_others_call_a_format_leads_to_modes_in_that_format(name, meant):
    assert set(meant) <= set(MODES)
    with pytest.raises(UnknownNameError, match=f"Did you mean {' or '.join(map(repr, meant))}\\?"):
        PrecisionRuntime(name.upper())


def test_half_by_another_name_never_leads_to_the_other_half():
    for name, meant in {
        "fp16-mixed": "16-mixed",
        "float16-true": "16-true",
        "fp16-mixd": "16-mixed",
        "bfloat16-mixed": "bf16-mixed",
    }.items():
        with pytest.raises(UnknownNameError, match=f"Did you mean '{meant}'"):
            PrecisionRuntime(name)


def test_a_mode_that_the_machine_cannot_run_is_refused_and_never_replaced():
    class NoAutocast(Machine):
        def autocast_result(self, accelerator, dtype):
            return "float32"

    with pretend(NoAutocast()), pytest.raises(UnsupportedError, match=r"16-mixed cannot run on cpu: .*gave float32"):
        PrecisionRuntime("16-mixed", "cpu")


def test_16_mixed_on_a_cpu_is_float16():
    model = PrecisionRuntime("16-mixed", "cpu").setup(nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model.weight.fill_(1.0)
    assert model(torch.tensor([[1 + 2**-9]])).item() == 1 + 2**-9  # bfloat16 would round it to 1
    assert model(torch.tensor([[1e5]])).isinf().all()  # and bfloat16 could hold this


@pytest.mark.parametrize("mode", UNSCALED)
def test_a_scaler_is_refused_in_modes_without_one(mode):
    with pytest.raises(ConfigurationError, match=f"{mode} does not scale its loss, so scaler=DynamicScaler"):
        PrecisionRuntime(mode, "cpu", scaler=DynamicScaler())


def test_setup_returns_the_model_alone_or_with_its_optimizers():
    rt, model = PrecisionRuntime("bf16-true", "cpu"), nn.Linear(2, 2)
    a, b = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    assert rt.setup(model) is model
    assert rt.setup(model, a) == (model, a)
    assert rt.setup(model, a, b) == (model, a, b)


def test_setup_refuses_what_is_no_module_or_optimizer():
    rt = PrecisionRuntime("bf16-true", "cpu")
    with pytest.raises(ConfigurationError, match=r"takes a torch\.nn\.Module first, got list"):
        rt.setup([nn.Linear(2, 2)])
    with pytest.raises(ConfigurationError, match="optimizers after the model, got Linear"):
        rt.setup(nn.Linear(2, 2), nn.Linear(2, 2))


@pytest.mark.parametrize("mode", TRAINABLE)
def test_optimizers_made_before_setup_train_the_model(mode):
    rt, model = PrecisionRuntime(mode, "cpu"), nn.Linear(2, 2)
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    parameters = list(model.parameters())
    rt.setup(model, opt)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    before = model.weight.detach().clone()
    rt.backward(model(torch.ones(1, 2)).mean())
    assert not rt.step(opt).skipped
    assert not torch.equal(before, model.weight)


def test_momentum_collected_before_setup_follows_its_parameters():
    model = nn.Linear(2, 2)
    opt = torch.optim.Adam(model.parameters(), lr=0.1)
    model(torch.ones(1, 2)).sum().backward()
    opt.step()
    PrecisionRuntime("bf16-true", "cpu").setup(model, opt)
    state = opt.state[model.weight]
    assert state["exp_avg"].dtype is torch.bfloat16
    assert state["step"].dtype is torch.float32
    opt.step()


@pytest.mark.parametrize("mode", TRAINABLE)
def test_clipping_by_norm_gives_what_float64_gives(mode):
    rt, model = PrecisionRuntime(mode, "cpu"), nn.Linear(4, 1, bias=False)
    model, opt = rt.setup(model, torch.optim.SGD(model.parameters(), lr=1.0))
    rt.backward(model(torch.full((1, 4), 3.0)).sum() / 16)  # times 65536 it still fits float16
    assert rt.clip_gradients(opt, max_norm=0.125).item() == pytest.approx(6 / 16)
    (weight,) = opt.param_groups[0]["params"]  # the model's, or its master
    assert weight.grad.float().norm().item() == pytest.approx(0.125, rel=2**-7)
    rt.step(opt)


def test_clipping_twice_unscales_once():
    rt, model = PrecisionRuntime("16-mixed", "cpu"), nn.Linear(4, 1, bias=False)
    model, opt = rt.setup(model, torch.optim.SGD(model.parameters(), lr=1.0))
    rt.backward(model(torch.full((1, 4), 3.0)).sum() / 16)
    rt.clip_gradients(opt, clip_value=0.125)
    assert model.weight.grad.tolist() == [[0.125] * 4]
    assert rt.clip_gradients(opt, max_norm=100.0, norm_type=float("inf")).item() == 0.125


def test_the_norm_of_float16_gradients_does_not_overflow():
    rt, model = PrecisionRuntime("16-true", "cpu"), nn.Linear(4, 1, bias=False)
    model, opt = rt.setup(model, torch.optim.SGD(model.parameters(), lr=0.0))
    model.weight.grad = torch.full_like(model.weight, 60000.0)
    assert model.weight.grad.norm().isinf()
    assert rt.clip_gradients(opt, max_norm=1.0).item() == pytest.approx(120000.0, rel=1e-3)
    assert model.weight.grad.float().norm().item() == pytest.approx(1.0, rel=1e-2)


@pytest.mark.parametrize("how", [{"max_norm": 1.0}, {"clip_value": 1.0}])
def test_clipping_never_raises_on_a_step_that_will_be_skipped(how):
    rt, model = PrecisionRuntime("16-mixed", "cpu"), nn.Linear(2, 1)
    model, opt = rt.setup(model, torch.optim.SGD(model.parameters(), lr=1.0))
    before = model.weight.detach().clone()
    rt.backward(model(torch.full((1, 2), 1e4)).sum() * 1e4)
    rt.clip_gradients(opt, **how)
    result = rt.step(opt)
    assert result == StepResult(True, 32768.0, ("weight",)) or result.culprits == ("weight", "bias")
    assert torch.equal(before, model.weight)


@pytest.mark.parametrize("mode", [m for m in UNSCALED if m in TRAINABLE])
def test_clipping_by_a_norm_that_is_not_finite_names_the_culprits(mode):
    rt, model = PrecisionRuntime(mode, "cpu"), nn.Linear(2, 1)
    model, opt = rt.setup(model, torch.optim.SGD(model.parameters(), lr=1.0))
    model(torch.ones(1, 2)).sum().backward()
    model.bias.grad.fill_(float("nan"))
    with pytest.raises(PrecisionError, match=f"norm is nan in {mode}.*Not finite: bias"):
        rt.clip_gradients(opt, max_norm=1.0)
    assert model.weight.grad.isfinite().all()


@pytest.mark.parametrize("how", [{}, {"max_norm": 1.0, "clip_value": 1.0}])
def test_clipping_needs_one_of_norm_and_value(how):
    _, _, opt, _ = (rt := trained("32-true", 0))
    with pytest.raises(ConfigurationError, match="needs max_norm or clip_value"):
        rt[0].clip_gradients(opt, **how)


def test_culprits_are_named_and_models_told_apart():
    rt = PrecisionRuntime("16-mixed", "cpu")
    one, two = nn.Sequential(nn.Linear(1, 1)), nn.Linear(1, 1)
    opt = torch.optim.SGD([*one.parameters(), *two.parameters()], lr=1.0)
    rt.setup(one, opt), rt.setup(two)
    scaled = rt.scaler.scaled
    one[0].weight.grad, two.bias.grad = scaled(torch.full((1, 1), float("nan"))), scaled(torch.full((1,), float("inf")))
    one[0].bias.grad = scaled(torch.ones(1))
    assert rt.step(opt).culprits == ("Sequential.0.weight", "Linear.bias")


def test_a_skipped_step_can_be_asked_for_so_that_no_scheduler_runs_ahead():
    rt, model, opt, _ = trained("16-mixed", 1)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    results = []
    for factor in (float("inf"), 1.0):
        opt.zero_grad()
        rt.backward(model(torch.ones(1, 4)).sum() * factor)
        result = rt.step(opt)
        results.append(result.skipped)
        if not result.skipped:
            scheduler.step()
    assert results == [True, False]
    assert scheduler.get_last_lr() == [0.05]


@pytest.mark.parametrize("mode", UNSCALED)
def test_steps_without_a_scaler_are_never_skipped(mode):
    rt, _, opt, _ = trained(mode, 1)
    assert rt.step(opt) == StepResult(skipped=False, scale=1.0, culprits=())


@pytest.mark.parametrize("mode", MODES)
def test_training_goes_on_bit_by_bit_after_a_checkpoint(mode):
    rt, model, opt, _ = trained(mode, 2, torch.optim.SGD, momentum=0.9)
    again, copy, other, _ = trained(mode, 0, torch.optim.SGD, momentum=0.9)
    copy.load_state_dict(model.state_dict())
    other.load_state_dict(deepcopy(opt.state_dict()))  # without a copy both would share their momentum
    again.load_state_dict(rt.state_dict())
    assert again.state_dict() == rt.state_dict()
    x = torch.randn(4, 4)
    for r, m, o in ((rt, model, opt), (again, copy, other)):
        o.zero_grad()
        r.backward(m(x).sum())
        r.step(o)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copy.parameters(), strict=True))


def test_states_of_other_modes_and_of_other_things_are_refused():
    state = PrecisionRuntime("16-mixed", "cpu").state_dict()
    with pytest.raises(ConfigurationError, match=r"saved in 16-mixed and cannot be loaded in bf16-mixed; .*'16-mixed'"):
        PrecisionRuntime("bf16-mixed", "cpu").load_state_dict(state)
    with pytest.raises(ConfigurationError, match=r"it has \['weight'\]"):
        PrecisionRuntime("16-mixed", "cpu").load_state_dict({"weight": 1})


def test_autocast_serves_what_runs_outside_forward():
    a = torch.ones(2, 2)
    for mode, dtype in (("16-mixed", torch.float16), ("bf16-mixed", torch.bfloat16), ("bf16-true", torch.float32)):
        with PrecisionRuntime(mode, "cpu").autocast():
            assert (a @ a).dtype is dtype
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("mode", MODES)
def test_setup_draws_no_random_numbers(mode):
    model = nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2))
    before = torch.get_rng_state()
    PrecisionRuntime(mode, "cpu").setup(model)
    assert torch.equal(before, torch.get_rng_state())


def test_the_runtime_keeps_no_model_or_optimizer_alive():
    rt = PrecisionRuntime("16-mixed", "cpu")
    model = nn.Linear(2, 2)
    model, opt = rt.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    rt.backward(model(torch.ones(1, 2)).sum())
    rt.step(opt)
    refs = [weakref.ref(model), weakref.ref(opt)]
    del model, opt
    gc.collect()
    assert [r() for r in refs] == [None, None]


def test_tf32_settings_of_torch_can_still_be_read_after_a_float16_lstm():
    # Mixing torch's two TF32 interfaces makes the older one raise; the LSTM's switch must not do that.
    PrecisionRuntime("16-mixed", "cpu").setup(nn.LSTM(2, 2))(torch.ones(1, 1, 2))
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    ("mode", "argument"),
    [
        ("bf16-true", {"compute_dtype": torch.float16}),
        ("nf4", {"weights_dtype": torch.float16}),
        ("16-mixed", {"amp_level": "O2"}),
        ("bf16-mixed", {"amp_backend": "apex", "amp_level": "O2"}),
    ],
)
def test_arguments_of_other_modes_are_not_accepted_silently(mode, argument):
    with pytest.raises(ConfigurationError, match=next(iter(argument))):
        PrecisionRuntime(mode, **argument)
