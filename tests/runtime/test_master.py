import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn

from precision_runtime import PrecisionRuntime, audit
from precision_runtime.errors import ConfigurationError
from precision_runtime.scaling import DynamicScaler
from precision_runtime.stepping.master import _MASTERS, master_of

HALF, SINGLE = torch.float16, torch.float32


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))


def batch(step):
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(step))


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
}


def made(optimizer="Adam"):
    rt, model = PrecisionRuntime("apex-O2", "cpu", scaler=DynamicScaler(init_scale=256.0, growth_interval=3)), net()
    return rt, *rt.setup(model, OPTIMIZERS[optimizer](model.parameters()))


def train(rt, model, opt, steps):
    for step in steps:
        opt.zero_grad()
        rt.backward(model(batch(step)).square().mean())
        rt.clip_gradients(opt, max_norm=0.5)
        assert not rt.step(opt).skipped


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_is_what_the_method_written_out_by_hand_gives(optimizer):
    rt, model, opt = made(optimizer)
    twin = net()
    masters = [p.detach().clone().requires_grad_() for p in twin.parameters()]
    twin[0].half()
    twin[3].half()
    by_hand, scale, good = OPTIMIZERS[optimizer](masters), 256.0, 0
    for step in range(7):
        train(rt, model, opt, [step])
        loss = twin(batch(step).half()).float().square().mean()
        grads = torch.autograd.grad(loss * scale, list(twin.parameters()))
        for master, grad in zip(masters, grads, strict=True):
            master.grad = grad.float() / scale
        torch.nn.utils.clip_grad_norm_(masters, 0.5)
        by_hand.step()
        with torch.no_grad():
            for p, master in zip(twin.parameters(), masters, strict=True):
                p.copy_(master)
        scale, good = (scale * 2, 0) if good + 1 == 3 else (scale, good + 1)
    assert rt.scaler.scale == scale == 1024.0
    for master, mine in zip(masters, opt.param_groups[0]["params"], strict=True):
        assert torch.equal(mine, master)
        assert mine.dtype is SINGLE
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    states = [s[k] for s in opt.state.values() for k in s if torch.is_tensor(s[k])]
    assert states
    assert all(t.dtype is SINGLE for t in states)


def test_masters_begin_with_what_the_model_had_before_the_cast():
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1 / 3)
    rt = PrecisionRuntime("apex-O2", "cpu")
    rt.setup(model)
    assert model.weight.item() != 1 / 3
    opt = torch.optim.SGD(model.parameters(), lr=1.0)  # made afterwards, and never given to setup
    rt.backward(model(torch.zeros(1, 1)).sum())
    rt.step(opt)
    assert opt.param_groups[0]["params"][0].item() == torch.tensor(1 / 3).item()


def test_updates_too_small_for_half_add_up():
    moved = {}
    for mode in ("apex-O2", "apex-O3"):
        rt, model = PrecisionRuntime(mode, "cpu"), nn.Linear(1, 1, bias=False)
        model.weight.data.fill_(1.0)
        model, opt = rt.setup(model, torch.optim.SGD(model.parameters(), lr=2.0**-13))  # half's step below 1 is 2^-11
        for _ in range(64):
            opt.zero_grad()
            rt.backward(model(torch.ones(1, 1)).sum())
            rt.step(opt)
        moved[mode] = 1 - model.weight.item()
    assert moved == {"apex-O2": 64 * 2.0**-13, "apex-O3": 0.0}


def saved(*parts):
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_checkpoint_resumes_bit_by_bit(optimizer):
    rt, model, opt = made(optimizer)
    train(rt, model, opt, range(4))
    checkpoint = saved(model, opt, rt)
    train(rt, model, opt, range(4, 9))

    fresh_rt, fresh = PrecisionRuntime("apex-O2", "cpu"), net()
    for p in fresh.parameters():
        nn.init.ones_(p)
    fresh_opt = OPTIMIZERS[optimizer](fresh.parameters())
    fresh_rt.setup(fresh, fresh_opt)
    for part, state in zip((fresh, fresh_opt, fresh_rt), checkpoint, strict=True):
        part.load_state_dict(state)
    train(fresh_rt, fresh, fresh_opt, range(4, 9))
    assert fresh_rt.scaler.scale == rt.scaler.scale
    for a, b in zip(saved(model, opt, rt)[:2], saved(fresh, fresh_opt, fresh_rt)[:2], strict=True):
        assert_same(a, b)


