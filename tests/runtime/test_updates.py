"""Training that keeps small updates: stochastic rounding, compensation, and the meter."""

import copy
from contextlib import nullcontext
from fractions import Fraction

import pytest
import torch
from torch import nn

from precision_runtime.errors import ConfigurationError, UnknownNameError
from precision_runtime.runtime import PrecisionRuntime
from precision_runtime.stepping.updates import Kahan, Stochastic

WIDE = ("stochastic", "kahan")
HALF = {"bf16-true": torch.bfloat16, "16-true": torch.float16}
OPTIMIZERS = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    (torch.optim.Adam, {"lr": 1e-3}),
    (torch.optim.AdamW, {"lr": 1e-3, "foreach": True}),
    (torch.optim.AdamW, {"lr": 1e-3, "fused": True}),
    (torch.optim.Adagrad, {"lr": 1e-2}),
    (torch.optim.RMSprop, {"lr": 1e-3, "centered": True}),
    (torch.optim.NAdam, {"lr": 1e-3}),
    (torch.optim.Adafactor, {"lr": 1e-2}),
]


def one_weight(value=1.0, count=1, mode="bf16-true", optimizer=torch.optim.SGD, **how):
    rt = PrecisionRuntime(mode, "cpu", **how)
    model = nn.ParameterList([nn.Parameter(torch.full((count,), value))])
    settings = {"lr": 1.0} if optimizer is torch.optim.SGD else {"lr": 1e-4}
    model, opt = rt.setup(model, optimizer(model.parameters(), **settings))
    return rt, model, opt


def step(rt, model, opt, gradient):
    model[0].grad = torch.full_like(model[0], gradient)
    return rt.step(opt)


@pytest.mark.parametrize("mode", HALF)
def test_an_update_below_half_a_unit_is_lost_to_nearest_and_kept_by_the_others(mode):
    small = 2.0**-13
    ends = {}
    for way in (None, *WIDE):
        rt, model, opt = one_weight(1.0, 2048, mode, updates=way)
        for _ in range(128):
            step(rt, model, opt, -small)
        ends[way] = model[0].detach().double().mean().item()
    exact = 1 + 128 * small  # 1 + 2^-6, which both formats hold
    assert ends[None] == 1.0
    assert ends["kahan"] == exact
    # The walk of one weight: 128 independent steps of one unit, gap g, with p = small / g; 2048 weights are averaged.
    gap = torch.finfo(HALF[mode]).eps
    spread = (128 * small * gap / 2048) ** 0.5
    assert abs(ends["stochastic"] - exact) < 5 * spread


@pytest.mark.parametrize("mode", HALF)
@pytest.mark.parametrize(("kind", "settings"), OPTIMIZERS)
def test_with_kahan_every_optimizer_does_what_it_does_in_float32_to_twice_the_digits(kind, settings, mode):
    torch.manual_seed(0)
    values = torch.rand(4, 8) + 0.5
    rt, model = PrecisionRuntime(mode, "cpu", updates="kahan"), nn.Linear(8, 4, bias=False)
    with torch.no_grad():
        model.weight.copy_(values.to(HALF[mode]))
    model, opt = rt.setup(model, kind(model.parameters(), **settings))
    twin = nn.Parameter(values.to(HALF[mode]).float())
    other = kind([twin], **settings)
    for _ in range(20):
        gradient = torch.randn(4, 8).to(HALF[mode])
        model.weight.grad, twin.grad = gradient, gradient.float()
        rt.step(opt)
        other.step()
    kept = model.weight.float() + rt.updates.residual(model.weight).float()
    # Each step rounds the residual, by 2^-17 or 2^-23 of weights below 2, and float32 itself by 2^-24; twice that, for
    # a weight that is off is decayed and normed a little differently from then on.
    precision = {"bf16-true": 17, "16-true": 22}[mode]
    assert (kept - twin).abs().max().item() <= 2 * 20 * 2.0**-precision * 2
    assert torch.equal(model.weight, kept.to(HALF[mode]))
    assert model.weight.grad is gradient  # as they were: the same objects
    assert model.weight.dtype is HALF[mode]


