import copy
import pickle
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from precision_runtime.errors import UnknownNameError
from precision_runtime.runtime import PrecisionRuntime
from precision_runtime.setup import forwarding
from precision_runtime.setup.sentinel import InputError, InputWarning, Sentinel


@dataclass
class Batch:
    x: torch.Tensor
    targets: torch.Tensor
    ids: torch.Tensor


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, batch, *more, scale=None, **rest):
        self.calls = getattr(self, "calls", 0) + 1
        out = self.fc(batch.x if isinstance(batch, Batch) else batch)
        return out if scale is None else out * scale


def batch(targets=(1e5, 7e4, -1e6, 1e-9, 1e-20, 0.0, 1.0)):
    return Batch(torch.ones(2, 4), torch.tensor(targets), torch.tensor([100_000]))


def set_up(mode="16-true", inputs="raise"):
    torch.manual_seed(0)
    return PrecisionRuntime(mode, "cpu", inputs=inputs).setup(Net())


def test_the_leaf_is_named_with_its_counts_and_forward_does_not_run():
    model = set_up()
    with pytest.raises(InputError) as caught:
        model(batch())
    assert "batch.targets: 3 inf, 2 became 0 (of 7, float32 to float16)" in str(caught.value)
    assert "Net.forward" in str(caught.value)
    assert "batch.x" not in str(caught.value)
    assert "ids" not in str(caught.value)
    assert not hasattr(model, "calls")
    half = batch().targets.half()
    assert (int(half.isinf().sum()), int(((half == 0) & (batch().targets != 0)).sum())) == (3, 2)


def test_every_bad_leaf_is_named_by_its_parameter():
    with pytest.raises(InputError) as caught:
        set_up()(
            torch.ones(1, 4),
            torch.ones(1),
            [torch.tensor(1e9)],
            scale=torch.tensor(1e-9),
            extra={"k": torch.tensor(9e9)},
        )
    text = str(caught.value)
    for name in ("more[1][0]: 1 inf", "scale: 1 became 0", "extra['k']: 1 inf"):
        assert name in text


def test_it_warns_and_goes_on():
    model = set_up(inputs="warn")
    with pytest.warns(InputWarning, match=r"batch\.targets: 3 inf, 2 became 0") as told:
        out = model(batch())
    assert [w.filename for w in told] == [__file__]
    assert torch.equal(out, set_up(inputs="keep")(batch()))


@pytest.mark.parametrize("inputs", ["warn", "raise"])
def test_healthy_inputs_pass_without_a_word(inputs):
    model = set_up(inputs=inputs)
    x = torch.randn(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = model(x)
    assert torch.equal(out, set_up(inputs="keep")(x))
    assert out.dtype is torch.float32


def test_what_is_inf_or_nan_already_is_no_loss_of_the_cast():
    set_up()(batch((torch.inf, torch.nan, -torch.inf)))


@pytest.mark.parametrize("mode", ["32-true", "bf16-true", "bf16-mixed", "16-mixed", "64-true"])
def test_only_what_the_mode_really_casts_counts(mode):
    set_up(mode)(batch((1e5, 1e-9)))
    if mode == "64-true":
        return
    wide = torch.tensor([1e300, 1e-300], dtype=torch.float64)
    if mode == "32-true":  # casts no input
        set_up(mode)(Batch(torch.ones(1, 4), wide, wide))
        return
    with pytest.raises(InputError, match="1 inf, 1 became 0"):
        set_up(mode)(Batch(torch.ones(1, 4), wide, torch.tensor(0)))


def test_off_nothing_of_it_is_there():
    model = set_up(inputs="keep")
    plain = PrecisionRuntime("16-true", "cpu").setup(Net())
    assert type(model.__dict__["forward"]) is type(plain.__dict__["forward"]) is forwarding.SetUpForward
    assert forwarding.patch_of(set_up(), Sentinel) is not None


def test_setting_up_again_changes_the_answer_and_takes_it_away():
    model = set_up()
    PrecisionRuntime("16-true", "cpu", inputs="warn").setup(model)
    with pytest.warns(InputWarning):
        model(batch())
    PrecisionRuntime("16-true", "cpu").setup(model)
    model(batch())
    assert forwarding.patch_of(model, Sentinel) is None
    assert forwarding.is_set_up(model)


def test_under_another_patch_it_falls_silent():
    model = set_up()
    above = type("Above", (forwarding.PatchedForward,), {"__call__": lambda self, *a, **k: self.own(*a, **k)})
    above(model)
    PrecisionRuntime("16-true", "cpu").setup(model)
    model(batch())


def test_copies_pickles_and_restoring_know_it():
    model = set_up()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(InputError):
            twin(batch())
        assert forwarding.patch_of(twin, Sentinel).module is twin
    forwarding.restore(model)
    assert "forward" not in model.__dict__


def test_plain_runs_are_not_watched():
    model = set_up("bf16-mixed")
    with forwarding.suspended():
        model(Batch(torch.ones(1, 4), torch.tensor(1e300, dtype=torch.float64), torch.tensor(0)))


def test_wrong_arguments_are_forward_s_own_error():
    with pytest.raises(TypeError, match="batch"):
        set_up()()
    model = PrecisionRuntime("16-true", "cpu", inputs="raise").setup(nn.ReLU())
    with pytest.raises(InputError, match=r"args\[0\]: 1 inf"):
        model(torch.tensor(1e9), 3)


def test_an_unknown_answer_is_refused():
    with pytest.raises(UnknownNameError, match="Did you mean 'raise'"):
        PrecisionRuntime("16-true", "cpu", inputs="raises")


@pytest.mark.slow
def test_compiled_models_are_watched_too():
    model = set_up()
    compiled = torch.compile(model)
    x = torch.randn(3, 4)
    assert torch.allclose(compiled(x), set_up(inputs="keep")(x), atol=1e-3)
    with pytest.raises(InputError):
        compiled(torch.full((3, 4), 1e9))
