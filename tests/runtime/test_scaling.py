import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from precision_runtime.errors import ConfigurationError
from precision_runtime.runtime import PrecisionRuntime
from precision_runtime.scaling import DynamicScaler, NullScaler, scaler_from

INF, NAN = float("inf"), float("nan")


def parameter(value=1.0, lr=1.0):
    p = nn.Parameter(torch.tensor([value]))
    return p, torch.optim.SGD([p], lr=lr)


def runtime(**settings):
    return PrecisionRuntime("16-mixed", "cpu", scaler=DynamicScaler(**settings))


def round_(rt, p, opt, factor=1.0):
    opt.zero_grad()
    rt.backward((p * factor).sum())
    return rt.step(opt)


def test_an_overflow_skips_the_step_and_halves_the_scale():
    rt = runtime(init_scale=1024.0)
    p, opt = parameter()
    result = round_(rt, p, opt, INF)
    assert (result.skipped, result.scale, p.item()) == (True, 512.0, 1.0)
    assert not round_(rt, p, opt).skipped
    assert p.item() == 0.0  # the gradient was 1, unscaled exactly


@given(st.lists(st.sampled_from([1.0, INF, NAN]), max_size=30), st.integers(1, 4))
def test_the_scale_is_torchs_own_for_every_history(history, interval):
    # The second witness: torch.amp.GradScaler, driven by hand.
    rt = runtime(init_scale=2.0**40, growth_interval=interval)
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=interval)
    p, opt = parameter(lr=2.0**-10)
    q, other = parameter(lr=2.0**-10)
    for factor in history:
        result = round_(rt, p, opt, factor)
        other.zero_grad()
        theirs.scale((q * factor).sum()).backward()
        theirs.step(other)
        theirs.update()
        assert result.scale == rt.scaler.scale == theirs.get_scale()
        assert p.item() == q.item()


def test_the_scale_never_falls_below_the_floor_and_weights_stay_finite():
    rt = runtime(init_scale=4.0)
    p, opt = parameter()
    scales = [round_(rt, p, opt, INF).scale for _ in range(200)]
    assert scales[:3] == [2.0, 1.0, 1.0]
    assert scales[-1] == 1.0
    assert not round_(rt, p, opt).skipped
    assert math.isfinite(p.item())


def test_torchs_own_scaler_does_reach_zero_and_writes_nan():
    # Shows that the test above tests something.
    theirs = torch.amp.GradScaler("cpu", init_scale=4.0)
    p, opt = parameter()
    for factor in [INF] * 200 + [1.0]:
        opt.zero_grad()
        theirs.scale((p * factor).sum()).backward()
        theirs.step(opt)
        theirs.update()
    assert theirs.get_scale() == 0.0
    assert math.isnan(p.item())


def test_the_scale_never_grows_beyond_float32():
    rt = runtime(init_scale=2.0**127, growth_interval=1)
    p, opt = parameter(value=2.0**-60, lr=0.0)
    assert round_(rt, p, opt).scale == 2.0**127


def test_hysteresis_forgives_overflows_before_it_backs_off():
    rt = runtime(init_scale=64.0, hysteresis=3)
    p, opt = parameter(lr=0.0)
    assert [round_(rt, p, opt, INF).scale for _ in range(4)] == [64.0, 64.0, 32.0, 32.0]


def test_two_optimizers_in_one_round_change_the_scale_once():
    rt = runtime(init_scale=1024.0, growth_interval=1)
    (p, a), (q, b) = parameter(), parameter()
    rt.backward((p + 3 * q).sum())
    first, second = rt.step(a), rt.step(b)
    assert (first.scale, second.scale) == (2048.0, 2048.0)
    assert (p.item(), q.item()) == (0.0, -2.0)  # both unscaled by 1024


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_one_overflow_of_two_lowers_the_scale_once_and_skips_only_its_own_optimizer(order):
    rt = runtime(init_scale=1024.0, growth_interval=1)
    pairs = [parameter(), parameter()]
    rt.backward((pairs[0][0] * INF + pairs[1][0]).sum())
    results = {i: rt.step(pairs[i][1]) for i in order}
    assert rt.scaler.scale == 512.0
    assert (results[0].skipped, results[1].skipped) == (True, False)
    assert (pairs[0][0].item(), pairs[1][0].item()) == (1.0, 0.0)


def test_gradients_that_wait_for_their_step_follow_the_scale():
    rt = runtime(init_scale=1024.0, growth_interval=1)
    (p, a), (q, b) = parameter(lr=2.0**-20), parameter()
    rt.setup(nn.ParameterList([p, q]), a, b)
    for _ in range(3):  # b steps once in three rounds, a in each, and the scale doubles each time
        a.zero_grad()
        rt.backward((p + q).sum())
        rt.step(a)
    rt.step(b)
    assert q.item() == 1.0 - 3.0


def test_accumulating_after_clipping_without_a_step_is_still_right():
    rt = runtime(init_scale=1024.0)
    p, opt = parameter()
    rt.backward((2 * p).sum())
    rt.clip_gradients(opt, max_norm=1.0)
    rt.backward(p.sum())
    rt.step(opt)
    assert p.item() == pytest.approx(1.0 - 1.0 - 1.0, abs=1e-5)


