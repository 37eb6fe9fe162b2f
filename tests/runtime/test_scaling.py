import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from precision_runtime.errors import ConfigurationError
from precision_runtime.runtime import PrecisionRuntime
from precision_runtime.scaling import DynamicScaler, NullScaler, StalledError, StallWarning, StaticScaler, scaler_from

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


def test_gradients_set_by_hand_are_scaled_by_hand_and_spent_ones_may_not_step_again():
    rt = runtime(init_scale=4.0, growth_interval=100)
    p, opt = parameter()
    p.grad = rt.scaler.scaled(torch.tensor([INF]))
    assert rt.step(opt).scale == 2.0
    p.grad = rt.scaler.scaled(torch.tensor([1.0]))
    rt.step(opt)
    assert p.item() == 0.0
    with pytest.raises(ConfigurationError, match="SGD has stepped with these gradients already"):
        rt.step(opt)


@pytest.mark.parametrize("verb", [lambda rt, opt: rt.step(opt), lambda rt, opt: rt.clip_gradients(opt, max_norm=1.0)])
@pytest.mark.parametrize("rounds", [0, 1])
def test_gradients_that_nobody_has_scaled_are_refused(verb, rounds):
    rt = runtime(init_scale=1024.0)
    p, opt = parameter()
    for _ in range(rounds):
        round_(rt, p, opt)
    opt.zero_grad()
    p.sum().backward()
    before = p.item()
    with pytest.raises(ConfigurationError, match=r"no loss has been scaled.* Call runtime\.backward\(loss\) in place"):
        verb(rt, opt)
    assert (p.item(), p.grad.item()) == (before, 1.0)  # nothing has been changed
    opt.zero_grad()
    assert not round_(rt, p, opt).skipped


def test_a_step_without_any_backward_is_refused():
    _, opt = parameter()
    with pytest.raises(ConfigurationError, match="no loss has been scaled yet"):
        runtime().step(opt)
    for mode in ("bf16-mixed", "32-true"):
        assert not PrecisionRuntime(mode, "cpu").step(opt).skipped


def test_what_a_scaler_of_torchs_has_scaled_may_step():
    theirs = torch.amp.GradScaler("cpu", init_scale=8.0)
    rt = PrecisionRuntime("16-mixed", "cpu", scaler=theirs)
    p, opt = parameter()
    for _ in range(2):
        opt.zero_grad()
        theirs.scale(p.sum()).backward()
        rt.step(opt)
    assert p.item() == -1.0


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
    rt.backward(p.sum())
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


@pytest.mark.parametrize("kind", [StaticScaler, DynamicScaler])
@pytest.mark.parametrize("bad", ["128", None, (2.0,)])
def test_settings_that_are_no_numbers_are_refused(kind, bad):
    with pytest.raises(ConfigurationError, match=r"settings are numbers, such as 1024\.0, got \w+="):
        kind(bad)
    with pytest.raises(ConfigurationError, match="patience='7'"):
        kind(1024.0, patience="7")


@pytest.mark.parametrize("mode", ["16-mixed", "bf16-mixed", "apex-O2"])
def test_what_is_no_loss_and_no_optimizer_is_refused(mode):
    rt = PrecisionRuntime(mode, "cpu")
    with pytest.raises(ConfigurationError, match=r"backward takes the loss as a tensor.* got float"):
        rt.backward(1.0)
    for bad in (None, nn.Linear(1, 1), "sgd"):
        with pytest.raises(ConfigurationError, match=f"take an optimizer, got {type(bad).__name__}"):
            rt.step(bad)
        with pytest.raises(ConfigurationError, match=f"take an optimizer, got {type(bad).__name__}"):
            rt.clip_gradients(bad, max_norm=1.0)


def test_a_round_without_any_gradient_is_no_overflow():
    _, opt = parameter()
    rt = runtime()
    rt.backward(torch.ones(1, requires_grad=True).sum())
    assert not rt.step(opt).skipped


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
        ConfigurationError, match=r"missing \['backoff_factor', 'ceiling', 'floor', .*unknown \['_growth_tracker'\]"
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
    assert theirs.state_dict()["_growth_tracker"] == 0
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


