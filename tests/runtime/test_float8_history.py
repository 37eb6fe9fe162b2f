"""Delayed scaling: scales, histories, and when they move."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from precision_runtime.float8 import DelayedScaling, Float8Linear, history
from precision_runtime.float8.layers import become_float8
from precision_runtime.float8.regions import current, region
from precision_runtime.formats import FORMATS

INF, NAN = float("inf"), float("nan")


class Twin:
    """One column of a history, as the documents describe it, in plain Python."""

    def __init__(self, length, largest, margin, algorithm):
        self.rows, self.scale = [0.0] * length, 1.0
        self.largest, self.margin, self.algorithm = largest, margin, algorithm

    def step(self, amax):
        self.rows[0] = amax
        if amax == 0:
            return
        found = amax if self.algorithm == "most_recent" else max(self.rows, key=lambda a: (math.isnan(a), a))
        if math.isfinite(found):
            exact = self.largest / found
            scale = torch.tensor(exact, dtype=torch.float64).float().item()
            self.scale = min(scale, FORMATS["float32"].max) / 2**self.margin
        self.rows = [0.0, *self.rows[2:], amax] if len(self.rows) > 1 else [0.0]


magnitudes = st.one_of(
    st.sampled_from([0.0, INF, NAN]), st.floats(2.0**-100, 2.0**100, width=32), st.floats(0.125, 8, width=32)
)


@given(
    amaxes=st.lists(magnitudes, max_size=8),
    length=st.integers(1, 4),
    margin=st.integers(0, 3),
    algorithm=st.sampled_from(["max", "most_recent"]),
    side=st.sampled_from(["fwd", "bwd"]),
    form=st.sampled_from(["HYBRID", "E4M3"]),
)
def test_a_history_is_what_the_documents_say(amaxes, length, margin, algorithm, side, form):
    recipe = DelayedScaling(margin, form, length, algorithm)
    memory = history.fresh(recipe, torch.device("cpu"))
    largest = 57344.0 if (side, form) == ("bwd", "HYBRID") else 448.0
    twin = Twin(length, largest, margin, algorithm)
    for amax in amaxes:
        history.collect(memory, side, 0, torch.tensor(amax))
        history.step(memory, side, recipe)
        twin.step(amax)
        assert memory[f"scale_{side}"][0].item() == twin.scale
        rows = memory[f"amax_history_{side}"][:, 0].tolist()
        assert str(rows) == str(twin.rows)  # as text, so that NaN equals itself
    assert memory[f"scale_{side}"][1].item() == 1  # a column that saw nothing
    assert memory[f"amax_history_{side}"][:, 1].eq(0).all()


def test_a_magnitude_too_small_for_a_scale_has_the_largest():
    recipe = DelayedScaling()
    memory = history.fresh(recipe, torch.device("cpu"))
    history.collect(memory, "fwd", 0, torch.tensor(2.0**-140))
    history.step(memory, "fwd", recipe)
    assert memory["scale_fwd"][0].item() == FORMATS["float32"].max


@pytest.mark.parametrize("default", [torch.float16, torch.float64])
def test_a_memory_is_float32_whatever_the_default_dtype_and_can_be_written_to(default):
    torch.set_default_dtype(default)
    try:
        with torch.inference_mode():
            memory = history.fresh(DelayedScaling(amax_history_len=2), torch.device("cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {t.dtype for t in memory.values()} == {torch.float32}
    history.collect(memory, "fwd", 0, torch.tensor(1.0))


@pytest.mark.parametrize(("length", "expected"), [(2, [9, 4]), (4, [9, 2, 3, 4]), (6, [9, 0, 0, 2, 3, 4]), (1, [9])])
def test_a_loaded_history_keeps_its_newest_rows(length, expected):
    rows = torch.tensor([[9.0], [2.0], [3.0], [4.0]])
    assert history.with_length(rows, length).flatten().tolist() == expected


def layer(recipe=None, seed=0, features=16):
    torch.manual_seed(seed)
    return become_float8(
        nn.Linear(features, features), DelayedScaling(amax_history_len=4) if recipe is None else recipe
    )


def step(module, x, gradient=1.0):
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(torch.full_like(y, gradient))
    return y.detach(), x.grad


def test_the_first_step_has_scale_one_and_the_second_has_the_first_s():
    one = layer()
    x = torch.full((8, 16), 3.0)
    first, _ = step(one, x, 0.5)
    codes = one.weight.detach().to(torch.float8_e4m3fn).float()  # no scale: small weights lose bits or vanish
    assert torch.allclose(first, x @ codes.T + one.bias, rtol=1e-6, atol=1e-6)
    assert one.scaling["scale_fwd"].tolist() == pytest.approx(
        [448 / 3, 448 / one.weight.abs().max().item(), 1.0], rel=2.0**-23
    )
    assert one.scaling["scale_bwd"].tolist() == [57344 / 0.5, 1.0]
    second, _ = step(one, x)
    assert not torch.equal(first, second)


def test_the_scale_saturates_what_the_past_did_not_foresee():
    one = layer()
    step(one, torch.ones(8, 16))
    y, _ = step(one, torch.full((8, 16), 5.0))
    # 5 is clamped to the 1 that was seen before.
    weights = (one.weight * one.scaling["scale_fwd_before"][1]).to(torch.float8_e4m3fn).float()
    assert torch.allclose(y, weights.sum(1) / one.scaling["scale_fwd_before"][1] + one.bias, rtol=1e-5, atol=1e-6)


def test_gradients_move_their_scale_when_backward_has_ended_and_not_before():
    one, two = layer(), layer(seed=1)
    seen = []
    x = torch.ones(8, 16, requires_grad=True)
    x.register_hook(lambda g: seen.append((one.scaling["scale_bwd"][0].item(), two.scaling["scale_bwd"][0].item())))
    two(one(x)).sum().backward()
    assert seen == [(1.0, 1.0)]
    assert two.scaling["scale_bwd"][0].item() == 57344
    assert one.scaling["scale_bwd"][0].item() > 57344


def test_a_backward_that_raises_leaves_the_next_one_right():
    one = layer()

    def fail(gradient):
        raise KeyError("the user's own")

    x = torch.ones(8, 16, requires_grad=True)
    x.register_hook(fail)
    with pytest.raises(KeyError):
        one(x).sum().backward()
    step(one, torch.ones(8, 16), gradient=0.25)
    assert one.scaling["scale_bwd"][0].item() == 57344  # the larger of both: 1 from the pass that did not end


def test_a_forward_that_raises_ends_its_region():
    with pytest.raises(KeyError), region():
        raise KeyError("the user's own")
    assert current() is None


def test_calls_of_one_region_share_their_scales_and_note_the_larger_magnitude():
    one, x = layer(), torch.full((8, 16), 2.0)
    with region():
        first = one(x)
        one(x * 3)
        again = one(x)
        assert one.scaling["scale_fwd"].tolist() == [1, 1, 1]
    assert torch.equal(first, again)
    assert one.scaling["scale_fwd"][0].item() == pytest.approx(448 / 6, rel=2.0**-23)
    assert one.scaling["amax_history_fwd"][:, 0].tolist() == [0, 0, 0, 6]


def test_an_evaluation_leaves_no_trace():
    one = layer()
    step(one, torch.ones(8, 16))
    before = copy.deepcopy(one.scaling)
    with torch.no_grad():
        first = one(torch.full((8, 16), 100.0))
    with torch.inference_mode():
        assert torch.equal(one(torch.full((8, 16), 100.0)), first)
    assert all(torch.equal(one.scaling[k], v) for k, v in before.items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_number_and_no_scale(reentrant):
    def model():
        return nn.Sequential(layer(seed=1), nn.Tanh(), layer(seed=2), nn.Tanh())

    def train(run):
        one = model()
        for number in range(4):
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(number)).requires_grad_()
            with region():
                y = run(one, x)
            y.square().sum().backward()
        return x.grad, one

    plain_grad, plain = train(lambda m, x: m(x))
    grad, found = train(lambda m, x: checkpoint(m, x, use_reentrant=reentrant))
    assert torch.equal(grad, plain_grad)
    for a, b in zip(plain, found, strict=True):
        if isinstance(a, Float8Linear):
            assert torch.equal(a.weight.grad, b.weight.grad)
            assert all(torch.equal(a.scaling[k], b.scaling[k]) for k in a.scaling)


def test_accumulated_steps_each_move_the_scales():
    one = layer()
    for size in (1.0, 2.0, 4.0):
        step(one, torch.full((8, 16), size))
    assert one.scaling["amax_history_fwd"][:, 0].tolist() == [0, 1, 2, 4]
    assert one.scaling["amax_history_bwd"][:, 0].tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("reduces", [True, False])
def test_processes_agree_on_magnitudes_where_the_recipe_says_so(monkeypatch, reduces):
    calls = []

    def elsewhere(tensor, op):
        calls.append(op)
        tensor.mul_(2)  # the other process saw twice as much

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", elsewhere)
    one = layer(DelayedScaling(amax_history_len=2, reduce_amax=reduces))
    step(one, torch.ones(8, 16))
    factor = 2 if reduces else 1
    assert calls == [torch.distributed.ReduceOp.MAX] * (2 if reduces else 0)  # one message per direction
    assert one.scaling["scale_fwd"][0].item() == 448 / factor
    assert one.scaling["scale_bwd"][0].item() == 57344 / factor


def test_shapes_tried_on_meta_leave_no_trace():
    one = layer()
    step(one, torch.ones(8, 16))
    before = copy.deepcopy(one.scaling)
    weights = {name: p.to("meta") for name, p in one.named_parameters()}
    y = torch.func.functional_call(one, weights, torch.ones(8, 16, device="meta"))
    assert (y.shape, y.device.type) == ((8, 16), "meta")
    assert all(torch.equal(one.scaling[k], v) for k, v in before.items())


def test_a_layer_made_on_meta_has_a_real_memory_once_it_is_real():
    one = become_float8(nn.Linear(16, 16, device="meta")).to_empty(device="cpu")
    nn.init.ones_(one.weight)
    nn.init.zeros_(one.bias)
    assert step(one, torch.ones(8, 16))[0].eq(16).all()
    assert one.scaling["scale_fwd"][0].item() == 448