def test_the_weight_that_kahan_stores_and_its_residual_are_the_float32_sum_exactly():
    # Second witness: fractions. Weight + residual must differ from the float32 sum by the residual's rounding only.
    torch.manual_seed(1)
    rt, model, opt = one_weight(1.0, 512, updates="kahan")
    with torch.no_grad():
        model[0].copy_(torch.randn(512))
    for _ in range(5):
        before = [Fraction(a) + Fraction(b) for a, b in zip(*held(rt, model), strict=True)]
        gradient = torch.randn(512) * 1e-3
        model[0].grad = gradient.bfloat16()
        rt.step(opt)
        weights, residuals = held(rt, model)
        for old, g, w, r in zip(before, model[0].grad.double().tolist(), weights, residuals, strict=True):
            exact = old - Fraction(g)
            # float32's rounding of the sum, and the residual's: it is at most half a unit of w, 2^-8 of w's power of
            # two, so that half a unit of its own is 2^-17 of that.
            bound = 2 * 2.0**-24 * max(abs(float(old)), abs(float(exact))) + abs(w) * 2.0**-17
            assert abs(Fraction(w) + Fraction(r) - exact) <= bound
            assert abs(r) <= abs(w) * 2.0**-8


def held(rt, model):
    return model[0].detach().double().tolist(), rt.updates.residual(model[0]).double().tolist()


@pytest.mark.parametrize("way", WIDE)
def test_adam_in_float16_survives_gradients_of_zero(way):
    # eps = 1e-8 is 0 in float16: torch alone writes NaN into the weights.
    with pytest.warns(match="eps=1e-08 in float16"):
        rt, model, opt = one_weight(mode="16-true", optimizer=torch.optim.Adam)
    step(rt, model, opt, 0.0)
    assert model[0].isnan().all()
    rt, model, opt = one_weight(mode="16-true", optimizer=torch.optim.Adam, updates=way)
    step(rt, model, opt, 0.0)
    assert model[0].item() == 1.0


def test_state_is_float32_whenever_it_comes():
    for load in (False, True):
        rt, model, opt = one_weight(1.0, 3, optimizer=torch.optim.Adam, updates="stochastic")
        step(rt, model, opt, 0.3)
        if load:
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        assert {v.dtype for v in opt.state[model[0]].values()} == {torch.float32}


def test_momentum_collected_before_setup_stays_float32():
    model = nn.Linear(2, 2)
    opt = torch.optim.Adam(model.parameters(), lr=0.1)
    model(torch.ones(1, 2)).sum().backward()
    opt.step()
    before = opt.state[model.weight]["exp_avg"].clone()
    PrecisionRuntime("bf16-true", "cpu", updates="kahan").setup(model, opt)
    assert torch.equal(opt.state[model.weight]["exp_avg"], before)


def test_a_gradient_that_overflows_weights_leaves_no_nan_behind():
    rt, model, opt = one_weight(1e38, updates="kahan")
    step(rt, model, opt, -3.3e38)
    assert model[0].isinf().all()
    assert rt.updates.residual(model[0]).item() == 0.0


