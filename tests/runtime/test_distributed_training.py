"""DDP and FSDP2 on two processes train as one process does, in mixed and true modes, and decide together.

Both processes take half of each batch. Two processes and one differ by the order in which gradients are added up, so
what they may differ by is what rounding at the mode's precision costs: both are judged against the same training in
FP64 on one process, by the audit's yardstick.
"""

import os
import tempfile
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn

from precision_runtime import PrecisionRuntime
from precision_runtime.scaling import DynamicScaler

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (distributed.is_available() and distributed.is_gloo_available()), reason="torch without gloo"
    ),
]
MODES = ("16-mixed", "bf16-mixed", "16-true", "bf16-true")
WRAPS = ("ddp", "fsdp2")
STEPS, ROWS, OVERFLOW_AT = 5, 16, 2
BUDGET = 2.0  # bits, the audit's default
INF = float("inf")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 8))


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(ROWS, 16, generator=generator) for _ in range(STEPS)]


def runtime_of(mode):
    scaler = DynamicScaler(1024.0) if mode == "16-mixed" else None
    return PrecisionRuntime(mode, "cpu", scaler=scaler)


def trained(runtime, model, opt, mine, overflow=lambda number: None):
    decisions = []
    for number, x in enumerate(batches()):
        opt.zero_grad()
        runtime.backward(model(x[mine]).float().square().mean())
        overflow(number)
        runtime.clip_gradients(opt, max_norm=0.1)
        result = runtime.step(opt)
        decisions.append((result.skipped, result.scale))
    return decisions


def wrapped(wrap, runtime):
    """The model in its wrapper, its optimizer, and the module whose parameters are the model's."""
    model = network()
    if wrap == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model = runtime.setup(model)
        mesh = init_device_mesh("cpu", (2,))
        for layer in (model[0], model[3]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model, opt = runtime.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        return model, opt, model
    model, opt = runtime.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return nn.parallel.DistributedDataParallel(model), opt, model


def worker(rank, folder, results):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    mine = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    found = {}
    try:
        for wrap in WRAPS:
            for mode in MODES:
                runtime = runtime_of(mode)
                model, opt, inner = wrapped(wrap, runtime)

                weight, scaled = inner[0].weight, mode == "16-mixed" and rank == 1
                if wrap == "ddp" and scaled:  # before the processes' gradients are averaged
                    calls = iter(range(STEPS))
                    weight.register_hook(lambda g, calls=calls: g * INF if next(calls) == OVERFLOW_AT else g)

                def overflow(number, weight=weight, wrap=wrap, scaled=scaled):
                    if wrap == "fsdp2" and scaled and number == OVERFLOW_AT:  # in the shard of one process
                        weight.grad.to_local().fill_(INF)

                decisions = trained(runtime, model, opt, mine, overflow)
                values = {
                    name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().double().tolist()
                    for name, p in inner.named_parameters()
                }
                found[wrap, mode] = decisions, values
        results[rank] = found
    finally:
        distributed.destroy_process_group()


def alone(mode):
    """One process, whole batches."""
    runtime = runtime_of(mode)
    model = network()
    model, opt = runtime.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))

    def overflow(number):
        if mode == "16-mixed" and number == OVERFLOW_AT:
            model[0].weight.grad.fill_(INF)

    decisions = trained(runtime, model, opt, slice(None), overflow)
    return decisions, {name: p.detach().double() for name, p in model.named_parameters()}


def true(skip):
    """By hand, in FP64, without the steps that a scaler skips."""
    model = network().double()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for number, x in enumerate(batches()):
        opt.zero_grad()
        model(x.double()).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        if number not in skip:
            opt.step()
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def two():
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        with tempfile.TemporaryDirectory() as folder, multiprocessing.Manager() as manager:
            results = manager.dict()
            multiprocessing.spawn(worker, (str(Path(folder)), results), nprocs=2)
            yield results[0], results[1]
    finally:
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = threads


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrap", WRAPS)
def test_both_processes_hold_the_same_weights_and_decide_alike(two, wrap, mode):
    first, second = two
    assert first[wrap, mode] == second[wrap, mode]
    assert first[wrap, mode][0] == alone(mode)[0]
    skipped = [number for number, (skip, _) in enumerate(first[wrap, mode][0]) if skip]
    assert skipped == ([OVERFLOW_AT] if mode == "16-mixed" else [])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrap", WRAPS)
def test_two_processes_lose_no_more_than_one(two, wrap, mode):
    decisions, together = two[0][wrap, mode]
    _, single = alone(mode)
    reference = true([number for number, (skip, _) in enumerate(decisions) if skip])
    start = network()
    for name, exact in reference.items():
        distance = (torch.tensor(together[name], dtype=torch.float64) - exact).norm()
        # What one process loses is the yardstick; at least one rounding of each weight in the format it is kept in.
        unit = 2.0**-8 if mode == "bf16-true" else 2.0**-11 if mode == "16-true" else 2.0**-24
        allowed = torch.maximum((single[name] - exact).norm(), unit * exact.norm())
        assert distance <= 2.0**BUDGET * allowed, (name, distance / allowed)
        moved = (exact - start.get_parameter(name)).norm()
        assert moved > 0
