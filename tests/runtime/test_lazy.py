"""Lazy layers: cast like others where a cast is all, refused by name where weights are needed."""

import pytest
import torch
from torch import nn

from precision_runtime.errors import ConfigurationError
from precision_runtime.modes import GROUPS, MODES
from precision_runtime.runtime import PrecisionRuntime

REFUSING = (*GROUPS["quantized"], *GROUPS["fp8"], "apex-O2")


def lazy():
    return nn.Sequential(nn.Linear(16, 16), nn.LazyLinear(16), nn.LazyBatchNorm1d())


@pytest.mark.parametrize("mode", sorted({*MODES} - {*REFUSING}))
def test_modes_that_cast_take_lazy_layers(mode):
    rt = PrecisionRuntime(mode, "cpu")
    model = rt.setup(lazy())
    made = model(torch.ones(4, 16))
    assert made.isfinite().all()
    assert {p.dtype for p in model.parameters()} == {getattr(torch, rt.mode.params)}
    with rt.init_module():
        built = lazy()
    assert rt.setup(built)(torch.ones(4, 16)).dtype is made.dtype


@pytest.mark.parametrize("mode", REFUSING)
def test_modes_that_need_weights_refuse_them_by_name(mode):
    rt = PrecisionRuntime(mode, "cpu")

    def build():
        with rt.init_module():
            return lazy()

    for verb in (lambda: rt.setup(lazy()), lambda: rt.plan(lazy()), build):
        with pytest.raises(ConfigurationError, match=r"'1' \(LazyLinear\), '2' \(LazyBatchNorm1d\)\. Call the model"):
            verb()
    model = lazy()
    with torch.no_grad():
        model(torch.ones(4, 16))
    assert rt.setup(model)(torch.ones(4, 16)).isfinite().all()
