"""Scales in checkpoints: exact resumption, plain models, NVIDIA's dicts."""

import io
import pickle

import pytest
import torch
from torch import nn

from precision_runtime.errors import ConfigurationError
from precision_runtime.float8 import DelayedScaling, without_scales
from precision_runtime.float8.layers import become_float8
from precision_runtime.float8.recipes import RECIPES
from precision_runtime.runtime import PrecisionRuntime

NAMES = {"scale_fwd", "scale_inv_fwd", "amax_history_fwd", "scale_bwd", "scale_inv_bwd", "amax_history_bwd", "recipe"}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(128, 256), nn.LayerNorm(256), nn.Linear(256, 128)

    def forward(self, x):
        return self.second(self.norm(self.first(x)).relu())


def trained(recipe=None, steps=3, seed=0):
    torch.manual_seed(seed)
    model = PrecisionRuntime("transformer-engine", "cpu", recipe=recipe).setup(Net())
    train(model, steps)
    return model


def train(model, steps, start=0):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for number in range(start, start + steps):
        x = torch.randn(8, 128, generator=torch.Generator().manual_seed(number))
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def stored(state):
    """Through a file, as a careful reader opens it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("recipe", RECIPES)
def test_training_resumes_bit_for_bit(recipe):
    given = {"recipe": recipe, **({"amax_history_len": 4} if recipe == "DelayedScaling" else {})}
    model = trained(given)
    other = PrecisionRuntime("transformer-engine", "cpu", recipe=given).setup(Net())
    other.load_state_dict(stored(model.state_dict()))
    assert train(model, 3, start=3) == train(other, 3, start=3)


def test_scales_are_saved_under_nvidia_s_names_as_tensors_and_builtins():
    state = trained().state_dict()
    assert set(state) == {
        *(f"{name}.{part}" for name in ("first", "second") for part in ("weight", "bias", "_extra_state")),
        "norm.weight", "norm.bias",
    }  # fmt: skip
    extra = state["first._extra_state"]
    assert set(extra) == NAMES
    assert extra["scale_fwd"].shape == (3,)
    assert extra["amax_history_bwd"].shape == (1024, 2)
    assert torch.equal(extra["scale_inv_fwd"], 1 / extra["scale_fwd"])
    assert extra["recipe"] == DelayedScaling().to_dict()


def test_what_was_saved_does_not_move_with_the_layer():
    model = trained()
    state = model.state_dict()
    before = state["first._extra_state"]["amax_history_fwd"].clone()
    train(model, 1)
    assert torch.equal(state["first._extra_state"]["amax_history_fwd"], before)


def test_a_plain_model_takes_the_weights_without_the_scales():
    model, plain = trained(), Net()
    with pytest.raises(RuntimeError, match=r"first\._extra_state"):  # what torch says by itself
        plain.load_state_dict(model.state_dict())
    plain.load_state_dict(without_scales(model.state_dict()))
    assert torch.equal(plain.first.weight, model.first.weight.float())


def test_only_scales_are_left_away_ours_and_nvidia_s():
    theirs = torch.zeros(4, dtype=torch.uint8)
    somebody_else_s = {"a._extra_state": {"mine": 1}, "b._extra_state": torch.zeros(1), "c": 2}
    assert without_scales({**somebody_else_s, "d._extra_state": theirs}) == somebody_else_s


def test_a_converted_model_takes_plain_weights_and_starts_without_history():
    model, plain = trained(), Net()
    result = model.load_state_dict(plain.state_dict())
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert model.first.scaling["scale_fwd"].tolist() == [1, 1, 1]
    assert not model.first.scaling["amax_history_fwd"].any()


def test_a_missing_weight_is_still_missing():
    model, state = trained(), Net().state_dict()
    del state["first.weight"]
    with pytest.raises(RuntimeError, match=r"first\.weight"):
        model.load_state_dict(state)


@pytest.mark.parametrize("length", [2, 8])
def test_a_history_of_another_length_is_cut_or_filled(length):
    model = trained({"amax_history_len": 4})
    other = trained({"amax_history_len": length}, steps=0)
    other.load_state_dict(model.state_dict())
    assert len(other.first.scaling["amax_history_fwd"]) == length
    assert torch.equal(other.first.scaling["amax_history_fwd"][-1], model.first.scaling["amax_history_fwd"][-1])
    assert torch.equal(other.first.scaling["scale_fwd"], model.first.scaling["scale_fwd"])


def test_scales_of_another_recipe_start_anew():
    delayed, current = trained(), trained("Float8CurrentScaling")
    delayed.load_state_dict(current.state_dict())
    assert delayed.first.scaling["scale_fwd"].tolist() == [1, 1, 1]
    current.load_state_dict(trained().state_dict())
    assert current.first.scaling == {}


def test_nvidia_s_states_are_read_once_they_are_unpickled_and_never_unpickled_here():
    layer = become_float8(nn.Linear(16, 16), DelayedScaling(amax_history_len=2))
    theirs = {
        "recipe": object,
        "scale_fwd": torch.tensor([2.0, 4.0, 1.0]),
        "amax_history_fwd": torch.ones(2, 3),
        "scale_bwd": torch.tensor([8.0, 1.0]),
        "amax_history_bwd": torch.ones(2, 2),
        "extra_fp8_variables": {},
    }
    layer.set_extra_state(theirs)
    assert layer.scaling["scale_fwd"].tolist() == [2, 4, 1]
    assert layer.scaling["scale_fwd_before"].tolist() == [2, 4, 1]
    layer.set_extra_state(torch.empty(0, dtype=torch.uint8))  # what they save for other recipes
    assert layer.scaling["scale_fwd"].tolist() == [1, 1, 1]
    packed = torch.frombuffer(bytearray(pickle.dumps(1)), dtype=torch.uint8)
    with pytest.raises(ConfigurationError, match=r"pickle\.loads"):
        layer.set_extra_state(packed)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"scale_fwd": torch.ones(3)}, "lack amax_history_fwd, scale_bwd, amax_history_bwd"),
        (
            {
                "scale_fwd": torch.ones(6), "amax_history_fwd": torch.ones(2, 6),
                "scale_bwd": torch.ones(2), "amax_history_bwd": torch.ones(2, 2),
            },
            r"scale_fwd of an FP8 layer has shape \(3,\), saved: \(6,\)",
        ),
        (3, "got int"),
    ],
)  # fmt: skip
def test_a_state_that_does_not_fit_says_why(state, message):
    layer = become_float8(nn.Linear(16, 16), DelayedScaling(amax_history_len=2))
    with pytest.raises(ConfigurationError, match=message):
        layer.set_extra_state(state)
