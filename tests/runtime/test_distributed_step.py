"""Two processes on gloo: decisions are made together."""

import tempfile
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn

from precision_runtime.errors import ConfigurationError
from precision_runtime.runtime import PrecisionRuntime
from precision_runtime.scaling import DynamicScaler, agreement

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="torch without gloo"
)
INF = float("inf")


@pytest.fixture
def alone(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_without_other_processes_nobody_is_asked():
    p = nn.Parameter(torch.ones(1))
    opt = torch.optim.SGD([p], lr=1.0)
    assert agreement.anyone(True, opt, None, torch.device("cpu"))
    assert not agreement.anyone(False, opt, None, torch.device("cpu"))


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_whole_parameters_are_judged_here_and_sharded_ones_together(alone, monkeypatch, sharded, elsewhere):
    def reduce(flag, op, group):
        assert op is distributed.ReduceOp.MAX
        flag.fill_(max(flag.item(), float(elsewhere)))

    monkeypatch.setattr(distributed, "all_reduce", reduce)
    p = nn.Parameter(torch.ones(1))
    p._fsdp_flattened = sharded  # the mark that FSDP1 leaves
    opt = torch.optim.SGD([p], lr=1.0)
    rt = PrecisionRuntime("16-mixed", "cpu", scaler=DynamicScaler(8.0))
    rt.backward(p.sum())
    result = rt.step(opt)
    assert result.skipped is (sharded and elsewhere)
    assert result.culprits == (("a parameter of another process",) if result.skipped else ())
    assert result.scale == (4.0 if result.skipped else 8.0)


def test_a_norm_of_one_part_is_refused_and_a_limit_by_value_is_not():
    p = nn.Parameter(torch.ones(1))
    p._fsdp_flattened = True
    opt = torch.optim.SGD([p], lr=1.0)
    rt = PrecisionRuntime("bf16-mixed", "cpu")
    rt.backward(p.sum())
    with pytest.raises(ConfigurationError, match="sharded by FSDP1"):
        rt.clip_gradients(opt, max_norm=1.0)
    rt.clip_gradients(opt, clip_value=0.5)
    assert p.grad.item() == 0.5


def worker(rank, folder, results):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        results[rank] = {name: check(rank) for name, check in CHECKS.items()}
    finally:
        distributed.destroy_process_group()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 4, generator=generator) for _ in range(4)]


def trained(rt, model, opt, overflow_at):
    decisions = []
    for number, x in enumerate(batches()):
        opt.zero_grad()
        loss = model(x).float().square().mean()
        rt.backward(loss)
        overflow_at(number, model)
        rt.clip_gradients(opt, max_norm=0.05)  # below any norm met here
        result = rt.step(opt)
        decisions.append((result.skipped, result.scale))
    return decisions


def one_shard_overflows(rank):
    """FSDP2: an inf in one process's part of a gradient skips the step in both."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rt = PrecisionRuntime("16-mixed", "cpu", scaler=DynamicScaler(1024.0))
    model = fully_shard(network(), mesh=init_device_mesh("cpu", (2,)))
    model, opt = rt.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))

    def overflow(number, model):
        if number == 1 and rank == 1:
            model[0].weight.grad.to_local().fill_(INF)

    decisions = trained(rt, model, opt, overflow)
    return decisions, {n: p.full_tensor().detach().tolist() for n, p in model.named_parameters()}


def sharded_scaler(rank):
    """torch's ShardedGradScaler brings its group: processes agree although nothing else tells that they must."""
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    rt = PrecisionRuntime("16-mixed", "cpu", scaler=ShardedGradScaler(device="cpu", init_scale=1024.0))
    model = network()
    model, opt = rt.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))

    def overflow(number, model):
        if number == 1 and rank == 1:
            model[0].weight.grad.fill_(INF)

    return trained(rt, model, opt, overflow), {n: p.detach().tolist() for n, p in model.named_parameters()}


def stochastic(rank):
    """Processes that hold the same weights round them in the same way."""
    rt = PrecisionRuntime("bf16-true", "cpu", updates="stochastic")
    model = network()
    model, opt = rt.setup(model, torch.optim.SGD(model.parameters(), lr=1e-3))
    return trained(rt, model, opt, lambda *_: None), {n: p.detach().tolist() for n, p in model.named_parameters()}


CHECKS = {"fsdp2": one_shard_overflows, "sharded": sharded_scaler, "stochastic": stochastic}


@pytest.mark.slow
def test_two_processes_decide_as_one():
    with tempfile.TemporaryDirectory() as folder, multiprocessing.Manager() as manager:
        results = manager.dict()
        multiprocessing.spawn(worker, (str(Path(folder)), results), nprocs=2)
        first, second = results[0], results[1]
    assert first == second
    rt = PrecisionRuntime("16-mixed", "cpu", scaler=DynamicScaler(1024.0))
    model = network()
    model, opt = rt.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))

    def overflow(number, model):
        if number == 1:
            model[0].weight.grad.fill_(INF)

    expected = trained(rt, model, opt, overflow)
    assert expected == [(False, 1024.0), (True, 512.0), (False, 512.0), (False, 512.0)]
    for name in ("fsdp2", "sharded"):
        decisions, weights = first[name]
        assert decisions == expected
        for path, parameter in model.named_parameters():
            assert torch.allclose(torch.tensor(weights[path]), parameter, rtol=0, atol=1e-5)