def assert_same(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif torch.is_tensor(a):
        assert a.dtype is b.dtype
        assert torch.equal(a, b)
    else:
        assert a == b


def test_the_model_s_checkpoint_is_the_masters_and_loads_into_a_plain_model():
    rt, model, opt = made()
    train(rt, model, opt, range(3))
    state = model.state_dict()
    assert list(state) == list(net().state_dict())
    floating = [t for t in state.values() if t.is_floating_point()]
    assert all(t.dtype is SINGLE for t in floating)
    assert torch.equal(state["0.weight"], opt.param_groups[0]["params"][0])
    assert torch.equal(state["0.weight"].half(), model[0].weight)
    plain = net()
    plain.load_state_dict(state)
    assert torch.equal(plain[0].weight, state["0.weight"])
    assert torch.equal(model[0].state_dict()["weight"], state["0.weight"])  # a part's checkpoint, too


def test_a_float32_checkpoint_loads_into_model_and_masters():
    rt, model, opt = made()
    other = net()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1e-4)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model[0].weight, other[0].weight.half())
    assert torch.equal(master_of(model[0].weight), other[0].weight)
    train(rt, model, opt, range(1))
    assert (master_of(model[0].weight) - other[0].weight).abs().max() < 0.02
    with pytest.raises(ConfigurationError, match="load without assign"):
        model.load_state_dict(other.state_dict(), assign=True)


def test_without_an_optimizer_a_half_checkpoint_still_comes_in_float32():
    model = PrecisionRuntime("apex-O2", "cpu").setup(net().requires_grad_(False))
    assert master_of(model[0].weight) is None
    assert torch.equal(model.state_dict()["0.weight"], model[0].weight.float())
    assert model.state_dict(keep_vars=True)["0.weight"] is model[0].weight


def test_state_collected_before_setup_stays_float32():
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(batch(0)).square().mean().backward()
    opt.step()
    momentum = opt.state[model[0].weight]["momentum_buffer"].clone()
    PrecisionRuntime("apex-O2", "cpu").setup(model, opt)
    (kept,) = [s["momentum_buffer"] for p, s in opt.state.items() if p is master_of(model[0].weight)]
    assert torch.equal(kept, momentum)


def test_groups_that_are_added_later_get_masters_too():
    rt, model = PrecisionRuntime("apex-O2", "cpu"), net()
    model, opt = rt.setup(model, torch.optim.SGD(model[0].parameters(), lr=0.1))
    opt.add_param_group({"params": list(model[3].parameters()), "lr": 0.2})
    before = model[3].weight.detach().clone()
    train(rt, model, opt, range(1))
    assert [p.dtype for group in opt.param_groups for p in group["params"]] == [SINGLE] * 4
    assert not torch.equal(model[3].weight, before)


def test_setting_up_again_changes_nothing_and_takes_what_was_written_through_data():
    rt, model, opt = made()
    train(rt, model, opt, range(2))
    before = [p.clone() for p in opt.param_groups[0]["params"]]
    rt.setup(model, opt)
    assert all(torch.equal(a, b) for a, b in zip(before, opt.param_groups[0]["params"], strict=True))
    model[0].weight.data[0, 0] = 0.1
    rt.setup(model, opt)
    master = opt.param_groups[0]["params"][0]
    assert master[0, 0].item() == model[0].weight[0, 0].item()
    assert torch.equal(master[1:], before[0][1:])


def test_what_the_user_writes_into_the_model_is_not_undone_by_the_next_step():
    rt, model, opt = made()
    train(rt, model, opt, range(1))
    untouched = master_of(model[3].weight).clone()
    nn.init.constant_(model[0].weight, 0.75)
    opt.param_groups[0]["lr"] = 0.0
    train(rt, model, opt, range(1))
    assert model[0].weight.eq(0.75).all()
    assert torch.equal(master_of(model[3].weight), untouched)


def test_an_overflow_skips_names_the_model_s_parameter_and_leaves_masters_alone():
    rt, model = PrecisionRuntime("apex-O2", "cpu"), net()
    model, opt = rt.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = [p.clone() for p in opt.param_groups[0]["params"]]
    model[3].weight.register_hook(lambda g: g * float("inf"))
    rt.backward(model(batch(0)).square().mean())
    result = rt.step(opt)
    assert (result.skipped, result.culprits, result.scale) == (True, ("3.weight",), 32768.0)
    assert all(torch.equal(a, b) for a, b in zip(before, opt.param_groups[0]["params"], strict=True))
    assert all(p.grad is None for p in (*model[0].parameters(), *model[3].parameters()))


