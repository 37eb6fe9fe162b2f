"""optimizer.step() in place of runtime.step(optimizer): told of where it does something else, and nowhere else."""

import warnings

import pytest
import torch
from torch import nn

from precision_runtime.errors import PrecisionWarning
from precision_runtime.modes import MODES
from precision_runtime.runtime import PrecisionRuntime

HARM = {
    "16-mixed": "multiplied by the loss scale",
    "apex-O1": "multiplied by the loss scale",
    "apex-O2": "does not get the new values of its master weights",
}


def trained(rt, step, known=True, rounds=3, kind=torch.optim.SGD):
    """Run ``step(rt, opt, closure)`` after each backward pass; the warnings, and the file that each points to."""
    model = nn.Linear(2, 1)
    if known:
        model, opt = rt.setup(model, kind(model.parameters(), lr=1e-3))
    else:
        model = rt.setup(model)
        opt = kind(model.parameters(), lr=1e-3)

    def closure():
        opt.zero_grad()
        loss = model(torch.ones(1, 2)).sum()
        rt.backward(loss)
        return loss

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(rounds):
            step(rt, opt, closure)
    return [(str(w.message), w.filename) for w in caught if w.category is PrecisionWarning]


def past(rt, opt, closure):
    closure()
    opt.step()


def through(rt, opt, closure):
    closure()
    rt.step(opt)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("mode", HARM)
def test_a_step_past_the_runtime_is_told_once_on_the_users_line(mode, known):
    ((message, file),) = trained(PrecisionRuntime(mode, "cpu"), past, known)
    assert HARM[mode] in message
    assert "runtime.step(optimizer) in place of optimizer.step()" in message
    assert file == __file__


def test_updates_that_are_not_torchs_need_the_runtimes_step():
    rt = PrecisionRuntime("bf16-true", "cpu", updates="kahan")
    ((message, _),) = trained(rt, past)
    assert "rounded to nearest, not 'kahan'" in message


def test_a_closure_given_to_the_optimizer_is_noticed():
    rt = PrecisionRuntime("16-mixed", "cpu")
    assert len(trained(rt, lambda rt, opt, closure: opt.step(closure), kind=torch.optim.LBFGS)) == 1
    assert trained(rt, lambda rt, opt, closure: rt.step(opt, closure), kind=torch.optim.LBFGS) == []


@pytest.mark.parametrize("mode", sorted({*MODES} - {*HARM} - {"nf4", "nf4-dq", "fp4", "fp4-dq", "int8"}))
def test_where_both_steps_are_the_same_nothing_is_told(mode):
    assert trained(PrecisionRuntime(mode, "cpu"), past) == []


def swapped_and_clipped(rt, opt, closure):
    through(rt, opt, closure)
    weights = [p for group in opt.param_groups for p in group["params"]]
    with torch.no_grad():
        kept = [p.clone() for p in weights]
        for p, value in zip(weights, kept, strict=True):
            p.mul_(0.9)
            p.copy_(value)
            p.clamp_(-1, 1)


def accumulated(rt, opt, closure):
    closure()
    closure()
    rt.step(opt)


def overflowed(rt, opt, closure):
    closure()
    for group in opt.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                p.grad.fill_(float("inf"))
    rt.step(opt)
    opt.zero_grad()
    opt.step()  # nobody has run backward since


def by_itself(rt, opt, closure):
    through(rt, opt, closure)
    opt.zero_grad()
    opt.step()


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("step", [through, swapped_and_clipped, accumulated, overflowed, by_itself])
@pytest.mark.parametrize("mode", HARM)
def test_no_false_warnings(mode, step, known):
    assert trained(PrecisionRuntime(mode, "cpu"), step, known) == []


def test_steps_by_torchs_own_scaler_are_its_owners_business():
    theirs = torch.amp.GradScaler("cpu", init_scale=8.0)
    theirs.scale(torch.ones(1))  # it wants to have scaled something

    def step(rt, opt, closure):
        closure()
        theirs.step(opt)
        theirs.update()

    for known in (True, False):
        assert trained(PrecisionRuntime("16-mixed", "cpu", scaler=theirs), step, known) == []