def test_gradients_set_by_hand_may_step_again_and_spent_ones_may_not():
    rt = runtime(init_scale=4.0, growth_interval=100)
    p, opt = parameter()
    p.grad = torch.tensor([INF])
    assert rt.step(opt).scale == 2.0
    p.grad = torch.tensor([2.0])
    rt.step(opt)
    assert p.item() == 0.0
    with pytest.raises(ConfigurationError, match="SGD has stepped with these gradients already"):
        rt.step(opt)


def test_a_loss_in_float16_is_scaled_in_float32():
    rt = PrecisionRuntime("16-mixed", "cpu")
    p, opt = parameter()
    assert (torch.tensor(1.0, dtype=torch.float16) * 65536).isinf()
    assert rt.scaler.scaled(torch.tensor(1.0, dtype=torch.float16)).item() == 65536.0
    skipped = []
    for _ in range(2):
        opt.zero_grad()
        rt.backward(p.half().sum())
        skipped.append(rt.step(opt).skipped)
    assert skipped == [
        True,
        False,
    ]  # the loss's own gradient is the scale: 65536 overflows in a float16 graph, 32768 fits
    assert p.item() == 0.0


def test_float16_parameters_are_refused_with_what_to_do():
    rt = PrecisionRuntime("16-mixed", "cpu")
    p = nn.Parameter(torch.ones(1, dtype=torch.float16))
    opt = torch.optim.SGD([p], lr=1.0)
    p.grad = torch.ones_like(p)
    with pytest.raises(ConfigurationError, match=r"1 of 1 parameters are float16.*setup\(model, optimizer\).*16-true"):
        rt.step(opt)


def test_sparse_and_empty_and_absent_gradients_are_handled():
    rt = runtime(init_scale=8.0)
    table = nn.Embedding(4, 2, sparse=True)
    empty, unused = nn.Parameter(torch.ones(0)), nn.Parameter(torch.ones(1))
    opt = torch.optim.SGD([*table.parameters(), empty, unused], lr=1.0)
    before = table.weight.detach().clone()
    rt.backward(table(torch.tensor([1, 1])).sum() + empty.sum())
    assert not rt.step(opt).skipped
    assert torch.allclose(before - table.weight, torch.tensor([[0.0, 0.0], [2.0, 2.0], [0.0, 0.0], [0.0, 0.0]]))


def test_a_round_without_any_gradient_is_no_overflow():
    _, opt = parameter()
    assert not runtime().step(opt).skipped


def test_every_field_survives_the_state_dict():
    ours = DynamicScaler(2.0**10, 4.0, 0.25, 7, 2.0, 3)
    rt = PrecisionRuntime("16-mixed", "cpu", scaler=ours)
    p, opt = parameter(lr=0.0)
    for factor in (1.0, INF, 1.0):
        round_(rt, p, opt, factor)
    fresh = DynamicScaler()
    fresh.load_state_dict(ours.state_dict())
    assert fresh.state_dict() == ours.state_dict()
    assert fresh.history == ours.history
    assert ours.state_dict() == {
        "growth_factor": 4.0, "backoff_factor": 0.25, "growth_interval": 7, "floor": 2.0, "hysteresis": 3,
        "ceiling": 2.0**127, "patience": 200, "on_stall": "warn", "scale": 1024.0, "good": 1, "forgiven": 1,
        "stalled": 0, "rounds": 3,
        "history": [[2, "forgiven", 1024.0, 1024.0, ["a (1,) parameter of no model set up here"]]],
    }  # fmt: skip


def test_a_foreign_state_is_refused_with_every_key():
    with pytest.raises(
        ConfigurationError, match=r"missing \['backoff_factor', 'floor', .*unknown \['_growth_tracker'\]"
    ):
        DynamicScaler().load_state_dict({"scale": 1.0, "growth_factor": 2.0, "_growth_tracker": 0})
    with pytest.raises(ConfigurationError):
        NullScaler().load_state_dict({"scale": 1.0})


def test_every_bad_setting_is_named_at_once():
    with pytest.raises(ConfigurationError) as caught:
        DynamicScaler(0.5, 1.0, 1.0, 0, 1.0, 0)
    assert all(
        t in str(caught.value) for t in ("floor=1.0, init_scale=0.5", "growth_factor", "backoff", "interval", "hyst")
    )


def test_a_grad_scaler_of_torch_is_adopted_and_kept_true():
    theirs = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=2)
    rt = PrecisionRuntime("16-mixed", "cpu", scaler=theirs)
    p, opt = parameter(lr=0.0)
    scales = [round_(rt, p, opt, f).scale for f in (1.0, 1.0, INF)]
    assert scales == [16.0, 32.0, 16.0]
    assert theirs.get_scale() == 16.0
    rt.load_state_dict({**rt.state_dict(), "scaler": {**rt.scaler.state_dict(), "scale": 64.0}})
    assert theirs.get_scale() == rt.scaler.scale == 64.0


def test_what_is_no_scaler_is_refused():
    class Mine(torch.amp.GradScaler):
        pass

    with pytest.raises(ConfigurationError, match="a subclass of GradScaler may do more"):
        scaler_from(Mine("cpu"))
    with pytest.raises(ConfigurationError, match="3 is no scaler"):
        scaler_from(3)
    assert not scaler_from(torch.amp.GradScaler("cpu", enabled=False)).enabled
