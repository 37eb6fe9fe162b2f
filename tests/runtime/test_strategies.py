import re
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from precision_runtime import audit, audit_training
from precision_runtime.errors import PrecisionWarning
from precision_runtime.modes import MODES
from precision_runtime.runtime import PrecisionRuntime
from precision_runtime.strategies import strategy_for

HALF = {"16-true": torch.float16, "bf16-true": torch.bfloat16}
MIXED = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
CPU = torch.device("cpu")


class Spy(nn.Module):
    """Keeps what forward was given, and answers with ``answer`` or its first argument."""

    def __init__(self, answer=None):
        super().__init__()
        self.answer = answer
        self.unused = nn.Linear(2, 2)  # modes that swap layers refuse a model without any

    def forward(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs
        self.product = torch.ones(2, 2) @ torch.ones(2, 2)
        return args[0] if self.answer is None else self.answer


def run(mode, *args, answer=None, **kwargs):
    spy = PrecisionRuntime(mode, "cpu").setup(Spy(answer))
    return spy(*args, **kwargs), spy


# mode -> (dtype given -> dtype that forward sees)
SEEN = {
    "32-true": {d: d for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)},
    "64-true": dict.fromkeys((torch.float16, torch.bfloat16, torch.float32, torch.float64), torch.float64),
    **{m: dict.fromkeys((torch.float16, torch.bfloat16, torch.float32, torch.float64), d) for m, d in HALF.items()},
    **{m: dict.fromkeys((torch.float16, torch.bfloat16, torch.float32, torch.float64), torch.float32) for m in MIXED},
}


@pytest.mark.parametrize(("mode", "given", "seen"), [(m, g, s) for m, t in SEEN.items() for g, s in t.items()], ids=str)
def test_forward_sees_inputs_in_the_mode(mode, given, seen):
    out, spy = run(mode, torch.ones(2, dtype=given), key={"deep": [torch.ones(1, dtype=given)]})
    assert spy.args[0].dtype is seen
    assert spy.kwargs["key"]["deep"][0].dtype is seen
    assert out.dtype is (seen if MODES[mode].family == "full" else torch.float32)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.complex64])
def test_whole_numbers_bools_and_complex_inputs_arrive_as_they_are(mode, dtype):
    tensor = torch.ones(2, dtype=dtype)
    out, spy = run(mode, tensor)
    if mode == "64-true" and dtype is torch.complex64:
        assert spy.args[0].dtype is torch.complex128
    else:
        assert spy.args[0] is tensor
        assert out is tensor


@pytest.mark.parametrize("mode", MIXED)
def test_mixed_modes_never_cast_an_input_to_half(mode):
    # What a cast to half beforehand makes of these: inf and 0 (float16), 99840 (bfloat16).
    values = torch.tensor([1e5, 1e-9])
    _, spy = run(mode, values)
    assert spy.args[0] is values
    assert spy.product.dtype is MIXED[mode]


@pytest.mark.parametrize("mode", [*HALF, *MIXED])
def test_nested_outputs_go_to_the_default_dtype_and_objects_stay(mode):
    @dataclass
    class Out:
        y: torch.Tensor
        ids: torch.Tensor
        cache: object

    class Cache:
        keys = torch.ones(1, dtype=torch.float16)

    cache = Cache()
    answer = {"a": [Out(torch.ones(1, dtype=torch.float16), torch.ones(1, dtype=torch.long), cache)]}
    out, _ = run(mode, torch.ones(1), answer=answer)
    (inner,) = out["a"]
    assert (type(inner), inner.y.dtype, inner.ids.dtype) == (Out, torch.float32, torch.long)
    assert inner.cache is cache
    assert cache.keys.dtype is torch.float16


def test_outputs_follow_the_default_dtype_at_the_time_of_the_call():
    model = PrecisionRuntime("bf16-true", "cpu").setup(nn.Linear(2, 2))
    torch.set_default_dtype(torch.float64)
    try:
        assert model(torch.ones(1, 2)).dtype is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("mode", MODES)
def test_forward_never_changes_the_default_dtype(mode):
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(2, 2)

        def forward(self, x):
            self.default = torch.get_default_dtype()
            return torch.arange(0, 300, 1.0)[256:260]

    model = PrecisionRuntime(mode, "cpu").setup(Positions())
    assert model(torch.ones(1)).tolist() == [256, 257, 258, 259]  # a bfloat16 default: 256, 256, 258, 260
    assert model.default is torch.float32


@pytest.mark.parametrize("mode", MODES)
def test_parameters_have_the_dtype_of_the_mode(mode):
    model, _ = PrecisionRuntime(mode, "cpu").setup(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)))
    strategy = strategy_for(MODES[mode], CPU)
    kept = torch.float32 if MODES[mode].masters else strategy.dtype  # Apex's O2 keeps batch norms
    assert model.weight.dtype is model.running_mean.dtype is kept
    assert model.num_batches_tracked.dtype is torch.long


@pytest.mark.parametrize("mode", MIXED)
def test_a_half_checkpoint_gets_float32_parameters_in_mixed_modes_without_loss(mode):
    model = nn.Linear(3, 3).to(torch.bfloat16)
    before = model.weight.detach().clone()
    with pytest.warns(PrecisionWarning):
        PrecisionRuntime(mode, "cpu").setup(model)
    assert model.weight.dtype is torch.float32
    assert torch.equal(model.weight, before.float())


