import copy
import inspect
import pickle
import threading

import pytest
import torch
from torch import nn

from precision_runtime.errors import ConfigurationError
from precision_runtime.modes import MODES
from precision_runtime.runtime import PrecisionRuntime
from precision_runtime.setup import forwarding


class Net(nn.Module):
    """Records what forward saw."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, scale=1.0, *, mask=None):
        self.saw = x.dtype, torch.is_autocast_enabled("cpu"), torch.get_default_dtype()
        return self.layer(x) * scale


def set_up(mode="bf16-mixed", model=None):
    return PrecisionRuntime(mode, "cpu").setup(Net() if model is None else model)


def test_the_model_is_the_same_object_with_the_same_keys_and_attributes():
    model = Net()
    keys = list(model.state_dict())
    assert set_up(model=model) is model
    assert type(model) is Net
    assert list(model.state_dict()) == keys
    assert dict(model.named_modules()).keys() == {"", "layer"}


def test_forward_called_by_name_casts_as_the_call_does():
    model = set_up("bf16-true")
    x = torch.randn(2, 4)
    assert torch.equal(model.forward(x), model(x))
    assert model.saw[0] is torch.bfloat16


def test_the_signature_of_forward_is_kept():
    assert inspect.signature(set_up().forward) == inspect.signature(Net().forward)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("mode", MODES)
def test_a_copy_calls_its_own_forward(clone, mode):
    model = set_up(mode)
    twin = clone(model)
    assert forwarding.strategy_of(twin) == forwarding.strategy_of(model)
    x = torch.randn(2, 4)
    assert torch.equal(model(x), twin(x))
    with torch.no_grad():
        if twin.layer.weight.is_floating_point():  # codes are no numbers to set
            twin.layer.weight.zero_()
            twin.layer.bias.zero_()
            assert twin(x).eq(0).all()
        twin.layer.bias.fill_(100.0)
    assert twin(x).gt(50).all()
    assert model(x).abs().lt(50).all()


def test_hooks_still_run():
    model = Net()
    seen = []
    model.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    set_up("16-true", model)(torch.randn(1, 4))
    assert seen == [torch.float32]


def test_a_forward_that_stood_on_the_instance_is_called_and_put_back():
    model = Net()
    mine = model.forward = lambda x: x * 2
    set_up("bf16-true", model)
    assert model(torch.ones(1)).item() == 2
    forwarding.restore(model)
    assert model.forward is mine


def test_a_class_patched_after_setup_is_obeyed(monkeypatch):
    model = set_up()
    monkeypatch.setattr(Net, "forward", lambda self, x: x + 1)
    assert model(torch.zeros(1)).item() == 1


def test_restore_takes_every_patch_away():
    model = set_up("16-mixed", nn.Sequential(nn.LSTM(2, 2)))
    assert forwarding.is_set_up(model)
    assert not forwarding.is_set_up(model[0])
    assert forwarding.restore(model) is model
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert not forwarding.is_set_up(model)
    with pytest.raises(ConfigurationError, match="Sequential has not been set up"):
        forwarding.strategy_of(model)


def test_setting_up_again_in_the_same_mode_changes_nothing():
    model = set_up("16-true")
    patch = model.forward
    assert set_up("16-true", model).forward is patch


def test_another_mode_on_the_same_model_or_on_a_part_of_it_is_refused():
    model = set_up("16-true")
    before = {n: p.dtype for n, p in model.named_parameters()}
    with pytest.raises(ConfigurationError, match="is set up in 16-true on cpu already and cannot be set up in 64-true"):
        set_up("64-true", model)
    with pytest.raises(ConfigurationError, match="has a part, '0', that is set up in 16-true"):
        set_up("bf16-mixed", nn.Sequential(model))
    assert {n: p.dtype for n, p in model.named_parameters()} == before


def test_suspended_runs_plainly_even_inside_autocast():
    model, plain = set_up("bf16-mixed"), Net()
    plain.load_state_dict(model.state_dict())
    model.double(), plain.double()
    x = torch.randn(2, 4, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with forwarding.suspended():
            assert forwarding.is_suspended()
            out = model(x)
            assert model.saw == (torch.float64, False, torch.float32)
            with forwarding.strategy_of(model).autocast():
                assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(out, plain(x))
    model.float()(x)
    assert model.saw[1]


def test_suspended_ends_with_an_exception():
    with pytest.raises(KeyError), forwarding.suspended():
        raise KeyError
    assert not forwarding.is_suspended()


def test_suspended_holds_for_its_thread_only():
    model = set_up("bf16-mixed")
    thread = threading.Thread(target=model, args=(torch.ones(1, 4),))
    with forwarding.suspended():
        thread.start()
        thread.join()
    assert model.saw[1]


@pytest.mark.parametrize("mode", MODES)
def test_a_model_compiles_without_a_graph_break_and_gives_the_same(mode):
    model = set_up(mode, nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    x = torch.randn(2, 4)
    torch.compiler.reset()  # one frame is compiled for every mode, and the compiler has had enough after eight
    # Below what the compiler sees, or packed weights that it has no graph for: it leaves such calls to eager code.
    whole = MODES[mode].family not in ("tf32", "quantized")
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=whole)(x), model(x))


def test_a_compiled_model_runs_plainly_inside_suspended():
    model = set_up("bf16-mixed", nn.Linear(4, 4))
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(2, 4)
    low = compiled(x)
    with forwarding.suspended():
        assert torch.equal(compiled(x), nn.functional.linear(x, model.weight, model.bias))
    assert torch.equal(compiled(x), low)


def test_a_set_up_model_can_be_used_functionally():
    model = set_up("bf16-mixed", nn.Linear(4, 4))
    x = torch.randn(2, 4)
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    assert torch.func.functional_call(model, zeros, (x,)).eq(0).all()
    assert model(x).ne(0).any()


@pytest.mark.slow
def test_set_up_models_compile_to_machine_code():
    model = set_up("bf16-mixed", nn.Linear(4, 4))
    x = torch.randn(2, 4)
    assert torch.allclose(torch.compile(model)(x), model(x), rtol=2**-8)


class Steps(nn.Module):
    """Its forward is a generator, which runs after the call."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 64)
        self.seen = []

    def forward(self, x):
        while x is not None:
            y = self.fc(x)
            self.seen.append(y.dtype)
            try:
                x = yield {"y": y}
            except KeyError:
                x = torch.zeros(1, 64, dtype=x.dtype)
        return y


