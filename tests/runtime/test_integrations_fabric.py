"""Fabric with our plugin trains as the runtime trains; plan, ledger and audit work on what it has set up."""

import pytest
import torch
from torch import nn

pytest.importorskip("lightning", reason="Lightning is not installed")

from lightning.fabric import Fabric

from precision_runtime import PrecisionRuntime, audit
from precision_runtime.counting.ledger import Ledger
from precision_runtime.errors import ConfigurationError, UnknownNameError
from precision_runtime.integrations import fabric as module
from precision_runtime.integrations import plain
from precision_runtime.integrations.lightning import FabricPrecision
from precision_runtime.scaling import DynamicScaler

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
MODES = ["32-true", "64-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed", "apex-O2", "transformer-engine"]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))


def batches(count=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 16, generator=generator) for _ in range(count)]


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def fabric_with(plugin):
    return Fabric(accelerator="cpu", devices=1, plugins=plugin)


@pytest.mark.parametrize("mode", MODES)
def test_it_trains_bit_for_bit_as_the_runtime_does(mode):
    plugin = FabricPrecision(mode, "cpu")
    fabric = fabric_with(plugin)
    model = network()
    wrapped, opt = fabric.setup(model, optimizer_of(model))
    runtime = PrecisionRuntime(mode, "cpu")
    twin = network()
    twin, twin_opt = runtime.setup(twin, optimizer_of(twin))
    for x in batches():
        outputs = wrapped(x)
        expected = twin(x)
        assert outputs.dtype is expected.dtype is (torch.float64 if mode == "64-true" else torch.float32)
        opt.zero_grad()
        fabric.backward(outputs.square().mean())
        fabric.clip_gradients(wrapped, opt, clip_val=0.01)
        result = opt.step()
        twin_opt.zero_grad()
        runtime.backward(expected.square().mean())
        runtime.clip_gradients(twin_opt, clip_value=0.01)
        assert result == runtime.step(twin_opt) == plugin.result
    for name, value in twin.named_parameters():
        assert torch.equal(model.get_parameter(name), value), name
    assert any(
        not torch.equal(p, q.to(p.dtype)) for p, q in zip(model.parameters(), network().parameters(), strict=True)
    )


def test_init_module_gives_the_model_that_setup_gives():
    fabric = fabric_with(FabricPrecision("bf16-true", "cpu"))
    with fabric.init_module():
        made = network()
    other = fabric_with(FabricPrecision("bf16-true", "cpu")).setup(network())
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), other.parameters(), strict=True))
    assert next(made.parameters()).dtype is torch.bfloat16


def test_targets_keep_their_values_in_mixed_modes():
    class Keeps(nn.Module):
        def forward(self, x, target):
            return x, target

    fabric = fabric_with(FabricPrecision("16-mixed", "cpu"))
    _, target = fabric.setup(Keeps(), torch.optim.SGD(network().parameters(), lr=0.1))[0](
        torch.ones(1), torch.tensor([1e5, 1e-9])
    )
    assert target.tolist() == torch.tensor([1e5, 1e-9]).tolist()


def test_a_step_that_is_skipped_is_told_and_clipping_does_not_raise_on_it():
    plugin = FabricPrecision("16-mixed", "cpu", scaler=DynamicScaler(2.0**16))
    fabric = fabric_with(plugin)
    model = network()
    wrapped, opt = fabric.setup(model, optimizer_of(model))
    fabric.backward(wrapped(batches()[0]).square().mean())
    model[0].weight.grad[0, 0] = float("inf")
    before = model[0].weight.detach().clone()
    fabric.clip_gradients(wrapped, opt, max_norm=1.0)
    result = opt.step()
    assert (result.skipped, result.scale, result.culprits) == (True, 2.0**15, ("0.weight",))
    assert torch.equal(model[0].weight, before)


def test_clipping_by_norm_unscales_first():
    fabric = fabric_with(FabricPrecision("16-mixed", "cpu", scaler=DynamicScaler(1024.0)))
    model = network()
    wrapped, opt = fabric.setup(model, optimizer_of(model))
    fabric.backward(wrapped(batches()[0]).square().mean() * 100)
    norm = fabric.clip_gradients(wrapped, opt, max_norm=0.5)
    true = network().double()
    (true(batches()[0].double()).square().mean() * 100).backward()
    expected = torch.stack([p.grad.norm() for p in true.parameters()]).norm()
    assert norm.item() == pytest.approx(expected.item(), rel=4 * 2**-11)
    assert torch.stack([p.grad.norm() for p in model.parameters()]).norm().item() == pytest.approx(0.5, rel=1e-4)


