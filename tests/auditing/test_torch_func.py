"""Modules that differentiate or vectorise by ``torch.func``, by forward mode, or by a graph of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, stack_module_state, vjp, vmap

from precision_runtime import PrecisionRuntime, audit, audit_training

Apply = Callable[["Network", torch.Tensor], torch.Tensor]


class Network(nn.Module):
    """A small network, and code that does something with it."""

    def __init__(self, apply: Apply, outputs: int = 16) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.LayerNorm(64), nn.Linear(64, outputs))
        self.apply_ = apply

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (n, 16) to whatever the code gives."""
        return self.apply_(self, x)

    def number(self, row: torch.Tensor) -> torch.Tensor:
        """One number of one row, shape (16,) to ()."""
        total: torch.Tensor = self.net(row).square().sum()
        return total


def per_sample(model: Network, x: torch.Tensor) -> torch.Tensor:
    """The gradient of each row's loss with respect to a weight, shape (n, 64, 16)."""

    def loss(weights: dict[str, torch.Tensor], row: torch.Tensor) -> torch.Tensor:
        number: torch.Tensor = functional_call(model.net, weights, (row[None],)).square().sum()
        return number

    found: torch.Tensor = vmap(grad(loss), in_dims=(None, 0))(dict(model.net.named_parameters()), x)["0.weight"]
    return found


def ensemble(model: Network, x: torch.Tensor) -> torch.Tensor:
    """Three networks at once, shape (3, n, outputs)."""
    weights, buffers = stack_module_state([model.net, model.net, model.net])
    found: torch.Tensor = vmap(lambda w, b: functional_call(model.net, (w, b), (x,)))(weights, buffers)
    return found


def tangent(model: Network, x: torch.Tensor) -> torch.Tensor:
    """The derivative in the direction of ones, by forward mode, shape (n, outputs)."""
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(model.net(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    assert found is not None
    return found


def linear(model: Network, x: torch.Tensor) -> torch.Tensor:
    """The same by a graph that is written down first."""
    _, derivative = linearize(model.net, x)
    found: torch.Tensor = derivative(torch.ones_like(x))
    return found


def pulled(model: Network, x: torch.Tensor) -> torch.Tensor:
    """Ones pulled back to the input, shape (n, 16)."""
    y, pull = vjp(model.net, x)
    found: torch.Tensor = pull(torch.ones_like(y))[0]
    return found


SOUND: dict[str, Apply] = {
    "vmap": lambda m, x: vmap(m.net)(x),
    "forces": lambda m, x: vmap(grad(m.number))(x),
    "jacrev": lambda m, x: vmap(jacrev(m.net))(x),
    "jacfwd": lambda m, x: vmap(jacfwd(m.net))(x),
    "hessian": lambda m, x: vmap(hessian(m.number))(x),
    "jvp": lambda m, x: jvp(m.net, (x,), (torch.ones_like(x),))[1],
    "vjp": pulled,
    "per_sample": per_sample,
    "ensemble": ensemble,
    "forward_ad": tangent,
    "linearize": linear,
}


NOT_UNDER_AUTOCAST = ("per_sample", "forward_ad", "linearize")


def inputs() -> torch.Tensor:
    """Shape (32, 16)."""
    return torch.randn(32, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")  # torch's own graph of linearize
@pytest.mark.parametrize("mode", ["bf16-true", "16-mixed"])
@pytest.mark.parametrize("name", SOUND)
def test_sound_code_within_transforms_holds(name: str, mode: str) -> None:
    torch.manual_seed(0)
    model = Network(SOUND[name])
    report = audit(model, inputs(), mode=mode)
    if report.ok:
        assert name not in NOT_UNDER_AUTOCAST or mode != "16-mixed"
    else:  # torch itself mixes dtypes in these derivatives under autocast
        assert name in NOT_UNDER_AUTOCAST, report
        assert "does not run in this mode" in str(report), report
        with torch.autocast("cpu", torch.float16), pytest.raises(RuntimeError, match=r"dtype|scalar type"):
            model(inputs())
    assert torch._C._functorch.peek_interpreter_stack() is None
    assert not torch._C._functorch.maybe_current_level()


def variance(rows: torch.Tensor) -> torch.Tensor:
    """A variance as a difference of large squares, shape (16,) to ()."""
    far = rows + 100.0
    return far.square().mean() - far.mean().square()


UNSOUND: dict[str, Apply] = {
    "vmap": lambda m, x: vmap(lambda row: variance(m.net(row)))(x),
    "grad": lambda m, x: vmap(grad(variance))(m.net(x)),
    "jvp": lambda m, x: jvp(lambda row: vmap(variance)(m.net(row)), (x,), (torch.ones_like(x),))[1],
}


@pytest.mark.parametrize("name", UNSOUND)
def test_what_is_unsound_within_transforms_is_found_and_its_line_named(name: str) -> None:
    torch.manual_seed(0)
    report = audit(Network(UNSOUND[name]), inputs(), mode="bf16-true")
    finding = report.findings[0]
    assert (finding.module, finding.kind, finding.where) == ("", "instability", "forward"), report
    assert finding.op.startswith("aten::"), report
    assert "falls from" in str(report), report


def test_what_is_born_within_forward_mode_is_traced_to_its_op() -> None:
    """Torch works out shapes of such derivatives on tensors without values, which the search has to let pass."""
    torch.manual_seed(0)
    unsound: Apply = lambda m, x: jvp(lambda r: torch.log1p(torch.exp(50.0 * m.net(r))), (x,), (x,))[1]  # noqa: E731
    report = audit(Network(unsound), inputs(), mode="16-true", gradients=False)
    assert (report.findings[0].kind, report.findings[0].op) == ("range", "aten::exp"), report


@pytest.mark.parametrize("mode", ["bf16-true", "16-mixed"])
@pytest.mark.parametrize("name", ["vmap", "forces", "hessian"])
def test_trainings_within_transforms_hold(name: str, mode: str) -> None:
    torch.manual_seed(0)
    report = audit_training(
        lambda: Network(SOUND[name]), lambda m: torch.optim.SGD(m.parameters(), lr=1e-3),
        lambda m, batch: m(batch).square().mean(), [inputs()] * 4, mode=mode,
    )  # fmt: skip
    assert report.ok, report


def test_a_checkpoint_of_such_a_model_takes_its_probe_to_another_mode(tmp_path: Path) -> None:
    torch.manual_seed(0)
    runtime = PrecisionRuntime("bf16-true")
    model = runtime.setup(Network(SOUND["vmap"]))
    runtime.probe(model, inputs())
    runtime.save(tmp_path / "model.pt", model)
    other = PrecisionRuntime("32-true")
    changes = other.load_across(tmp_path / "model.pt", other.setup(Network(SOUND["vmap"])))
    assert changes.probe
    assert changes.ok
