"""On a real XLA device: ``tox -e xla`` (torch_xla on this machine's processor). Skipped where torch_xla is missing."""

import importlib.util

import pytest
import torch
from torch import nn

from precision_runtime import MODES as MODE_TABLE
from precision_runtime import PrecisionRuntime, support
from precision_runtime.errors import UnsupportedError
from precision_runtime.scaling import DynamicScaler

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torch_xla") is None, reason="torch_xla is not installed")

MODES = ["32-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed", "apex-O0", "apex-O1", "apex-O2", "apex-O3"]


def trained(mode, accelerator, steps=4):
    torch.manual_seed(0)
    scaled = (
        accelerator == "cpu" and MODE_TABLE[mode].scaled
    )  # a first scale that overflows nothing: no step is skipped
    rt = PrecisionRuntime(mode, accelerator, scaler=DynamicScaler(init_scale=256.0) if scaled else None)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    model, opt = rt.setup(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    x, losses = torch.randn(16, 4).to(rt.device), []
    for _ in range(steps):
        opt.zero_grad()
        loss = (model(x) - 1).square().mean()
        rt.backward(loss)
        rt.clip_gradients(opt, max_norm=1.0)
        rt.step(opt)
        losses.append(loss.item())
    return rt, model, losses


def test_the_device_is_real():
    assert support("32-true", "xla").status == "native"
    assert torch.ones(2, device=PrecisionRuntime("32-true", "xla").device).device.type == "xla"


@pytest.mark.parametrize("mode", MODES)
def test_a_model_trains_there_as_on_the_processor(mode):
    rt, model, losses = trained(mode, "xla")
    assert all(p.device.type == "xla" for p in model.parameters())
    assert losses[-1] < losses[0] * 0.9
    rule = {"16-true": "bf16-true", "16-mixed": "bf16-mixed"}  # bfloat16 stands for float16
    assert losses == pytest.approx(trained(rule.get(mode, mode), "cpu")[2], rel=0.02)
    assert rt.support.runs == (
        "bfloat16" if "float16" in mode or mode in {*rule, "apex-O1", "apex-O2", "apex-O3"} else ""
    )


@pytest.mark.parametrize("mode", ["16-mixed", "bf16-mixed", "apex-O1"])
def test_products_under_autocast_are_bfloat16(mode):
    rt, seen = PrecisionRuntime(mode, "xla"), []
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    out = rt.setup(model)(torch.ones(2, 4).to(rt.device))
    assert (seen, out.dtype) == ([torch.bfloat16], torch.float32)
    assert not rt.scaler.enabled


def test_tied_weights_stay_tied_and_trained():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    rt, model = PrecisionRuntime("bf16-mixed", "xla"), Tied()
    model, opt = rt.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert model.a.weight is model.b.weight
    before = model.a.weight.detach().cpu().clone()
    rt.backward(model(torch.ones(2, 4).to(rt.device)).sum())
    rt.step(opt)
    assert model.a.weight is model.b.weight
    assert not torch.equal(model.a.weight.detach().cpu(), before)


def test_modules_are_made_there():
    rt = PrecisionRuntime("16-true", "xla")
    with rt.init_module():
        model = nn.Linear(4, 4)
    assert (model.weight.device.type, model.weight.dtype) == ("xla", torch.bfloat16)
    assert rt.setup(model)(torch.ones(2, 4).to(rt.device)).dtype is torch.float32


@pytest.mark.parametrize(("mode", "reason"), [("64-true", "TPUs have no float64"), ("tf32", "by itself")])
def test_what_is_refused_says_why(mode, reason):
    with pytest.raises(UnsupportedError, match=reason):
        PrecisionRuntime(mode, "xla")


def test_each_step_is_carried_out_and_not_only_noted_down():
    from torch_xla.debug import metrics

    rt, model = PrecisionRuntime("bf16-true", "xla"), nn.Linear(4, 1)
    model, opt = rt.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    x, before = torch.ones(2, 4).to(rt.device), metrics.counter_value("MarkStep") or 0
    for _ in range(3):
        opt.zero_grad()
        rt.backward(model(x).sum())
        rt.step(opt)
    assert metrics.counter_value("MarkStep") == before + 3


def test_auto_takes_bfloat16():
    rt = PrecisionRuntime("auto", "xla")
    assert rt.mode.name == "bf16-mixed"
    assert trained("auto", "xla")[2] == trained("bf16-mixed", "xla")[2]
