"""The rule of XLA with a faked device; ``tox -e xla`` runs ``tests/xla`` on a real one."""

import pytest
import torch

from precision_runtime import MODES, PrecisionRuntime, support
from precision_runtime.accelerators import Machine, pretend
from precision_runtime.automatic import placed
from precision_runtime.errors import ConfigurationError, UnsupportedError


class WithXla(Machine):
    """A machine whose device called xla is the processor."""

    def missing(self, accelerator):
        return None if accelerator in ("cpu", "xla") else "there is none"

    def product_error(self, accelerator, dtype):
        return None

    def autocast_result(self, accelerator, dtype):
        return dtype

    def device(self, accelerator):
        return torch.device("cpu")


HALF = {
    "16-true": ("bfloat16", "bfloat16"),
    "16-mixed": ("float32", "bfloat16"),
    "apex-O1": ("float32", "bfloat16"),
    "apex-O2": ("bfloat16", "bfloat16"),
    "apex-O3": ("bfloat16", "bfloat16"),
}


@pytest.mark.parametrize("mode", HALF)
def test_half_is_bfloat16_on_xla_visibly_and_under_its_own_name(mode):
    with pretend(WithXla()):
        answer = support(mode, "xla")
        rt = PrecisionRuntime(mode, "xla")
    assert (answer.mode, answer.status, answer.runs) == (mode, "native", "bfloat16")
    assert f"{mode} runs in bfloat16 on xla" in answer.reason
    assert f"{mode} (as bfloat16) on xla" in str(answer)
    assert (rt.mode.name, rt.mode.params, rt.mode.compute) == (mode, *HALF[mode])
    assert not rt.scaler.enabled
    assert rt.support == answer


def test_the_rest_is_what_it_says():
    with pretend(WithXla()):
        for mode in ("32-true", "bf16-true", "bf16-mixed"):
            assert support(mode, "xla").runs == ""
            assert placed(MODES[mode], "xla").mode is MODES[mode]


def test_float64_is_refused_with_what_to_do():
    with pretend(WithXla()):
        answer = support("64-true", "xla")
        with pytest.raises(UnsupportedError, match="TPUs have no float64"):
            PrecisionRuntime("64-true", "xla")
    assert (answer.status, answer.reason) == (
        "unsupported", "TPUs have no float64: run 64-true with accelerator='cpu'",
    )  # fmt: skip


def test_its_own_state_is_loaded_and_a_scaler_is_refused():
    with pretend(WithXla()):
        rt = PrecisionRuntime("16-mixed", "xla")
        rt.load_state_dict(rt.state_dict())
        with pytest.raises(ConfigurationError, match="does not scale its loss"):
            PrecisionRuntime("16-mixed", "xla", scaler=torch.amp.GradScaler("cpu"))


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install torch_xla" in str(Machine().missing("xla"))