@pytest.mark.parametrize("way", WIDE)
def test_training_goes_on_bit_by_bit_after_a_checkpoint(way, tmp_path):
    def made():
        torch.manual_seed(0)
        rt, model = PrecisionRuntime("bf16-true", "cpu", updates=way), nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
        return rt, *rt.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-3))

    def train(rt, model, opt, steps):
        generator = torch.Generator().manual_seed(steps)
        for _ in range(steps):
            opt.zero_grad()
            rt.backward(model(torch.randn(8, 4, generator=generator)).square().mean())
            rt.step(opt)

    rt, model, opt = made()
    train(rt, model, opt, 5)
    torch.save({"rt": rt.state_dict(), "model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "at")
    again, twin, other = made()
    saved = torch.load(tmp_path / "at", weights_only=True)
    twin.load_state_dict(saved["model"])
    other.load_state_dict(saved["opt"])
    again.load_state_dict(saved["rt"])
    train(rt, model, opt, 7)
    train(again, twin, other, 7)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_stochastic_rounding_repeats_by_its_seed_and_leaves_global_random_numbers_alone():
    def end(seed):
        rt, model, opt = one_weight(1.0, 256, updates=Stochastic(seed))
        for _ in range(4):
            step(rt, model, opt, 1e-3)
        return model[0].detach().clone()

    before = torch.get_rng_state()
    assert torch.equal(end(1), end(1))
    assert not torch.equal(end(1), end(2))
    assert torch.equal(before, torch.get_rng_state())


def test_steps_draw_afresh():
    rt, model, opt = one_weight(1.0, 256, updates="stochastic")
    moved = []
    for _ in range(2):
        with torch.no_grad():
            model[0].fill_(1.0)
        step(rt, model, opt, -(2.0**-8))  # half a unit
        moved.append(model[0] != 1.0)
    assert not torch.equal(*moved)


@pytest.mark.parametrize("way", WIDE)
def test_an_optimizer_that_raises_leaves_weights_and_gradients_as_they_were(way):
    class Breaks(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            raise KeyError("the user's own")

    rt = PrecisionRuntime("bf16-true", "cpu", updates=way)
    model = nn.Linear(2, 2)
    model, opt = rt.setup(model, Breaks(model.parameters(), lr=1.0))
    rt.backward(model(torch.ones(1, 2)).sum())
    weight, gradient = model.weight.detach().clone(), model.weight.grad
    storage = model.weight.data_ptr()
    with pytest.raises(KeyError, match="the user's own"):
        rt.step(opt)
    assert torch.equal(model.weight, weight)
    assert model.weight.grad is gradient
    assert model.weight.data_ptr() == storage


@pytest.mark.parametrize("way", WIDE)
def test_tied_weights_and_storage_stay_what_they_are(way):
    rt, model = PrecisionRuntime("bf16-true", "cpu", updates=way), nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model[1].weight = model[0].weight
    model, opt = rt.setup(model, torch.optim.SGD(model.parameters(), lr=0.5))
    x = torch.ones(1, 2, dtype=torch.bfloat16)
    storage = model[0].weight.data_ptr()
    rt.backward(model[1](model[0](x)).sum())
    rt.step(opt)
    assert model[1].weight is model[0].weight
    assert model[0].weight.data_ptr() == storage
    rt.backward(model[1](model[0](x)).sum())  # and autograd works with them as before


@pytest.mark.parametrize("way", WIDE)
def test_a_graph_from_before_the_step_is_refused_by_autograd(way):
    rt, model, opt = one_weight(2.0, updates=way)
    loss = (model[0] * model[0]).sum()
    loss.backward(retain_graph=True)
    rt.step(opt)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("way", [None, *WIDE])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.LBFGS])
def test_closures_run_on_half_weights(way, kind):
    rt, model = PrecisionRuntime("bf16-true", "cpu", updates=way), nn.Linear(2, 1)
    model, opt = rt.setup(model, kind(model.parameters(), lr=0.1))
    seen = []

    def closure():
        opt.zero_grad()
        seen.append((model.weight.dtype, model.bias.dtype))
        loss = (model(torch.ones(1, 2)) - 3).square().sum()
        rt.backward(loss)
        seen.append(model.weight.grad.dtype)
        return loss

    losses = []
    for _ in range(20):
        rt.step(opt, closure)
        losses.append((model(torch.ones(1, 2)) - 3).square().item())
    assert set(seen) == {(torch.bfloat16, torch.bfloat16), torch.bfloat16}
    assert losses[-1] < losses[0] / 4


@pytest.mark.parametrize("mode", ["32-true", "64-true", "16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("way", WIDE)
def test_modes_with_float32_weights_refuse_them(mode, way):
    with pytest.raises(ConfigurationError, match=f"updates='{way}' is for modes whose weights are half.*{mode}"):
        PrecisionRuntime(mode, "cpu", updates=way)


def test_unknown_ways_and_foreign_states_are_refused():
    with pytest.raises(UnknownNameError, match=r"'stochastik'.*Did you mean 'stochastic'"):
        PrecisionRuntime("bf16-true", "cpu", updates="stochastik")
    with pytest.raises(ConfigurationError, match="updates=3"):
        PrecisionRuntime("bf16-true", "cpu", updates=3)
    states = {way: one_weight(updates=way)[0].state_dict() for way in (None, *WIDE)}
    for saved, state in states.items():
        for way in (None, *WIDE):
            rt = one_weight(updates=way)[0]
            if way == saved:
                rt.load_state_dict(state)
            else:
                with pytest.raises(ConfigurationError, match=f"saved with updates='{saved or 'nearest'}'"):
                    rt.load_state_dict(state)
    with pytest.raises(UnknownNameError, match="parameter '7' in the saved residuals"):
        one_weight(updates="kahan")[0].load_state_dict(
            {**states["kahan"], "updates": {"kind": "kahan", "residuals": {"7": torch.zeros(1)}}}
        )


def test_the_objects_themselves_are_taken():
    assert PrecisionRuntime("bf16-true", "cpu", updates=Kahan()).updates.name == "kahan"
    assert repr(PrecisionRuntime("bf16-true", "cpu", updates=Stochastic(4)).updates) == "Stochastic(seed=4)"


def test_a_runtime_without_them_adds_nothing_to_its_state():
    assert "updates" not in PrecisionRuntime("bf16-true", "cpu").state_dict()


def test_islands_in_float32_step_as_they_are():
    rt = PrecisionRuntime("bf16-true", "cpu", updates="kahan", islands=["1"])
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model, opt = rt.setup(model, torch.optim.SGD(model.parameters(), lr=2.0**-20))
    before = model[1].bias.detach().clone()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    rt.step(opt)
    assert torch.equal(model[1].bias, before - 2.0**-20)
    assert set(rt.state_dict()["updates"]["residuals"]) == {"0.weight", "0.bias"}


@pytest.mark.parametrize("mode", ["transformer-engine", "transformer-engine-float16", "apex-O3"])
@pytest.mark.parametrize("way", WIDE)
def test_every_mode_with_half_weights_takes_them(mode, way):
    torch.manual_seed(0)
    rt, model = PrecisionRuntime(mode, "cpu", updates=way), nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 16))
    model, opt = rt.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    x, losses = torch.randn(16, 32), []
    for _ in range(4):
        opt.zero_grad()
        loss = model(x).square().mean()
        rt.backward(loss)
        rt.step(opt)
        losses.append(loss.item())
    assert losses[3] < losses[0]
    assert {v.dtype for state in opt.state.values() for v in state.values()} == {torch.float32}


# The meter


def test_the_meter_counts_what_stands_still():
    for mode, way, lost in (("bf16-true", None, 0.5), ("bf16-true", "kahan", 0), ("bf16-true", "stochastic", 0)):
        rt, model, opt = one_weight(1.0, 4, mode, updates=way)
        model[0].grad = torch.tensor([0.0, 2.0**-10, -(2.0**-10), 0.25], dtype=torch.bfloat16)
        with rt.lost_updates() as meter:
            rt.step(opt)
            model[0].grad = torch.tensor([0.0, 0.0, 0.0, 0.25], dtype=torch.bfloat16)
            rt.step(opt)
        share = meter.by_parameter["0"]
        assert (share.meant, share.small) == (4, 2)
        assert meter.share == share.share == lost
        assert meter.to_dict()["parameters"] == {"0": {"meant": 4, "small": 2, "lost": int(4 * lost)}}
        assert f"{lost:.1%} of 4 updates lost in 2 steps; 50.0% were below half a unit" in str(meter)


def test_the_meter_names_parameters_and_counts_only_inside():
    rt, model = PrecisionRuntime("bf16-true", "cpu"), nn.Linear(2, 2)
    model, opt = rt.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-7))
    with rt.lost_updates() as lost:
        for _ in range(3):
            opt.zero_grad()
            rt.backward(model(torch.ones(1, 2)).sum())
            rt.step(opt)
    rt.step(opt)
    assert set(lost.by_parameter) == {"weight", "bias"}
    assert lost.steps == 3
    assert lost.share > 0.9
    assert lost.total.meant == 18


