import pytest
import torch

from precision_runtime.accelerators import Machine, pretend
from precision_runtime.capability import Support, support
from precision_runtime.errors import UnknownNameError
from precision_runtime.modes import MODES


class Fake(Machine):
    """A machine where all is well but what is named."""

    def __init__(self, missing=(), products=(), autocasts=None, emulated=()) -> None:
        super().__init__()
        self.lacks, self.products, self.autocasts, self.emulated = missing, products, autocasts or {}, emulated

    def missing(self, accelerator):
        return "there is none" if accelerator in self.lacks else None

    def product_error(self, accelerator, dtype):
        return "no kernel" if (accelerator, dtype) in self.products else None

    def autocast_result(self, accelerator, dtype):
        return self.autocasts.get((accelerator, dtype), dtype)

    def emulation(self, accelerator, dtype):
        return "an old GPU" if (accelerator, dtype) in self.emulated else None


# Without hardware for them; a processor or GPU that has it makes these native, too.
EMULATED = ("tf32", "transformer-engine", "transformer-engine-float16")


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_runs_on_a_cpu_natively_or_says_that_it_is_emulated(mode):
    answer = support(mode, "cpu")
    if mode in EMULATED:
        assert answer.status == "emulated"
        return
    assert answer == Support(mode, "cpu", "native", answer.reason)
    assert answer.ok
    assert "tried on this machine" in answer.reason


def test_16_mixed_on_a_cpu_is_float16_and_no_other_dtype():
    # The witness: autocast itself.
    with torch.autocast("cpu", dtype=torch.float16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float16
    assert "float16" in support(16, "cpu").reason.replace("bfloat16", "")


@pytest.mark.parametrize("accelerator", ["cuda", "mps", "xpu", "xla"])
def test_an_absent_accelerator_is_unsupported_with_its_reason(accelerator):
    with pretend(Fake(missing=(accelerator,))):
        answer = support("32-true", accelerator)
    assert (answer.status, answer.ok, answer.reason) == ("unsupported", False, "there is none")


def test_mps_without_float64_says_what_to_do():
    with pretend(Fake(products={("mps", "float64")})):
        answer = support("64-true", "mps")
        assert support("32-true", "mps").ok
    assert not answer.ok
    assert (
        answer.reason
        == "mps cannot compute in float64 (no kernel); Metal has no float64: run 64-true with accelerator='cpu'"
    )


def test_bfloat16_on_an_old_gpu_is_emulated_and_float16_is_not():
    with pretend(Fake(emulated={("cuda", "bfloat16")})):
        assert support("bf16-mixed", "cuda") == Support("bf16-mixed", "cuda", "emulated", "an old GPU")
        assert support("bf16-mixed", "cuda").ok
        assert support("16-mixed", "cuda").status == "native"


def test_autocast_that_is_silently_disabled_is_found_out():
    with pretend(Fake(autocasts={("xpu", "bfloat16"): "float32"})):
        answer = support("bf16-mixed", "xpu")
        assert support("bf16-true", "xpu").ok
    assert not answer.ok
    assert "gave float32" in answer.reason


def test_auto_and_legacy_names_are_resolved():
    with pretend(Fake(missing=("xpu", "mps", "cuda"))):
        assert (support("bf16").mode, support("bf16").accelerator) == ("bf16-mixed", "cpu")


def test_unknown_names_raise():
    with pytest.raises(UnknownNameError, match="16-mix"):
        support("16-mix", "cpu")
    with pytest.raises(UnknownNameError, match="gpu"):
        support("16-mixed", "gpu")
