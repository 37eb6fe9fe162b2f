"""The step: closures, double backward, autocast's cache, gates."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from precision_runtime.errors import ConfigurationError
from precision_runtime.runtime import PrecisionRuntime
from precision_runtime.scaling import DynamicScaler

INF = float("inf")
MODES = ("32-true", "64-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed")
CALLS = {
    "position": lambda rt, opt, closure: rt.step(opt, closure),
    "keyword": lambda rt, opt, closure: rt.step(opt, closure=closure),
    "partial": lambda rt, opt, closure: partial(rt.step, opt, closure)(),
}


def fitted(mode, kind, call, steps=4, scaler=None, **settings):
    """Train a small regression with a closure; returns the losses."""
    torch.manual_seed(0)
    rt, model = PrecisionRuntime(mode, "cpu", scaler=scaler), nn.Linear(3, 1)
    model, opt = rt.setup(model, kind(model.parameters(), **settings))
    x = torch.randn(16, 3)
    y = x.sum(1, keepdim=True)

    def closure():
        opt.zero_grad()
        loss = (model(x) - y).square().mean()
        rt.backward(loss)
        return loss

    losses = []
    for _ in range(steps):
        assert not call(rt, opt, closure).skipped
        losses.append((model(x) - y).square().mean().item())
    return losses


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("mode", MODES)
def test_closures_work_however_they_are_passed(mode, call):
    scaler = DynamicScaler(1024.0) if mode == "16-mixed" else None
    losses = fitted(mode, torch.optim.SGD, call, scaler=scaler, lr=0.1)
    reference = fitted("64-true", torch.optim.SGD, CALLS["keyword"], lr=0.1)
    assert losses == pytest.approx(reference, rel=0.05)


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
@pytest.mark.parametrize("mode", ["32-true", "64-true", "16-mixed", "bf16-mixed"])
def test_lbfgs_works_in_every_mode_with_wide_weights(mode, line_search):
    settings = {"lr": 0.5, "max_iter": 5, "line_search_fn": line_search}
    scaler = DynamicScaler(1024.0) if mode == "16-mixed" else None
    losses = fitted(mode, torch.optim.LBFGS, CALLS["position"], scaler=scaler, **settings)
    assert losses[-1] < 1e-3


def test_lbfgs_without_a_closure_is_refused_by_name():
    for mode in MODES:
        rt, model = PrecisionRuntime(mode, "cpu"), nn.Linear(1, 1)
        model, opt = rt.setup(model, torch.optim.LBFGS(model.parameters()))
        with pytest.raises(ConfigurationError, match="LBFGS computes its gradients through a closure"):
            rt.step(opt)


class Greedy(torch.optim.SGD):
    """Steps first, evaluates its closure afterwards, and steps again: no optimizer of torch's."""

    def step(self, closure):
        super().step()
        loss = closure()
        super().step()
        return loss


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.Adam, Greedy])
def test_an_evaluation_that_overflows_takes_the_whole_step_back(kind):
    rt, model = PrecisionRuntime("16-mixed", "cpu", scaler=DynamicScaler(8.0)), nn.Linear(1, 1, bias=False)
    model, opt = rt.setup(model, kind(model.parameters(), lr=0.1))
    factors = iter([1.0] * 3 + [INF] + [1.0] * 60)

    def closure():
        opt.zero_grad()
        loss = model.weight.square().sum() * next(factors)
        rt.backward(loss)
        return loss

    closure(), rt.scaler.unscale(opt)  # Greedy needs a gradient to begin with
    before = None
    for _ in range(4):
        before = model.weight.detach().clone(), copy.deepcopy(opt.state_dict())
        result = rt.step(opt, closure)
        if result.skipped:
            break
    assert result.skipped
    assert (result.scale, result.culprits) == (4.0, ("weight",))
    assert torch.equal(model.weight, before[0])
    assert repr(opt.state_dict()) == repr(before[1])
    opt.zero_grad()
    assert not rt.step(opt, closure).skipped
    assert model.weight.isfinite().all()
    assert not torch.equal(model.weight, before[0])