@pytest.mark.parametrize("zero", ["optimizer", "model"])
def test_gradients_of_a_step_do_not_stay_for_the_next(zero):
    rt, model = PrecisionRuntime("apex-O2", "cpu"), nn.Linear(2, 1, bias=False)
    model, opt = rt.setup(model, torch.optim.SGD(model.parameters(), lr=1.0))
    start = master_of(model.weight).detach().clone()
    for _ in range(3):
        (opt if zero == "optimizer" else model).zero_grad()
        rt.backward(model(torch.ones(1, 2)).sum() / 8)
        rt.step(opt)
    assert torch.equal(model.weight.float(), (start - 3 / 8).half().float())


def test_gradients_accumulate_in_float32():
    rt, model = PrecisionRuntime("apex-O2", "cpu", scaler=DynamicScaler(init_scale=1.0)), nn.Linear(1, 1, bias=False)
    model, opt = rt.setup(model, torch.optim.SGD(model.parameters(), lr=1.0))
    for x in (1.0, 2.0**-12, 2.0**-12):  # in half the second and the third would vanish
        rt.backward(model(torch.full((1, 1), x)).sum())
    assert rt.clip_gradients(opt, max_norm=9.0).item() == 1 + 2.0**-11
    assert model.weight.grad is None


def test_tied_and_frozen_parameters():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.c(self.b(self.a(x)))

    rt, model = PrecisionRuntime("apex-O2", "cpu"), Tied()
    model, opt = rt.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    frozen = model.c.weight.clone()
    rt.backward(model(torch.ones(1, 2)).sum())
    rt.step(opt)
    assert model.b.weight is model.a.weight
    assert torch.equal(model.a.weight, master_of(model.a.weight).half())
    assert torch.equal(model.c.weight, frozen)
    assert master_of(model.c.weight) is None


def test_two_optimizers_share_one_scale():
    rt, model = PrecisionRuntime("apex-O2", "cpu"), net()
    a, b = torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.SGD(model[3].parameters(), lr=0.1)
    rt.setup(model, a, b)
    rt.backward(model(batch(0)).square().mean())
    before = [model[0].weight.clone(), model[3].weight.clone()]
    assert rt.step(a).scale == rt.step(b).scale == 65536.0
    assert not torch.equal(model[0].weight, before[0])
    assert not torch.equal(model[3].weight, before[1])


def test_a_closure_is_refused_because_the_model_lags_behind():
    rt, model = PrecisionRuntime("apex-O2", "cpu"), nn.Linear(2, 1)
    model, opt = rt.setup(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ConfigurationError, match="with master weights the model has not got the new values yet"):
        rt.step(opt, lambda: model(torch.ones(1, 2)).sum())


def test_copies_of_a_model_have_no_part_in_its_masters():
    rt, model, opt = made()
    train(rt, model, opt, range(2))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.state_dict()["0.weight"], model[0].weight.float())
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin.state_dict()["0.weight"], model.state_dict()["0.weight"])


def test_masters_go_when_model_and_optimizer_go():
    rt, model, opt = made()
    train(rt, model, opt, range(1))
    gone = [weakref.ref(master_of(model[0].weight)), weakref.ref(model[0].weight)]
    del rt, model, opt
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_init_module_trains_as_setup_does(optimizer):
    states = []
    for made_inside in (False, True):
        rt = PrecisionRuntime("apex-O2", "cpu")
        if made_inside:
            with rt.init_module():
                model = net()
        else:
            model = net()
        model, opt = rt.setup(model, OPTIMIZERS[optimizer](model.parameters()))
        train(rt, model, opt, range(3))
        states.append(model.state_dict())
    assert_same(*states)


def test_an_audit_leaves_no_masters_in_the_model():
    model = net()
    before = copy.deepcopy(model.state_dict())
    audit(model, batch(0), mode="apex-O2")
    assert_same(model.state_dict(), before)
    assert not any(part._state_dict_hooks for part in model.modules())
    assert all(p not in _MASTERS for p in model.parameters())