@pytest.mark.parametrize("mode", ["bf16-true", "16-mixed", "32-true"])
@pytest.mark.parametrize(("kind", "settings"), OPTIMIZERS)
def test_measuring_changes_nothing(kind, settings, mode):
    def end(measured):
        torch.manual_seed(0)
        rt, model = PrecisionRuntime(mode, "cpu"), nn.Linear(4, 4)
        model, opt = rt.setup(model, kind(model.parameters(), **settings))
        for _ in range(3):
            opt.zero_grad()
            rt.backward(model(torch.randn(2, 4)).square().mean())
            if measured:
                with rt.lost_updates():
                    rt.step(opt)
            else:
                rt.step(opt)
        return model.state_dict(), opt.state_dict()

    (weights, state), (others, other) = end(False), end(True)
    assert all(torch.equal(weights[k], others[k]) for k in weights)
    for number, values in state["state"].items():
        for key, value in values.items():
            found = other["state"][number][key]
            assert torch.equal(value, found) if torch.is_tensor(value) else value == found
            assert not torch.is_tensor(value) or value.dtype is found.dtype


def test_in_float32_too_updates_are_lost():
    rt, model, opt = one_weight(1.0, 2, "32-true")
    model[0].grad = torch.tensor([2.0**-30, 1.0])
    with rt.lost_updates() as lost:
        rt.step(opt)
    assert lost.share == 0.5