def test_a_closure_that_does_not_use_the_runtimes_backward_is_refused():
    rt, model = PrecisionRuntime("16-mixed", "cpu"), nn.Linear(1, 1)
    model, opt = rt.setup(model, torch.optim.SGD(model.parameters(), lr=1.0))
    before = model.weight.detach().clone()

    def closure():
        loss = model(torch.ones(1, 1)).sum()
        loss.backward()
        return loss

    for call in CALLS.values():
        with pytest.raises(ConfigurationError, match=r"given to SGD ran no backward\(\) of the runtime"):
            call(rt, opt, closure)
    assert torch.equal(model.weight, before)


def test_an_optimizer_that_ignores_its_closure_is_refused_and_taken_back():
    class Deaf(torch.optim.SGD):
        def step(self, closure=None):
            super().step()

    rt, model = PrecisionRuntime("16-mixed", "cpu"), nn.Linear(1, 1)
    model, opt = rt.setup(model, Deaf(model.parameters(), lr=1.0))
    before = model.weight.detach().clone()
    rt.backward(model(torch.ones(1, 1)).sum())
    with pytest.raises(ConfigurationError, match="Deaf did not call its closure"):
        rt.step(opt, lambda: None)
    assert torch.equal(model.weight, before)


def test_torchs_own_guard_lets_a_closure_by_position_through():
    # Shows that the tests above test something: the weight moves by a gradient that is still scaled, 1024 times it.
    theirs = torch.amp.GradScaler("cpu", init_scale=1024.0)
    p = nn.Parameter(torch.ones(1))
    opt = torch.optim.SGD([p], lr=1.0)

    def closure():
        opt.zero_grad()
        theirs.scale(p.sum()).backward()

    closure()
    theirs.step(opt, closure)
    assert p.item() == 1.0 - 1024.0


# Double backward


@pytest.mark.parametrize("mode", MODES)
def test_a_gradient_penalty_is_what_float64_gives(mode):
    def penalised(mode):
        torch.manual_seed(0)
        scaler = DynamicScaler(1024.0) if mode == "16-mixed" else None
        rt = PrecisionRuntime(mode, "cpu", scaler=scaler)
        model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
        model, opt = rt.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        x = torch.randn(8, 4, dtype=torch.float64).to(rt.strategy.dtype).requires_grad_()
        (gradient,) = rt.gradients(model(x).sum(), [x])
        assert gradient is not None
        loss = (gradient.double().norm(dim=1) - 1).square().mean()
        rt.backward(loss)
        assert not rt.step(opt).skipped
        return [gradient, *(p.grad for p in model.parameters() if p.grad is not None)]

    unit = PrecisionRuntime(mode, "cpu").mode.format.unit_roundoff
    for found, expected in zip(penalised(mode), penalised("64-true"), strict=True):
        # About ten operations follow each other, forward, backward and backward again; each rounds by at most u.
        assert (found.double() - expected).norm() <= 20 * unit * expected.norm()


def test_tiny_inner_gradients_survive_half_only_because_they_are_scaled():
    rt = PrecisionRuntime("16-mixed", "cpu", scaler=DynamicScaler(2.0**15))
    x = torch.full((1,), 2.0**-10, dtype=torch.float32, requires_grad=True)

    def outputs():
        with rt.autocast():
            return ((x.half() * 2.0**-14) * 2.0**-13).float().sum()  # the gradient, 2^-27, is 0 in float16

    (plain,) = torch.autograd.grad(outputs(), x)
    (scaled,) = rt.gradients(outputs(), [x], create_graph=False)
    assert plain.item() == 0.0
    assert scaled.item() == 2.0**-27


def test_an_inner_overflow_skips_the_step():
    rt, model = PrecisionRuntime("16-mixed", "cpu"), nn.Linear(1, 1, bias=False)
    model, opt = rt.setup(model, torch.optim.SGD(model.parameters(), lr=1.0))
    before = model.weight.detach().clone()
    x = torch.ones(1, 1, requires_grad=True)
    (gradient,) = rt.gradients((model(x) * 100.0).sum(), [x])  # times 65536 it does not fit float16
    rt.backward(gradient.square().sum())
    result = rt.step(opt)
    assert (result.skipped, result.scale, result.culprits) == (True, 32768.0, ("weight",))
    assert torch.equal(model.weight, before)


def test_unused_inputs_may_be_allowed_as_in_autograd():
    rt = PrecisionRuntime("16-mixed", "cpu")
    x, unused = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    first, second = rt.gradients((x * 2).sum(), [x, unused], allow_unused=True)
    assert (first.item(), second) == (2.0, None)


# Autocast's cache of cast weights


