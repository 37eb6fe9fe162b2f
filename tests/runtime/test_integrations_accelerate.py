"""accelerate hands precision over: its own loop trains as the runtime trains."""

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate", reason="accelerate is not installed")

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from precision_runtime import PrecisionRuntime, audit
from precision_runtime.counting.ledger import Ledger
from precision_runtime.errors import ConfigurationError, UnknownNameError, UnsupportedError
from precision_runtime.integrations import accelerate as module
from precision_runtime.integrations import plain
from precision_runtime.integrations.accelerate import PrecisionAccelerator
from precision_runtime.scaling import DynamicScaler

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
MODES = ["32-true", "64-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed", "apex-O2"]


@pytest.fixture(autouse=True)
def fresh():
    """accelerate keeps one state for the whole process."""
    states = (AcceleratorState, GradientState, PartialState)
    for state in states:
        state._reset_state()
    yield
    for state in states:
        state._reset_state()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def batches(count=4):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 8, generator=generator) for _ in range(count)]


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("mode", MODES)
def test_its_own_loop_trains_bit_for_bit_as_the_runtime_does(mode):
    accelerator = PrecisionAccelerator(PrecisionRuntime(mode, "cpu"), cpu=True, gradient_accumulation_steps=2)
    model = network()
    model, opt = accelerator.prepare(model, optimizer_of(model))
    runtime = PrecisionRuntime(mode, "cpu")
    twin = network()
    twin, twin_opt = runtime.setup(twin, optimizer_of(twin))
    for number, x in enumerate(batches()):
        with accelerator.accumulate(model):
            accelerator.backward(model(x).square().mean())
            if accelerator.sync_gradients:
                accelerator.clip_grad_value_([p for g in opt.param_groups for p in g["params"]], 0.01)
            opt.step()
            opt.zero_grad()
        runtime.backward(twin(x).square().mean() / 2)
        if number % 2:
            runtime.clip_gradients(twin_opt, clip_value=0.01)
            assert runtime.step(twin_opt) == accelerator.scaler.result
            twin_opt.zero_grad()
    for name, value in twin.named_parameters():
        assert torch.equal(model.get_parameter(name), value), name
    moved = [not torch.equal(p, q.to(p.dtype)) for p, q in zip(model.parameters(), network().parameters(), strict=True)]
    assert any(moved)


def test_a_step_that_is_skipped_shows_in_accelerate_and_clipping_does_not_raise_on_it():
    accelerator = PrecisionAccelerator(PrecisionRuntime("16-mixed", "cpu", scaler=DynamicScaler(64.0)), cpu=True)
    model = network()
    model, opt = accelerator.prepare(model, optimizer_of(model))
    before = model[0].weight.detach().clone()
    accelerator.backward(model(batches()[0]).square().mean())
    model[0].weight.grad[0, 0] = float("inf")
    assert accelerator.clip_grad_norm_(model.parameters(), 1.0).item() == float("inf")
    opt.step()
    assert opt.step_was_skipped
    assert accelerator.scaler.get_scale() == 32.0
    assert torch.equal(model[0].weight, before)
    opt.zero_grad()
    accelerator.backward(model(batches()[0]).square().mean())
    assert accelerator.clip_grad_norm_(model.parameters(), 1e-3).item() < 10.0
    assert torch.stack([p.grad.norm() for p in model.parameters()]).norm().item() == pytest.approx(1e-3, rel=1e-3)
    opt.step()
    assert not opt.step_was_skipped


def test_checkpoints_carry_the_runtime_s_state(tmp_path):
    accelerator = PrecisionAccelerator(PrecisionRuntime("16-mixed", "cpu", scaler=DynamicScaler(128.0)), cpu=True)
    model = network()
    model, opt = accelerator.prepare(model, optimizer_of(model))
    accelerator.backward(model(batches()[0]).square().mean())
    opt.step()
    accelerator.save_state(tmp_path)
    expected = accelerator.runtime.state_dict()
    with torch.no_grad():
        model[0].weight.zero_()
    accelerator.runtime.scaler.load_state_dict(DynamicScaler(2.0).state_dict())
    accelerator.load_state(tmp_path)
    assert accelerator.runtime.state_dict() == expected
    assert model[0].weight.abs().sum() > 0


def test_ledger_and_audit_work_on_what_it_has_prepared():
    runtime = PrecisionRuntime("bf16-mixed", "cpu")
    accelerator = PrecisionAccelerator(runtime, cpu=True)
    model = network()
    model, _ = accelerator.prepare(model, optimizer_of(model))
    with runtime.ledger():
        accelerator.backward(model(batches()[0]).square().mean())
    assert runtime.verify(0.99) == 1.0
    assert audit(model, batches()[0], mode="bf16-mixed").ok


def test_ledger_and_audit_work_on_what_accelerate_has_prepared_by_itself():
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = network()
    prepared = accelerator.prepare(model)
    with Ledger(prepared) as ledger:
        prepared(batches()[0])
    assert ledger.low_precision == 1.0
    forward = prepared.forward
    expected = audit(network(), batches()[0], mode="bf16-mixed").excess
    for judged in (prepared, lambda x: prepared(x)):
        report = audit(judged, batches()[0], mode="bf16-mixed")
        assert (report.ok, report.excess) == (True, expected)
    assert prepared.forward is forward
    assert "forward" not in vars(plain(prepared))


def test_two_precisions_at_once_are_refused():
    with pytest.raises(ConfigurationError, match="accelerate is to run bf16"):
        PrecisionAccelerator(PrecisionRuntime("16-mixed", "cpu"), cpu=True, mixed_precision="bf16")


def test_autocast_is_the_mode_s():
    accelerator = PrecisionAccelerator(PrecisionRuntime("bf16-mixed", "cpu"), cpu=True)
    with accelerator.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.bfloat16
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32
    with pytest.raises(ConfigurationError, match="leave autocast_handler out"), accelerator.autocast(object()):
        pass


def test_a_mode_alone_is_a_runtime_on_its_device():
    accelerator = PrecisionAccelerator("16-mixed", cpu=True)
    assert (accelerator.runtime.mode.name, accelerator.runtime.device) == ("16-mixed", accelerator.device)
    with pytest.raises(UnknownNameError, match="Did you mean '16-mixed'"):
        PrecisionAccelerator("16-mixd", cpu=True)


def test_without_accelerate_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(module, "Accelerator", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'pytest-precision\[accelerate\]'"):
        PrecisionAccelerator(PrecisionRuntime("bf16-mixed", "cpu"))
