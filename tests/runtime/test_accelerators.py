import subprocess
import sys
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from precision_runtime.accelerators import Machine, machine, name_of, pretend, resolve
from precision_runtime.capability import support
from precision_runtime.errors import UnknownNameError, UnsupportedError
from precision_runtime.modes import MODES
from precision_runtime.runtime import PrecisionRuntime


class Lacking(Machine):
    """A machine with the given accelerators and no other."""

    def __init__(self, *there: str) -> None:
        super().__init__()
        self.there = there

    def missing(self, accelerator):
        return None if accelerator in self.there else f"no {accelerator} in this test"


def test_auto_takes_the_best_that_is_there():
    for there, best in ((("cpu",), "cpu"), (("cpu", "mps"), "mps"), (("cpu", "cuda", "mps"), "cuda")):
        with pretend(Lacking(*there)):
            assert name_of("auto") == best


def test_an_unknown_name_gets_the_nearest_known_one():
    with pytest.raises(
        UnknownNameError, match=r"accelerator 'cudda' in --acc is unknown\. Did you mean 'cuda'\?"
    ) as caught:
        resolve("cudda", "--acc")
    assert "Known accelerators: auto, cpu, cuda, mps, xpu, xla" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("gpu", "'cuda' or 'mps'"), ("TPU", "'xla'"), ("nvidia", "'cuda'"), ("rocm", "'cuda'"), ("metal", "'mps'"),
     ("xpuu", "'xpu'"), ("cpuu", "'cpu'")],
)  # fmt: skip
def test_what_others_call_an_accelerator_leads_to_its_name(name, meant):
    with pytest.raises(UnknownNameError, match=rf"Did you mean {meant}\?"):
        name_of(name)


@pytest.mark.parametrize("name", ["cuda:x", "cuda:", 3, None])
def test_what_is_no_device_is_unknown(name):
    with pytest.raises(UnknownNameError):
        resolve(name)


def test_an_absent_accelerator_is_refused_with_the_reason():
    with (
        pretend(Lacking("cpu")),
        pytest.raises(UnsupportedError, match="'mps' cannot be used here: no mps in this test"),
    ):
        resolve("mps")


def test_devices_and_indices_are_taken_as_they_are():
    assert resolve(torch.device("cpu")) == torch.device("cpu")
    assert resolve(" CPU ") == torch.device("cpu")
    with pretend(Lacking("cpu", "cuda")):
        assert resolve("cuda:3") == torch.device("cuda", 3)


def test_the_real_machine_comes_back_after_an_error():
    real = machine()
    with pytest.raises(KeyError), pretend(Lacking()):
        raise KeyError
    assert machine() is real


def test_each_question_is_asked_once(monkeypatch):
    asked = []
    monkeypatch.setattr("precision_runtime.accelerators._product_error", lambda *a: asked.append(a))
    here = Machine()
    assert here.product_error("cpu", "float16") is here.product_error("cpu", "float16") is None
    assert len(asked) == 1


def test_probes_draw_no_random_numbers_and_leave_no_state():
    before = torch.get_rng_state()
    here = Machine()
    for dtype in ("float16", "bfloat16", "float64"):
        here.product_error("cpu", dtype)
        here.autocast_result("cpu", dtype)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.is_autocast_enabled("cpu")


def test_a_probe_reports_an_error_as_text():
    assert Machine().product_error("cpu", "no_such_dtype") == "module 'torch' has no attribute 'no_such_dtype'"


def test_importing_capability_imports_no_torch():
    code = "import sys, precision_runtime.capability, precision_runtime.accelerators; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": "src"}, check=False).returncode == 0
    witness = "import sys, precision_runtime.casting; sys.exit('torch' in sys.modules)"  # the test above can fail
    assert subprocess.run([sys.executable, "-c", witness], env={"PYTHONPATH": "src"}, check=False).returncode == 1


# Whatever holds where the first question is asked.
SURROUNDINGS = {
    "float64 default": "torch.set_default_dtype(torch.float64)",
    "float16 default": "torch.set_default_dtype(torch.float16)",
    "fake tensors": "FakeTensorMode().__enter__()",
    "meta device": "torch.device('meta').__enter__()",
}


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_answers_do_not_depend_on_where_the_first_question_was_asked(surroundings):
    # In a thread: modes and default devices are a thread's own, and the default dtype is put back.
    before, wrong = torch.get_default_dtype(), []

    def ask():
        exec(SURROUNDINGS[surroundings], {"torch": torch, "FakeTensorMode": FakeTensorMode})
        with pretend(Machine()):
            wrong.extend(answer for answer in (support(mode, "cpu") for mode in MODES) if not answer.ok)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    torch.set_default_dtype(before)
    assert wrong == []


def test_a_mixed_mode_runs_after_a_question_that_was_asked_under_a_float64_default():
    with pretend(Machine()):
        torch.set_default_dtype(torch.float64)
        try:
            support("bf16-mixed", "cpu")
        finally:
            torch.set_default_dtype(torch.float32)
        assert PrecisionRuntime("bf16-mixed", "cpu").support.status == "native"
