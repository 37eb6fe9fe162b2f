"""Names that nobody knows are told with those that are known, in words that read well."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from precision_runtime import PrecisionRuntime, sensitivity
from precision_runtime.errors import UnknownNameError
from precision_runtime.scaling import DynamicScaler


@pytest.mark.parametrize(
    ("ask", "known"),
    [
        (lambda: PrecisionRuntime("bf16-true", updates="stocastic"), "Known ways of updates: nearest"),
        (lambda: PrecisionRuntime(amp_backend="apex", amp_level="0O1"), "Known amp_levels: O0"),
        (lambda: PrecisionRuntime("16-mixed", scaler=DynamicScaler(on_stall="warm")), "Known values of on_stall: "),
        (lambda: PrecisionRuntime("bf16-true", inputs="rise"), "Known answers: "),
        (lambda: sensitivity(torch.sin, torch.ones(2), families=["mixd"]), "Known families: true, mixed"),
        (
            lambda: PrecisionRuntime("bf16-true", islands="hed").setup(nn.Sequential(nn.Linear(2, 2))),
            "Known modules, parameters and buffers: 0, ",
        ),
    ],
    ids=["updates", "amp_level", "on_stall", "inputs", "families", "islands"],
)
def test_the_list_of_known_names_has_a_plural(ask, known):
    with pytest.raises(UnknownNameError) as caught:
        ask()
    assert known in str(caught.value)


def test_so_has_the_list_of_what_tensors_can_hold():
    tensors = pytest.importorskip("precision_runtime.strategies_for_tests").tensors
    with pytest.raises(UnknownNameError, match="Known kinds of values: "):
        tensors((2,), kinds=["tinny"])
