"""The user's model is found inside wrappers; frameworks are loaded only when they are asked for."""

import subprocess
import sys

import pytest
import torch
from torch import distributed, nn

from precision_runtime.integrations import lightning, plain


def test_a_model_without_wrappers_is_itself():
    model = nn.Linear(2, 2)
    assert plain(model) is model


def test_it_is_found_in_torch_s_wrappers(tmp_path):
    model = nn.Linear(2, 2)
    assert plain(torch.compile(model)) is model
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        assert plain(torch.compile(nn.parallel.DistributedDataParallel(model))) is model
    finally:
        distributed.destroy_process_group()


def test_a_module_that_only_has_such_an_attribute_is_no_wrapper():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2)

    holder = Holder()
    assert plain(holder) is holder


def test_a_forward_that_was_replaced_before_accelerate_stays():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    from accelerate.state import AcceleratorState, GradientState, PartialState

    model = nn.Linear(2, 2)

    def own(x):
        return x + 1

    model.forward = own
    states = (AcceleratorState, GradientState, PartialState)
    try:
        prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    finally:
        for state in states:
            state._reset_state()
    assert prepared.forward is not own
    assert plain(prepared) is model
    assert model.forward is own


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(AttributeError, match="it has FabricPrecision, TrainerPrecision"):
        lightning.Fabric  # noqa: B018 - looking it up is the test


def test_importing_loads_no_framework():
    code = (
        "import precision_runtime.integrations, precision_runtime.integrations.lightning, sys\n"
        "sys.exit(bool({'lightning', 'accelerate', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