def test_a_scaler_of_torch_brings_its_state():
    theirs = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=3)
    theirs.load_state_dict({**theirs.state_dict(), "_growth_tracker": 2})
    rt = PrecisionRuntime("16-mixed", "cpu", scaler=theirs)
    p, opt = parameter(lr=0.0)
    assert round_(rt, p, opt).scale == 32.0  # the third good round
    assert round_(rt, p, opt).scale == 32.0
    assert theirs.state_dict()["_growth_tracker"] == 1


def test_a_sharded_scaler_of_torch_is_adopted_and_serves_the_cpu():
    sharded = pytest.importorskip("torch.distributed.fsdp.sharded_grad_scaler").ShardedGradScaler
    theirs = sharded(device="cpu", init_scale=64.0)
    rt = PrecisionRuntime("16-mixed", "cpu", scaler=theirs)
    p, opt = parameter()
    assert (round_(rt, p, opt, INF).skipped, theirs.get_scale()) == (True, 32.0)
    assert not round_(rt, p, opt).skipped
    assert p.item() == 0.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it would be active")
@pytest.mark.parametrize("kind", ["GradScaler", "ShardedGradScaler"])
def test_a_scaler_that_switched_itself_off_is_refused_and_says_why(kind):
    home = torch.amp if kind == "GradScaler" else pytest.importorskip("torch.distributed.fsdp.sharded_grad_scaler")
    with pytest.warns(UserWarning, match="CUDA is not available"):
        theirs = getattr(home, kind)()
    assert not theirs.is_enabled()  # which is all that anybody would see
    with pytest.raises(ConfigurationError, match=f"scaler={kind}: it is inactive.*'cuda'.*device='cpu'"):
        PrecisionRuntime("16-mixed", "cpu", scaler=theirs)
    assert not PrecisionRuntime("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", enabled=False)).scaler.enabled


def test_a_static_scale_never_changes_and_skips_what_overflows():
    rt = PrecisionRuntime("16-mixed", "cpu", scaler=StaticScaler(1000.0))
    p, opt = parameter()
    results = [round_(rt, p, opt, f) for f in (INF, 1.0, NAN, 1.0)]
    assert [(r.skipped, r.scale) for r in results] == [(True, 1000.0), (False, 1000.0)] * 2
    assert p.item() == pytest.approx(1.0 - 2.0, abs=1e-6)  # 1000 is no power of two: unscaling rounds
    fresh = PrecisionRuntime("16-mixed", "cpu", scaler=StaticScaler(1.0))
    fresh.load_state_dict(rt.state_dict())
    assert fresh.state_dict() == rt.state_dict()
    assert "It is static" in rt.scaler.explain()
    for wrong in (0.0, -1.0, INF, NAN, 2.0**-127):
        with pytest.raises(ConfigurationError, match="static loss scale lies in"):
            StaticScaler(wrong)


def test_the_ceiling_holds():
    rt = runtime(init_scale=8.0, growth_interval=1, ceiling=24.0)
    p, opt = parameter(lr=0.0)
    assert [round_(rt, p, opt).scale for _ in range(4)] == [16.0, 24.0, 24.0, 24.0]
    assert "ceiling, 24" in rt.scaler.explain()


@pytest.mark.parametrize("scaler", [DynamicScaler(4.0, patience=3), StaticScaler(4.0, patience=3)], ids=["dyn", "fix"])
def test_a_stall_is_told_once_with_the_culprits(scaler):
    rt = PrecisionRuntime("16-mixed", "cpu", scaler=scaler)
    model = nn.Linear(1, 1, bias=False)
    model, opt = rt.setup(model, torch.optim.SGD(model.parameters(), lr=0.0))
    lowest = 2 if isinstance(scaler, DynamicScaler) else 0
    for number in range(12):
        opt.zero_grad()
        rt.backward(model.weight.sum() * INF)
        if number == lowest + 2:
            with pytest.warns(StallWarning, match=r"^3 steps in a row were skipped.*gradient of weight was inf or NaN"):
                rt.step(opt)
        else:
            rt.step(opt)  # a second warning would be an error
    round_(rt, model.weight, opt)
    for number in range(3):  # a new stall is told again
        opt.zero_grad()
        rt.backward(model.weight.sum() * INF)
        if number == 2:
            with pytest.warns(StallWarning):
                rt.step(opt)
        else:
            rt.step(opt)