@pytest.mark.parametrize("mode", MODES)
def test_a_forward_that_is_a_generator_runs_each_step_in_the_mode(mode):
    runtime = PrecisionRuntime(mode, "cpu")
    model = runtime.setup(Steps())
    plain = runtime.setup(nn.Sequential(nn.Linear(64, 64)))
    inside = []
    plain[0].register_forward_hook(lambda module, args, y: inside.append(y.dtype))
    x = torch.ones(1, 64)
    expected = plain(x).dtype

    running = model(x)
    given = [next(running)["y"], running.send(x)["y"], running.throw(KeyError())["y"]]
    assert not torch.is_autocast_enabled("cpu")  # the caller's code is none of the mode's
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32
    with pytest.raises(StopIteration) as end:
        running.send(None)
    assert {y.dtype for y in (*given, end.value.value)} == {expected}
    assert set(model.seen) == set(inside)
    running = model(x)
    next(running)
    running.close()
    assert list(running) == []


@pytest.mark.parametrize("islands", [(), ("0",)])
def test_scripting_a_set_up_model_is_refused_with_what_to_do(islands):
    model = PrecisionRuntime("bf16-true", "cpu", islands=islands).setup(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ConfigurationError, match=r"source code of \w+\.forward.* Script the plain model and set up"):
        torch.jit.script(model)
    assert not hasattr(model.forward, "__globals__")  # as for any object that has none


@pytest.mark.parametrize("mode", ["32-true", "64-true", "16-true", "bf16-mixed"])
@pytest.mark.parametrize("rewrite", [torch.jit.script, torch.fx.symbolic_trace])
def test_what_was_rewritten_first_can_be_set_up(rewrite, mode):
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    x = torch.randn(2, 4)
    expected = set_up(mode, copy.deepcopy(plain))(x)
    found = set_up(mode, rewrite(plain))(x)
    assert found.dtype is expected.dtype
    assert torch.equal(found, expected)
