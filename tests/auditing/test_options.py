"""The audit judges a mode with the options that a runtime was given."""

from __future__ import annotations

import torch
from torch import nn

from precision_runtime import PrecisionRuntime, audit
from precision_runtime.options import Options


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))


X = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))


def test_a_layer_that_is_ignored_is_not_stored_in_four_bits() -> None:
    runtime = PrecisionRuntime("nf4", accelerator="cpu", ignore_modules="2")
    report = audit(model(), X, mode=runtime.mode, options=runtime.strategy.options)
    assert [layer.module for layer in report.layers] == ["0"]
    assert [layer.module for layer in audit(model(), X, mode="nf4").layers] == ["0", "2"]


def test_the_compute_dtype_of_the_mode_is_what_layers_compute_in() -> None:
    seen = []

    class Probe(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.dtype)
            return x

    runtime = PrecisionRuntime("nf4", accelerator="cpu", compute_dtype="float16")
    assert audit(nn.Sequential(nn.Linear(64, 64), Probe()), X, mode=runtime.mode, gradients=False).ok
    assert torch.float16 in seen
    assert torch.bfloat16 not in seen


def test_islands_of_the_options_count_where_none_are_named() -> None:
    class Big(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * 1e5) * 1e-5

    net = nn.Sequential(nn.Linear(64, 64), Big())
    options = Options(islands=(("1", "float32"),))
    assert not audit(net, X, mode="16-true", gradients=False).ok
    assert audit(net, X, mode="16-true", gradients=False, options=options).ok
    assert not audit(net, X, mode="16-true", gradients=False, options=options, islands="0").ok


def test_the_recipe_of_the_options_is_the_one_that_is_run() -> None:
    loud = X.clone()
    loud[0, 0] = 1e6  # one scale for the whole tensor loses all but this; scales of 32 values lose one row's beginning

    def underflow(recipe: str) -> float:
        runtime = PrecisionRuntime("transformer-engine", accelerator="cpu", recipe=recipe)
        report = audit(model(), loud, mode=runtime.mode, gradients=False, options=runtime.strategy.options)
        return report.layers[0].underflow["input"]

    assert underflow("Float8CurrentScaling") > 0.9
    assert underflow("MXFP8BlockScaling") < 0.1
