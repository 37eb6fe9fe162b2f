"""Islands and the ledger in every mode that rounds below float32."""

import pytest
import torch
from torch import nn

from precision_runtime.counting.ledger import FULL
from precision_runtime.errors import PrecisionError
from precision_runtime.modes import MODES, Mode
from precision_runtime.runtime import PrecisionRuntime
from precision_runtime.strategies import strategy_for

LOW = [m for m in MODES.values() if m.low]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.island, self.last = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 32)

    def forward(self, x):
        x = self.first(x)
        self.before = x.detach()
        x = self.island(x)
        self.after = x.detach()
        return self.last(x)


def run(mode: Mode, **options):
    torch.manual_seed(0)
    runtime = PrecisionRuntime(mode, "cpu", **options)
    model, x = runtime.setup(Net()), torch.randn(16, 64)
    with runtime.ledger() as ledger:
        runtime.backward(model(x).square().mean())
    return runtime, model, ledger


@pytest.mark.parametrize("mode", LOW, ids=str)
def test_an_island_computes_in_float32_in_every_mode(mode):
    _, model, ledger = run(mode, islands="island")
    torch.manual_seed(0)
    plain = Net().island
    assert type(model.island) is nn.Linear
    assert torch.equal(model.island.weight, plain.weight)
    assert torch.equal(model.after, plain(model.before.float()).to(model.after.dtype))
    kinds = {(e.where, e.dtype) for e in ledger.entries if e.module == "island" and e.kind == "product"}
    assert ("forward", "float32") in kinds
    assert {dtype for _, dtype in kinds} == {"float32"}
    assert ledger.verify(1.0) == 1.0
    assert model.after.dtype is (torch.float32 if mode.autocast else strategy_for(mode, torch.device("cpu")).dtype)


@pytest.mark.parametrize("mode", LOW, ids=str)
def test_a_batch_norm_may_be_an_island_in_float64_in_every_mode(mode):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 32))
    seen = []
    model = PrecisionRuntime(mode, "cpu", islands={"1": "64"}).setup(network)
    model[1].register_forward_hook(lambda module, args, result: seen.append(result.dtype))
    assert model(torch.randn(16, 64)).isfinite().all()
    tensors = {**dict(model[1].named_parameters()), **dict(model[1].named_buffers())}
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.float64}
    assert seen == [torch.float32 if mode.autocast else strategy_for(mode, torch.device("cpu")).dtype]
    assert model[1].running_var.sub(1.0).abs().max() > 0


@pytest.mark.parametrize("mode", LOW, ids=str)
def test_the_ledger_proves_that_every_mode_takes_effect(mode):
    runtime, _, ledger = run(mode)
    assert runtime.verify(1.0) == 1.0
    assert not FULL & ledger.by_dtype().keys()
    wanted = {
        "float8": (mode.products, "float8_e5m2", "Float8Linear", ""),
        "quantized": (mode.compute, mode.compute, None, mode.weights),  # weights are dequantised for each product
    }.get(mode.family, (mode.compute, mode.compute, "Linear", ""))
    products = [e for e in ledger.entries if e.kind == "product"]
    assert {e.dtype for e in products if e.where == "forward"} == {wanted[0]}
    assert {e.dtype for e in products if e.where == "backward"} == {wanted[1]}
    assert {e.weights for e in products} == {wanted[3]}
    assert wanted[2] in (None, *{e.type for e in products})
    forward = sum(e.work for e in products if e.where == "forward")
    assert forward == 2 * 16 * 64 * (64 + 64 + 32)


@pytest.mark.parametrize("mode", ["int8", "nf4"])
def test_what_a_quantised_layer_computes_in_is_told_from_what_it_stores(mode):
    runtime, model, ledger = run(MODES[mode], compute_dtype="float32")
    assert ledger.by_dtype().keys() == {"float32"}  # as asked for, and the ledger says so
    with pytest.raises(PrecisionError, match=r"only 0\.0%"):
        runtime.verify()
    assert f"weights in {mode}" in str(ledger)
    model.eval()
    with torch.no_grad(), runtime.ledger() as ledger:
        model(torch.randn(16, 64))
    wanted = {"int8": "int8", "nf4": "float32"}[mode]  # in eval() inputs are rounded to int8 as well
    assert ledger.by_dtype() == {wanted: 2 * 16 * 64 * (64 + 64 + 32)}