def test_lbfgs_and_its_closure_work_under_a_scaler():
    fabric = fabric_with(FabricPrecision("16-mixed", "cpu", scaler=DynamicScaler(1024.0)))
    model = network()
    wrapped, opt = fabric.setup(model, torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4))
    x = batches()[0]

    def closure():
        opt.zero_grad()
        loss = wrapped(x).square().mean()
        fabric.backward(loss)
        return loss

    first = closure().item()
    for _ in range(3):
        opt.step(closure)
    assert closure().item() < first / 2


def test_the_state_goes_through_fabric_s_checkpoints(tmp_path):
    plugin = FabricPrecision("16-mixed", "cpu", scaler=DynamicScaler(512.0))
    fabric = fabric_with(plugin)
    model = network()
    wrapped, opt = fabric.setup(model, optimizer_of(model))
    fabric.backward(wrapped(batches()[0]).square().mean())
    opt.step()
    fabric.save(tmp_path / "saved.ckpt", {"model": wrapped, "optimizer": opt, "precision": plugin})
    other = FabricPrecision("16-mixed", "cpu")
    second = fabric_with(other)
    fresh = network()
    again, its = second.setup(fresh, optimizer_of(fresh))
    second.load(tmp_path / "saved.ckpt", {"model": again, "optimizer": its, "precision": other})
    assert other.state_dict() == plugin.state_dict()
    assert other.runtime.scaler.scale == 512.0
    assert torch.equal(fresh[0].weight, model[0].weight)
    with pytest.raises(ConfigurationError, match="saved in 16-mixed"):
        FabricPrecision("bf16-mixed", "cpu").load_state_dict(plugin.state_dict())


def test_plan_ledger_and_audit_work_on_what_the_plugin_has_set_up():
    plugin = FabricPrecision("bf16-mixed", "cpu")
    fabric = fabric_with(plugin)
    model = network()
    wrapped, _ = fabric.setup(model, optimizer_of(model))
    with plugin.runtime.ledger() as ledger:
        fabric.backward(wrapped(batches()[0]).square().mean())
    assert plugin.runtime.verify(0.99) == ledger.low_precision == 1.0
    assert {part.module for part in ledger.parts()} == {"0", "2"}
    assert plugin.runtime.plan(wrapped)["0.weight"].cast == "bfloat16"
    assert audit(wrapped, batches()[0], mode="bf16-mixed").ok


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
def test_ledger_and_audit_work_on_what_fabric_has_set_up_by_itself(precision):
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    model = network()
    wrapped, _ = fabric.setup(model, optimizer_of(model))
    with Ledger(wrapped) as ledger:
        wrapped(batches()[0])
    assert ledger.low_precision == (0.0 if precision == "32-true" else 1.0)
    assert {part.module for part in ledger.parts()} == {"0", "2"}
    assert plain(wrapped) is model
    twin = network().to(next(model.parameters()).dtype)
    expected = audit(twin, batches()[0], mode="bf16-mixed")
    assert expected.ok
    for judged in (wrapped, lambda x: wrapped(x)):  # the wrapper has no say, wherever it is called from
        report = audit(judged, batches()[0], mode="bf16-mixed")
        assert (report.ok, report.excess) == (True, expected.excess)
    assert "forward" not in vars(wrapped)
    assert audit(wrapped, batches()[0], mode="bf16-mixed").subject == "Sequential"


def test_a_defect_inside_fabric_s_wrapper_is_named_by_the_path_in_the_user_s_model():
    class Loose(nn.Module):
        def forward(self, x):
            return x - x.square().mean(-1, keepdim=True) + x.mean(-1, keepdim=True).square()

    model = nn.Sequential(network()[0], Loose())
    nn.init.constant_(model[0].bias, 30.0)
    wrapped = Fabric(accelerator="cpu", devices=1, precision="bf16-true").setup(model)
    (finding, *_) = audit(wrapped, batches()[0], mode="bf16-true").findings
    assert finding.module == "1"
    assert wrapped(batches()[0]).dtype is torch.float32  # and Fabric casts again


def test_quantised_weights_leave_the_optimizer_to_the_rest():
    pytest.importorskip("bitsandbytes")
    plugin = FabricPrecision("nf4", "cpu", ignore_modules="2")
    fabric = fabric_with(plugin)
    model = network()
    wrapped, opt = fabric.setup(model, optimizer_of(model))
    before = model[2].weight.detach().clone()
    fabric.backward(wrapped(batches()[0]).square().mean())
    opt.step()
    assert not torch.equal(model[2].weight, before)
    assert model[0].weight.dtype is torch.uint8


def test_a_mode_that_does_not_exist_is_refused_at_once():
    with pytest.raises(UnknownNameError, match="Did you mean 'bf16-mixed'"):
        FabricPrecision("bf16-mixd")


def test_without_lightning_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(module, "Precision", None)
    with pytest.raises(Exception, match=r"pip install 'pytest-precision\[lightning\]'") as raised:
        FabricPrecision("bf16-mixed")
    assert type(raised.value).__name__ == "UnsupportedError"