def test_a_stall_can_end_the_training_or_be_ignored():
    rt = runtime(init_scale=1.0, patience=2, on_stall="raise")
    p, opt = parameter()
    round_(rt, p, opt, INF)
    with pytest.raises(StalledError, match="2 steps in a row"):
        round_(rt, p, opt, INF)
    rt = runtime(init_scale=1.0, patience=2, on_stall="ignore")
    assert all(round_(rt, p, opt, INF).skipped for _ in range(5))
    with pytest.raises(ValueError, match="on_stall 'panic' is unknown"):
        DynamicScaler(on_stall="panic")


def test_two_optimizers_tell_of_a_stall_once():
    rt = runtime(init_scale=1.0, patience=1)
    (p, a), (q, b) = parameter(), parameter()
    rt.backward((p * INF + q * INF).sum())
    with pytest.warns(StallWarning) as told:
        rt.step(a), rt.step(b)
    assert [w.filename for w in told] == [__file__]


def test_the_scaler_explains_its_scale():
    rt = runtime(init_scale=16.0, growth_interval=2, floor=8.0, hysteresis=2)
    model = nn.Linear(1, 1, bias=False)
    model, opt = rt.setup(model, torch.optim.SGD(model.parameters(), lr=0.0))
    assert rt.scaler.explain() == (
        "The loss scale is 16 after 0 rounds.\n"
        "  It has been so from the beginning: no gradient was inf or NaN.\n"
        "  It grows to 32 after 2 more good rounds in a row."
    )
    for factor in (1.0, 1.0, INF, INF, INF, INF, INF, 1.0):
        opt.zero_grad()
        rt.backward(model.weight.sum() * factor)
        rt.step(opt)
    because = "because of inf or NaN in the gradient of weight"
    assert rt.scaler.explain() == (
        "The loss scale is 8 after 8 rounds.\n"
        "  round 2: the scale grew from 16 to 32\n"
        f"  round 3: the scale stayed 32 (hysteresis) {because}\n"
        f"  round 4: the scale fell from 32 to 16 {because}\n"
        f"  round 5: the scale stayed 16 (hysteresis) {because}\n"
        f"  round 6: the scale fell from 16 to 8 {because}\n"
        f"  round 7: the scale stayed 8, for it can go no lower {because}\n"
        "  It grows to 16 after 1 more good round in a row."
    )
    assert rt.scaler.history[1].culprits == ("weight",)
    assert PrecisionRuntime("bf16-mixed", "cpu").scaler.explain() == "The loss is not scaled."


def test_the_history_stays_short_and_goes_into_the_checkpoint():
    rt = runtime(init_scale=2.0**60, growth_interval=1)
    p, opt = parameter(lr=0.0)
    for _ in range(50):
        round_(rt, p, opt)
    assert len(rt.scaler.history) == 32
    assert rt.scaler.history[-1].round == rt.scaler.rounds == 50
    fresh = runtime()
    fresh.load_state_dict(rt.state_dict())
    assert fresh.scaler.explain() == rt.scaler.explain()


def test_overflow_in_the_first_micro_batch_skips_the_step():
    rt = runtime(init_scale=8.0)
    p, opt = parameter()
    for factor in (INF, 1.0, 1.0):
        rt.backward((p * factor).sum())
    assert rt.step(opt).skipped
    opt.zero_grad()
    for factor in (1.0, 2.0, 3.0):
        rt.backward((p * factor / 8).sum())
    assert not rt.step(opt).skipped
    assert p.item() == 1.0 - 6 / 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_gradients_of_every_dtype_are_unscaled_and_checked(dtype):
    rt = runtime(init_scale=1024.0)
    p = nn.Parameter(torch.ones(3, dtype=dtype))
    opt = torch.optim.SGD([p], lr=1.0)
    rt.backward((p * 2).abs().sum())
    assert not rt.step(opt).skipped
    assert torch.equal(p, torch.full((3,), -1.0, dtype=dtype))
    opt.zero_grad()
    rt.backward((p * 2).abs().sum())
    p.grad[1] *= complex("nan") if dtype.is_complex else NAN
    assert rt.step(opt).skipped


def test_a_device_without_the_kernel_gets_the_plain_operations(monkeypatch):
    def missing(*args):
        raise NotImplementedError

    monkeypatch.setattr(torch, "_amp_foreach_non_finite_check_and_unscale_", missing)
    rt = runtime(init_scale=1024.0)
    p, opt = parameter()
    assert [round_(rt, p, opt, f).skipped for f in (1.0, INF, NAN, 1.0)] == [False, True, True, False]
    assert p.item() == -1.0