def test_the_meter_refuses_closures_and_ends_when_user_code_raises():
    rt, model, opt = one_weight()
    with pytest.raises(ConfigurationError, match="where the optimizer steps with a closure"), rt.lost_updates():
        rt.step(opt, lambda: None)
    step(rt, model, opt, 1.0)
    assert rt.step(opt, lambda: None).skipped is False


# What it is for


def test_small_steps_reach_float32s_loss_with_either_way_and_do_not_without():
    """AdamW at 1e-4 on weights near 0.1 to 0.9: below half a unit of bfloat16 for most of them."""

    def trained(mode, updates=None, seed=0):
        torch.manual_seed(0)
        rt = PrecisionRuntime(mode, "cpu", updates=Stochastic(seed) if updates == "stochastic" else updates)
        model = nn.Linear(16, 8, bias=False)
        with torch.no_grad():
            model.weight.copy_(0.2 + 0.8 * torch.rand(8, 16).bfloat16())
        truth = model.weight.detach().clone() + 0.03 * torch.randn(8, 16)
        model, opt = rt.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0))
        generator, lost = torch.Generator().manual_seed(7), rt.lost_updates()
        for number in range(400):
            x = torch.randn(64, 16, generator=generator)
            opt.zero_grad()
            rt.backward((model(x) - x @ truth.T).square().mean())
            with lost if number % 100 == 50 else nullcontext():
                rt.step(opt)
        return (model.weight.detach().double() - truth.double()).square().mean().item(), lost.share

    start = 0.03**2
    (single, _), (nearest, lost) = trained("32-true"), trained("bf16-true")
    assert single < start / 3
    assert (nearest > 0.9 * start, lost > 0.9) == (True, True)  # nothing was learned, and the meter knows why

    storing = 2.0**-16 / 3  # what bfloat16 weights below 1 must cost, by storing the answer alone: u²/3
    compensated, lost = trained("bf16-true", "kahan")
    assert compensated < single + 2 * storing
    assert lost < 0.1  # of Adam's last steps, which are below the residual's last place, too

    # A random rounding adds step times gap to the mean square, 1e-4 * 2^-8 at most, and AdamW takes back what is larger
    # than its own steps: in gap / step = 40 steps for one gap, and some times that for several.
    seeds = [trained("bf16-true", "stochastic", seed) for seed in range(3)]
    assert sum(error for error, _ in seeds) / 3 < single + 2 * storing + 200 * 1e-4 * 2.0**-8
    assert {share for _, share in seeds} == {0.0}
