"""Everything is put back after an audit, also when user code raises in the mode or in the reference."""

from __future__ import annotations

import math
import random
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from precision_runtime import PrecisionRuntime, audit
from precision_runtime.auditing import Originals, References
from precision_runtime.auditing.executing.noise import Noise
from precision_runtime.auditing.executing.worlds import Worlds
from precision_runtime.errors import AuditError

MODES = ("16-true", "bf16-mixed", "64-true")


class Stateful(nn.Module):
    """Has everything that a run can disturb, and disturbs it."""

    def __init__(self, fails_in: str = "never") -> None:
        super().__init__()
        self.fails_in = fails_in
        self.inner, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.inner.weight
        self.register_buffer("count", torch.zeros(1))
        self.count: torch.Tensor
        self.table = torch.ones(4)
        self.past: list[Any] = [torch.zeros(2), "text"]
        self.memory: dict[str, Any] = {"x": torch.zeros(2)}
        self.seen, self.queue, self.steps = {1}, deque([1, 2], maxlen=3), 0
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.table.mul_(1.5)
        self.past.append(x)
        self.memory["y"] = x
        self.seen.add(2)
        self.queue.append(3)
        self.steps += 1
        self.extra = x
        self.norm.eval()
        np.random.rand(), random.random(), torch.rand(1)
        y = self.tied(self.norm(self.inner(x))) * self.frozen
        double = torch.float64 in (x.dtype, y.dtype)
        if self.fails_in == ("reference" if double else "mode"):
            raise ValueError("boom")
        if self.fails_in == "everywhere":
            raise KeyError("boom")
        return y


def picture(net: nn.Module) -> dict[str, Any]:
    """Identities, values, dtypes and flags of everything that must come back."""
    return {
        "parameters": [
            (n, id(p), p.dtype, p.data_ptr(), p.detach().clone(), p.requires_grad) for n, p in net.named_parameters()
        ],
        "grads": [(id(p.grad), None if p.grad is None else p.grad.clone()) for p in net.parameters()],
        "buffers": [(n, id(b), b.dtype, b.clone()) for n, b in net.named_buffers()],
        "training": [m.training for m in net.modules()],
        "hooks": [[list(getattr(m, h)) for h in vars(m) if h.endswith("_hooks")] for m in net.modules()],
        "attributes": [sorted(vars(m)) for m in net.modules()],
        "forward": ["forward" in vars(m) for m in net.modules()],
        "own": [
            (type(v).__name__, id(v), repr(v)) for m in net.modules() for k, v in sorted(vars(m).items()) if k[0] != "_"
        ],
        "default": torch.get_default_dtype(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_grad_enabled()),
        "rng": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()),
    }


def assert_same(now: Any, before: Any, path: str = "") -> None:
    if isinstance(before, (torch.Tensor, np.ndarray)):
        assert bool((now == before).all()), path
    elif isinstance(before, (list, tuple, dict)):
        assert len(now) == len(before), path
        for key in before if isinstance(before, dict) else range(len(before)):
            assert_same(now[key], before[key], f"{path}[{key!r}]")
    else:
        assert now == before, path


def with_gradients(net: nn.Module) -> nn.Module:
    for p in net.parameters():
        if p.requires_grad:
            p.grad = torch.full_like(p, 0.5)
    return net


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gradients", [True, False])
def test_everything_is_put_back(mode: str, gradients: bool) -> None:
    torch.manual_seed(0)
    net = with_gradients(Stateful())
    net.register_forward_hook(lambda *_: None)
    x = torch.randn(6, 4)
    before, inputs = picture(net), x.clone()
    audit(net, x, mode=mode, gradients=gradients)
    assert_same(picture(net), before)
    assert torch.equal(x, inputs)
    assert x.grad is None
    assert net.tied.weight is net.inner.weight


def test_the_picture_itself_would_show_a_difference() -> None:
    net = Stateful()
    before = picture(net)
    net(torch.randn(6, 4))
    with pytest.raises(AssertionError):
        assert_same(picture(net), before)


@pytest.mark.parametrize(("fails_in", "error"), [("mode", None), ("reference", AuditError), ("everywhere", KeyError)])
def test_everything_is_put_back_when_user_code_raises(fails_in: str, error: type[Exception] | None) -> None:
    torch.manual_seed(0)
    net = with_gradients(Stateful(fails_in))
    x = torch.randn(6, 4)
    before = picture(net)
    if error is None:
        # It fails in plain float32, too: the code's own error.
        with pytest.raises(ValueError, match="boom"):
            audit(net, x, mode="16-true")
    else:
        with pytest.raises(error, match="boom"):
            audit(net, x, mode="16-true")
    assert_same(picture(net), before)


def test_a_set_up_module_stays_set_up() -> None:
    torch.manual_seed(0)
    net, x = (
        PrecisionRuntime("bf16-true", "cpu").setup(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))),
        torch.randn(2, 4),
    )
    before = picture(net)
    assert audit(net, x, mode="bf16-true").ok
    assert_same(picture(net), before)
    assert net[0].weight.dtype == torch.bfloat16
    assert net(torch.randn(2, 4)).dtype == torch.float32


def test_an_optimizer_keeps_training_the_same_parameters() -> None:
    net = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    before = net.weight.detach().clone()
    audit(net, torch.randn(2, 4), mode="16-true")
    net(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert torch.allclose(net.weight, before - 1.0)


def test_an_audit_inside_autocast_and_no_grad_leaves_both_on() -> None:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert audit(nn.Linear(4, 4), torch.randn(2, 4), mode="16-true").ok
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert not torch.is_grad_enabled()


# -- the same again ----------------------------------------------------------------------------------------------------


class BadNorm(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        variance = x.square().mean(-1, keepdim=True) - x.mean(-1, keepdim=True).square()
        return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(variance + 1e-3)


def net() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.1), BadNorm(), nn.Linear(16, 4))
    nn.init.constant_(made[0].bias, 10.0)
    return made


