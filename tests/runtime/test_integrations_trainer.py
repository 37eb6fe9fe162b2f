"""The Trainer with our plugin trains as the runtime trains."""

import pytest
import torch
from torch import nn

pytest.importorskip("lightning", reason="Lightning is not installed")

from lightning.pytorch import LightningModule, Trainer

from precision_runtime import PrecisionRuntime
from precision_runtime.integrations import trainer as module
from precision_runtime.integrations.lightning import TrainerPrecision
from precision_runtime.scaling import DynamicScaler

# Of the Trainer, about itself and this machine.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
MODES = ["32-true", "64-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed", "apex-O2"]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 8, generator=generator) for _ in range(3)]


class Lit(LightningModule):
    def __init__(self, optimizer="SGD", overflow_at=None):
        super().__init__()
        self.net, self.kind, self.overflow_at, self.seen = network(), optimizer, overflow_at, []

    def training_step(self, batch, number):
        output = self.net(batch)
        self.seen.append((batch.dtype, output.dtype))
        return output.float().square().mean()

    def on_after_backward(self):
        if self.global_step == self.overflow_at:
            next(self.parameters()).grad.fill_(float("inf"))

    def configure_optimizers(self):
        return getattr(torch.optim, self.kind)(self.parameters(), lr=0.1)


def fit(plugin, model, folder, **options):
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, default_root_dir=folder, plugins=plugin, **options,
    )  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader(torch.cat(batches()), batch_size=8))
    return trainer


@pytest.mark.parametrize("mode", MODES)
def test_it_trains_bit_for_bit_as_the_runtime_does(mode, tmp_path):
    plugin, lit = TrainerPrecision(mode, "cpu"), Lit()
    fit(plugin, lit, tmp_path, gradient_clip_val=0.05)
    runtime = PrecisionRuntime(mode, "cpu")
    model = network()
    model, opt = runtime.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for x in batches():
        opt.zero_grad()
        with runtime.autocast():
            loss = model(x).float().square().mean()
        runtime.backward(loss)
        runtime.clip_gradients(opt, max_norm=0.05)
        result = runtime.step(opt)
    assert plugin.result == result
    for name, value in model.named_parameters():
        assert torch.equal(lit.net.get_parameter(name), value), name
    kept = {"64-true": torch.float64, "16-true": torch.float16, "bf16-true": torch.bfloat16, "apex-O2": torch.float16}
    assert {batch for batch, _ in lit.seen} == {kept.get(mode, torch.float32)}


def test_a_step_that_overflows_is_skipped_and_told(tmp_path):
    plugin, lit = TrainerPrecision("16-mixed", "cpu", scaler=DynamicScaler(1024.0)), Lit(overflow_at=0)
    before = lit.net[0].weight.detach().clone()
    fit(plugin, lit, tmp_path, gradient_clip_val=0.05, max_steps=1)
    assert plugin.result.skipped
    assert plugin.result.scale == 512.0
    assert plugin.result.culprits == ("net.0.weight",)
    assert torch.equal(lit.net[0].weight, before)


def test_lbfgs_works_under_a_scaler(tmp_path):
    plugin, lit = TrainerPrecision("16-mixed", "cpu", scaler=DynamicScaler(1024.0)), Lit("LBFGS")
    first = network()(batches()[0]).square().mean().item()
    fit(plugin, lit, tmp_path)
    assert not plugin.result.skipped
    assert lit.net(batches()[0]).square().mean().item() < first / 4


def test_checkpoints_carry_the_scaler(tmp_path):
    plugin = TrainerPrecision("16-mixed", "cpu", scaler=DynamicScaler(256.0, growth_interval=2))
    trainer = fit(plugin, Lit(), tmp_path)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    other = TrainerPrecision("16-mixed", "cpu")
    second = Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_progress_bar=False, plugins=other,
        enable_checkpointing=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    second.fit(
        Lit(), torch.utils.data.DataLoader(torch.cat(batches()), batch_size=8), ckpt_path=tmp_path / "saved.ckpt"
    )
    assert other.runtime.scaler.scale == plugin.runtime.scaler.scale == 512.0


def test_the_module_s_own_backward_is_called_with_the_scaled_loss(tmp_path):
    class Own(Lit):
        def backward(self, loss):
            self.losses = [*getattr(self, "losses", []), loss.item()]
            loss.backward()

        def training_step(self, batch, number):
            return 0 * super().training_step(batch, number) + 1.0

    lit = Own()
    fit(TrainerPrecision("16-mixed", "cpu", scaler=DynamicScaler(64.0)), lit, tmp_path)
    assert lit.losses == [64.0] * 3


def test_without_lightning_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(module, "Precision", None)
    with pytest.raises(Exception, match=r"pip install 'pytest-precision\[lightning\]'") as raised:
        TrainerPrecision("bf16-mixed")
    assert type(raised.value).__name__ == "UnsupportedError"