@pytest.mark.parametrize("mode", ["16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("outer", [False, True], ids=["bare", "inside autocast"])
@pytest.mark.parametrize("inside", [False, True], ids=["two calls", "one forward"])
def test_a_call_without_gradients_takes_none_from_the_next(mode, outer, inside):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            if inside:
                with torch.no_grad():
                    self.layer(x)
            return self.layer(x)

    rt = PrecisionRuntime(mode, "cpu")
    model = rt.setup(Twice())
    x = torch.ones(1, 2)
    with rt.autocast() if outer else torch.enable_grad():
        with torch.no_grad():
            model(x)
        loss = model(x).sum()
    loss.backward()
    assert torch.equal(model.layer.weight.grad, torch.ones(2, 2))


# Schedulers


def gated(scheduler, **settings):
    rt = PrecisionRuntime("16-mixed", "cpu", scaler=DynamicScaler(8.0))
    p = nn.Parameter(torch.ones(1))
    opt = torch.optim.SGD([p], lr=1.0)
    return rt, p, opt, rt.gate(scheduler(opt, **settings))


def run(rt, p, opt, factor):
    opt.zero_grad()
    rt.backward((p * factor).sum())
    return rt.step(opt)


def test_a_gated_scheduler_steps_only_when_the_optimizer_did():
    rt, p, opt, gate = gated(lr_scheduler.StepLR, step_size=1, gamma=0.5)
    passed = []
    for factor in (INF, 1.0, INF, INF, 1.0):  # torch warns where a scheduler steps before its optimizer: none here
        run(rt, p, opt, factor)
        passed.append(gate.step())
    assert passed == [False, True, False, False, True]
    assert gate.get_last_lr() == [0.25]
    assert gate.last_epoch == 2


def test_a_scheduler_without_a_gate_runs_ahead():
    rt, p, opt, gate = gated(lr_scheduler.StepLR, step_size=1, gamma=0.5)
    run(rt, p, opt, INF)
    with pytest.warns(UserWarning, match=r"before `optimizer.step\(\)`"):
        gate.scheduler.step()
    run(rt, p, opt, 1.0)
    gate.scheduler.step()
    assert gate.get_last_lr() == [0.25]


def test_reduce_on_plateau_counts_no_epoch_in_which_nothing_was_learned():
    rt, p, opt, gate = gated(lr_scheduler.ReduceLROnPlateau, factor=0.1, patience=0)
    for epoch in ((1.0, 1.0), (INF, INF), (INF, INF), (INF, 1.0)):
        for factor in epoch:
            run(rt, p, opt, factor)
        gate.step(5.0)
    assert gate.num_bad_epochs == 0
    assert opt.param_groups[0]["lr"] == pytest.approx(0.1)  # one bad epoch, the last; three would give 0.001


def test_a_gate_hands_the_rest_on_and_watches_whoever_steps():
    _, p, opt, gate = gated(lr_scheduler.ExponentialLR, gamma=0.5)
    p.grad = torch.ones(1)
    opt.step()
    assert gate.step()
    assert not gate.step()
    state = gate.state_dict()
    assert state == gate.scheduler.state_dict()
    gate.remove()
    opt.step()
    assert not gate.step()
    assert "ExponentialLR" in repr(gate)
    with pytest.raises(AttributeError):
        _ = gate.no_such_thing


def test_chained_and_sequential_schedulers_pass_a_gate():
    rt, p, opt, gate = gated(
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.ConstantLR(o, 0.5, 1), lr_scheduler.ExponentialLR(o, 0.5)], milestones=[1]
        )
    )
    run(rt, p, opt, 1.0)
    assert gate.step()
    chained = rt.gate(lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(opt, 0.5)]))
    assert not chained.step()


@pytest.mark.filterwarnings("ignore:Seems like `optimizer.step..` has been overridden")  # torch's, of any copy
def test_a_copy_of_a_gate_watches_the_copy_of_its_optimizer():
    _, p, opt, gate = gated(lr_scheduler.ExponentialLR, gamma=0.5)
    twin = copy.deepcopy(gate)
    p.grad = torch.ones(1)
    opt.step()
    assert not twin.step()
    twin.optimizer.step()
    assert twin.step()
    assert gate.step()


def test_what_is_no_scheduler_is_refused():
    with pytest.raises(ConfigurationError, match=r"a gate goes before a scheduler.*got int"):
        PrecisionRuntime("32-true", "cpu").gate(3)
