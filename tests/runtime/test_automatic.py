import subprocess
import sys

import pytest
import torch
from torch import nn

from precision_runtime import MODES, PrecisionRuntime, audit, parse_mode, support
from precision_runtime.accelerators import Machine, pretend
from precision_runtime.automatic import placed
from precision_runtime.errors import ConfigurationError, UnknownNameError
from precision_runtime.modes import AUTO, GROUPS, expand_modes


class Fake(Machine):
    """A machine with one accelerator beside the cpu, on which all is well but what is named."""

    def __init__(self, accelerator="cpu", broken=(), emulated=(), slow=(), silent=()) -> None:
        super().__init__()
        self.there, self.broken, self.emulated = ("cpu", accelerator), broken, emulated
        self.low, self.silent = slow, silent

    def missing(self, accelerator):
        return None if accelerator in self.there else "there is none"

    def product_error(self, accelerator, dtype):
        return "no kernel" if dtype in self.broken else None

    def autocast_result(self, accelerator, dtype):
        return "float32" if dtype in self.silent else dtype

    def emulation(self, accelerator, dtype):
        return "an old GPU computes it in float32" if dtype in self.emulated else None

    def slow(self, accelerator, dtype):
        return "no instructions for it" if dtype in self.low else None


@pytest.mark.parametrize(
    ("here", "mode", "why"),
    [
        (Fake("cuda"), "bf16-mixed", "cuda computes in bfloat16 natively"),
        (Fake("cuda", emulated={"bfloat16"}), "16-mixed", "not bf16-mixed, because an old GPU"),
        (Fake("cuda", emulated={"bfloat16"}, broken={"float16"}), "32-true", "cannot compute in float16 (no kernel)"),
        (Fake("mps", broken={"bfloat16"}), "16-mixed", "mps cannot compute in bfloat16 (no kernel)"),
        (Fake("mps"), "bf16-mixed", "no loss scaler"),
        (Fake("xpu", silent={"bfloat16"}), "16-mixed", "autocast to bfloat16 takes no effect there"),
        (Fake("cpu"), "bf16-mixed", "cpu computes in bfloat16 natively"),
        (Fake("cpu", slow={"bfloat16"}), "32-true", "not bf16-mixed, because no instructions for it"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_it_takes_the_best_that_runs_natively_and_says_why(here, mode, why):
    with pretend(here):
        for _ in range(2):  # the same twice
            answer = support("auto")
            assert (answer.mode, answer.runs, answer.accelerator, answer.ok) == ("auto", mode, here.there[1], True)
            assert answer.reason.startswith(f"auto chose {mode}: ")
            assert why in answer.reason
            assert f"auto (as {mode}) on" in str(answer)


def test_an_absent_accelerator_is_unsupported_for_auto_too():
    with pretend(Fake()):
        assert support("auto", "cuda").reason == "there is none"
        assert not support("auto", "cuda").ok


def test_auto_is_a_name_and_no_member_of_any_list():
    assert parse_mode(" Auto ") is AUTO
    assert "auto" not in MODES
    assert all("auto" not in members for members in GROUPS.values())
    assert [m.name for m in expand_modes(["mixed", "auto", "!16-mixed"])] == ["bf16-mixed", "auto"]
    with pytest.raises(UnknownNameError, match=r"'atuo' is unknown\. Did you mean 'auto'"):
        parse_mode("atuo")


def test_every_other_mode_stays_what_it_is_everywhere_but_on_xla():
    for mode in MODES.values():
        for accelerator in ("cpu", "cuda", "mps", "xpu"):
            assert placed(mode, accelerator).mode is mode
            assert placed(mode, accelerator).runs == ""


def test_the_runtime_runs_what_was_chosen_and_shows_it():
    rt = PrecisionRuntime("auto", "cpu")
    assert rt.mode in (MODES["bf16-mixed"], MODES["32-true"])
    assert rt.mode.name == support("auto", "cpu").runs
    assert rt.support.reason.startswith(f"auto chose {rt.mode}")
    assert repr(rt) == f"PrecisionRuntime({rt.mode.name!r}, accelerator='cpu') chosen by auto"
    with pretend(Fake(slow={"bfloat16"})):
        assert PrecisionRuntime("auto").mode is MODES["32-true"]


def test_the_choice_is_recorded_and_a_machine_that_chooses_otherwise_says_so():
    with pretend(Fake()):
        there = PrecisionRuntime("auto")
    state = there.state_dict()
    assert state["mode"] == "bf16-mixed"
    with pretend(Fake()):
        PrecisionRuntime("auto").load_state_dict(state)
        PrecisionRuntime("bf16-mixed").load_state_dict(state)
    with pretend(Fake(slow={"bfloat16"})):
        here = PrecisionRuntime("auto")
        with pytest.raises(
            ConfigurationError,
            match=r"saved in bf16-mixed .* in 32-true \(auto chose 32-true: not bf16-mixed, because no instructions.*"
            r"make the runtime with PrecisionRuntime\('bf16-mixed'\)",
        ):
            here.load_state_dict(state)


def test_it_takes_no_options_of_modes_that_it_may_not_choose():
    with pytest.raises(ConfigurationError, match="takes no compute_dtype"):
        PrecisionRuntime("auto", "cpu", compute_dtype=torch.float16)


def test_audit_in_auto_says_which_mode_it_judged():
    report = audit(nn.Linear(4, 4), torch.randn(2, 4), mode="auto")
    assert report.ok
    assert report.mode == support("auto", "cpu").runs
    (remark,) = (r for r in report.remarks if r.kind == "lane")
    assert remark.message.startswith(f"auto chose {report.mode}: ")
    assert not [r for r in audit(nn.Linear(4, 4), torch.randn(2, 4), mode=report.mode).remarks if r.kind == "lane"]


def test_choosing_draws_no_random_numbers():
    before = torch.get_rng_state()
    support("auto")
    assert torch.equal(before, torch.get_rng_state())


def test_importing_it_imports_no_torch():
    code = "import sys, precision_runtime.automatic as a; a.parse_mode if 0 else None; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