@pytest.mark.parametrize("mode", [*MIXED, "apex-O1"])
def test_mixed_modes_warn_of_half_tensors_that_they_widen(mode):
    class Averaged(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self.ema = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).bfloat16().requires_grad_(False)
            self.register_buffer("code", torch.ones(2, dtype=torch.float16))

    runtime = PrecisionRuntime(mode, "cpu")
    text = (
        f"{mode} keeps parameters and buffers in float32: setup turns 4 bfloat16 and 1 float16 tensors of Averaged "
        "into it ('ema.0.weight', 'ema.0.bias', 'ema.1.weight' and 2 more)"
    )
    with pytest.warns(PrecisionWarning, match=re.escape(text)) as caught:
        model = runtime.setup(Averaged(), strict=True)  # widening loses nothing
    assert [each.filename for each in caught] == [__file__]
    runtime.setup(model)  # nothing is left to widen, and nobody is told
    model.ema.bfloat16()
    assert model.ema[0].weight.dtype is torch.bfloat16
    assert runtime.setup(Averaged().float()).code.dtype is torch.float32


@pytest.mark.parametrize("mode", ["bf16-mixed", "apex-O1"])
def test_audits_do_not_warn_of_what_they_widen_themselves(mode):
    assert audit(nn.Linear(4, 4).bfloat16(), torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), mode=mode)
    training = audit_training(
        lambda: nn.Linear(4, 1).bfloat16(),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        lambda model, x: model(x).square().mean(),
        [torch.ones(4, 4)],
        mode=mode,
        steps=2,
    )
    assert training


def test_32_true_touches_nothing():
    model = nn.Linear(2, 2).double()
    x = torch.ones(1, 2, dtype=torch.float64)
    y = model(x)
    assert torch.equal(PrecisionRuntime("32-true", "cpu").setup(model)(x), y)


@pytest.mark.parametrize("mode", MIXED)
def test_mixed_forward_gives_what_torch_autocast_gives(mode):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))
    x = torch.randn(5, 8)
    with torch.autocast("cpu", dtype=MIXED[mode]):
        expected = model(x)
    expected.float().sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    out = PrecisionRuntime(mode, "cpu").setup(model)(x)
    out.sum().backward()
    assert torch.equal(out, expected.float())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))


class Raises(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x):
        self.layer(x)
        raise KeyError("the user's own")


@pytest.mark.parametrize("outer", [False, True], ids=["bare", "inside autocast"])
@pytest.mark.parametrize("mode", MODES)
def test_an_exception_in_forward_leaves_no_state_behind(mode, outer):
    def state():
        return (
            torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled(),
            torch.get_default_dtype(), torch.backends.mkldnn.enabled, torch.get_rng_state().sum().item(),
        )  # fmt: skip

    model = PrecisionRuntime(mode, "cpu").setup(Raises())
    with torch.autocast("cpu", dtype=torch.float16, enabled=outer):
        before = state()
        with pytest.raises(KeyError, match="the user's own"):
            model(torch.ones(1, 2))
        assert state() == before
        assert torch.autocast_increment_nesting() == 1 + outer + (not outer)  # autocast(enabled=False) nests, too
        torch.autocast_decrement_nesting()


def test_a_weight_changed_between_calls_is_seen():
    # Autocast keeps its half copies of weights up to the end of the outermost region: ours must end at each call.
    model = PrecisionRuntime("bf16-mixed", "cpu").setup(nn.Linear(2, 2, bias=False))
    x = torch.ones(1, 2)
    first = model(x)
    with torch.no_grad():
        model.weight.zero_()
    assert first.ne(0).any()
    assert model(x).eq(0).all()


def test_gradients_flow_after_a_call_without_gradients():
    model = PrecisionRuntime("bf16-mixed", "cpu").setup(nn.Linear(2, 2))
    with torch.no_grad():
        model(torch.ones(1, 2))
    model(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad is not None


def test_strategies_are_equal_by_mode_and_device():
    assert strategy_for(MODES["16-true"], CPU) == strategy_for(MODES["16-true"], CPU)
    assert strategy_for(MODES["16-true"], CPU) != strategy_for(MODES["bf16-true"], CPU)
    assert strategy_for(MODES["16-true"], CPU) != strategy_for(MODES["16-true"], torch.device("meta"))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # which 32-true takes, as without us
@pytest.mark.parametrize("mode", MODES)
def test_an_encoder_is_evaluated_under_a_padding_mask_as_it_is_trained(mode):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 64, dropout=0.0, batch_first=True)
    model = PrecisionRuntime(mode, "cpu").setup(nn.TransformerEncoder(layer, 2))
    padding = torch.tensor([[False, False, True], [False, False, False]])
    x = torch.randn(2, 3, 64)
    trained = model(x, src_key_padding_mask=padding).detach()
    with torch.no_grad():
        evaluated = model.eval()(x, src_key_padding_mask=padding)
    assert torch.allclose(trained[~padding].double(), evaluated[~padding].double(), atol=0.3)  # delayed scales move


@pytest.mark.parametrize("mode", MIXED)
def test_mixed_modes_evaluate_an_encoder_in_half(mode):
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    rt = PrecisionRuntime(mode, "cpu")
    model = rt.setup(nn.TransformerEncoder(layer, 2)).eval()
    with torch.no_grad(), rt.ledger():
        model(torch.randn(2, 3, 8))
    assert rt.verify() > 0.9