def test_the_same_seed_gives_the_same_report() -> None:
    torch.manual_seed(1)
    x, module = torch.randn(8, 16), net()
    first = audit(module, x, mode="bf16-true", seed=3).to_dict()
    torch.rand(5), random.random()
    assert audit(module, x, mode="bf16-true", seed=3).to_dict() == first
    assert audit(module, x, mode="bf16-true", seed=4).to_dict() != first


@pytest.mark.parametrize("gradients", [True, False])
def test_shared_references_change_no_report(gradients: bool) -> None:
    torch.manual_seed(1)
    x, module, shared = torch.randn(8, 16), net(), References()
    for mode in ("16-true", "bf16-true", "16-mixed", "bf16-mixed", "32-true"):
        alone = audit(module, x, mode=mode, gradients=gradients).to_dict()
        assert audit(module, x, mode=mode, gradients=gradients, references=shared).to_dict() == alone


class Padded(nn.Module):
    """A softmax by hand whose last row is masked entirely, by a number that only float16 takes for infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.query(x) @ self.key(x).mT
        hidden = torch.zeros_like(scores)
        hidden[-1] = self.number
        return torch.softmax(scores + hidden, -1) @ x

    number = -50000.0


@pytest.mark.parametrize("number", [-50000.0, -1e10, -3e38, -math.inf])
def test_shared_references_change_no_report_where_a_mask_means_more_in_one_format_than_in_another(
    number: float,
) -> None:
    torch.manual_seed(1)
    x, module, shared = torch.randn(8, 16), Padded(), References()
    module.number = number
    for mode in ("16-mixed", "bf16-mixed", "16-true", "32-true", "bf16-true"):
        alone = repr(audit(module, x, mode=mode).to_dict())  # NaN equals no other NaN
        assert repr(audit(module, x, mode=mode, references=shared).to_dict()) == alone, mode


@pytest.mark.parametrize("change", ["nothing", "weights", "buffers", "inputs", "seed", "gradients", "name"])
def test_a_reference_serves_again_only_for_what_it_was_made_from(change: str) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    doubles: list[int] = []
    module[0].register_forward_hook(lambda m, a, o: doubles.append(1) if o.dtype == torch.float64 else None)
    x, shared = torch.randn(6, 4), References()
    options: dict[str, Any] = {"mode": "bf16-mixed"}
    audit(module, x, references=shared, **options)
    if change == "weights":
        module[0].weight.data[0, 0] += 1
    elif change == "buffers":
        module[1].running_mean[0] += 1
    elif change == "inputs":
        x[0, 0] += 1
    elif change != "nothing":
        options[change] = {"seed": 1, "name": "other", "gradients": False}[change]
    doubles.clear()
    audit(module, x, **options)
    alone = len(doubles)
    doubles.clear()
    audit(module, x, references=shared, **options)
    # The whole runs are saved; replays of single calls depend on the mode's own inputs and are made again.
    assert (len(doubles) < alone) is (change == "nothing")


def test_the_oldest_reference_goes() -> None:
    module, shared = nn.Linear(4, 4), References(keep=1)
    runs: list[int] = []
    module.register_forward_hook(lambda m, a, o: runs.append(1) if o.dtype == torch.float64 else None)
    a, b = torch.randn(2, 4), torch.randn(2, 4)
    counts = []
    for x in (a, a, b, a):
        runs.clear()
        audit(module, x, mode="bf16-true", references=shared)
        counts.append(len(runs))
    assert counts[1] < counts[0]
    assert counts[2] > counts[1]
    assert counts[3] == counts[0]


# -- parameters disturbed where they are -------------------------------------------------------------------------------


def disturbed_twice(worlds: Worlds, seed: int = 3) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """True parameters as a perturbed run sees them, and as the noise makes them on copies."""
    used = set(worlds.true_parameters)
    expected = list(Noise(2.0**-9, seed, 0).parameters(worlds.true_parameters, used, {}).values())
    with worlds.disturbed(Noise(2.0**-9, seed, 0), used, {}) as given:
        return [t.clone() for t in given.values()], expected


def test_disturbed_parameters_need_no_copy_and_come_back_bit_for_bit() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    worlds = Worlds({"": model}, Originals())
    before = {k: t.clone() for k, t in worlds.true_parameters.items()}
    seen, expected = disturbed_twice(worlds)
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(seen, before.values(), strict=True))
    with worlds.disturbed(Noise(0.1, 0, 0), set(before), {}) as given:
        assert all(given[k] is worlds.true_parameters[k] for k in before)
    with pytest.raises(ZeroDivisionError), worlds.disturbed(Noise(0.1, 0, 0), set(before), {}):
        _ = 1 / 0
    assert all(torch.equal(worlds.true_parameters[k], t) for k, t in before.items())
    worlds.restore()


def test_parameters_that_cannot_be_made_anew_are_disturbed_in_copies() -> None:
    wide, plain = nn.Linear(8, 8).double(), nn.Linear(8, 8)
    own = wide.weight.detach().clone()
    worlds = Worlds({"": nn.Sequential(wide, plain)}, Originals())
    with torch.no_grad():
        plain.weight.add_(1.0)  # as code that writes to its parameter
    before = {k: t.clone() for k, t in worlds.true_parameters.items()}
    seen, expected = disturbed_twice(worlds)
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    assert all(torch.equal(worlds.true_parameters[k], t) for k, t in before.items())
    assert torch.equal(wide.weight.detach(), own)
    worlds.restore()
