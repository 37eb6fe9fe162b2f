"""The table of modes and accelerators, on faked machines: each refusal has its reason and what to do."""

import json

import pytest

from precision_runtime import MODES, support
from precision_runtime.accelerators import ACCELERATORS, Machine, pretend
from precision_runtime.cli import main
from precision_runtime.survey import PROMISED, present, survey


class Fake(Machine):
    """A machine with the accelerators that are named, where all is well but what is given."""

    def __init__(self, *there, products=(), emulated=None, quantized=None) -> None:
        super().__init__()
        self.there, self.products = ("cpu", *there), products
        self.emulated, self.quantized = emulated or {}, quantized

    def missing(self, accelerator):
        return None if accelerator in self.there else f"this test has no {accelerator}"

    def product_error(self, accelerator, dtype):
        return "no kernel" if (accelerator, dtype) in self.products else None

    def autocast_result(self, accelerator, dtype):
        return dtype

    def emulation(self, accelerator, dtype):
        return self.emulated.get((accelerator, dtype))

    def quantized_error(self, accelerator, storage):
        return self.quantized


def test_int8_without_bitsandbytes_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pretend(Machine()):
        answer = support("int8", "cpu")
        assert support("32-true", "cpu").ok
    assert answer.status == "unsupported"
    assert "bitsandbytes is not installed (pip install" in answer.reason


def test_64_true_on_mps():
    with pretend(Fake("mps", products={("mps", "float64")})):
        answer = support("64-true", "mps")
    assert not answer.ok
    assert "Metal has no float64: run 64-true with accelerator='cpu'" in answer.reason


@pytest.mark.parametrize("mode", ["bf16-true", "bf16-mixed"])
def test_bfloat16_on_an_old_gpu_is_emulated(mode):
    old = "Tesla V100 (compute capability 7.0) has no bfloat16 units"
    with pretend(Fake("cuda", emulated={("cuda", "bfloat16"): old})):
        assert (support(mode, "cuda").status, support(mode, "cuda").reason) == ("emulated", old)
        assert support("16-mixed", "cuda").status == "native"


def test_transformer_engine_without_hopper_is_emulated(monkeypatch):
    old = "an A100 has no FP8 units"
    with pretend(Fake("cuda")) as here:
        assert support("transformer-engine", "cuda").status == "native"
        monkeypatch.setattr(here, "emulation", lambda accelerator, what: old)
        answer = support("transformer-engine", "cuda")
    assert (answer.status, answer.reason) == ("emulated", old)


def test_the_survey_has_every_mode_on_every_accelerator_in_order():
    entries = survey()
    assert [(e.support.mode, e.support.accelerator) for e in entries] == [(m, a) for m in MODES for a in ACCELERATORS]
    for entry in entries:
        assert entry.support == support(entry.support.mode, entry.support.accelerator)
        assert entry.support.reason


def test_what_documents_promised_is_data_about_known_modes():
    assert set(PROMISED) <= set(MODES)
    assert all(set(row) == {"cpu", "cuda", "xla"} for row in PROMISED.values())
    assert PROMISED["16-mixed"]["cpu"] == "no"
    assert support("16-mixed", "cpu").status == "native"  # and today it runs
    (entry,) = survey([MODES["16-mixed"]], ["cpu"])
    assert entry.to_dict()["promised"] == "no"


def test_the_default_accelerator_comes_first():
    with pretend(Fake("cuda", "xla")):
        assert present() == ["cuda", "cpu", "xla"]


def said(capsys, *arguments):
    status = main(["support", *arguments])
    return status, capsys.readouterr().out


def test_the_table_shows_status_promise_and_reason(capsys):
    lanes = {("cuda", "bfloat16"): "an old GPU computes it in float32"}
    with pretend(Fake("cuda", products={("cpu", "float16")}, emulated=lanes)):
        status, text = said(capsys)
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in text.splitlines() if line.strip()}
    assert status == 0  # nothing was asked about in particular
    assert lines["mode"] == "cuda cpu"
    assert lines["bf16-mixed"] == "emulated (docs: yes) native"
    assert lines["16-mixed"] == "native unsupported"
    assert lines["apex-O0"] == "native native (docs: no)"
    assert "an old GPU computes it in float32" in text
    assert "16-true on cpu, 16-mixed on cpu" in text
    assert "xla: this test has no xla" in text


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["32-true", "--accelerator", "cpu"], 0),
        (["64-true", "--accelerator", "mps"], 1),
        (["32-true", "64-true", "--accelerator", "cpu", "--accelerator", "mps"], 1),
        (["half", "!16-true", "--accelerator", "auto"], 0),
        (["auto"], 0),
        (["32-tru"], 2),
        (["32-true", "--accelerator", "mpd"], 2),
    ],
)
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_the_exit_status_answers_for_what_was_named(arguments, status, form, capsys):
    with pretend(Fake("mps", products={("mps", "float64")})):
        assert main(["support", *arguments, *form]) == status
    assert ("Did you mean" in capsys.readouterr().err) is (status == 2)


def test_json_has_everything_also_what_is_absent(capsys):
    with pretend(Fake("cuda")):
        status, text = said(capsys, "--json")
        document = json.loads(text)
        assert [e["mode"] for e in document["entries"]] == [m for m in MODES for _ in ACCELERATORS]
        assert document["entries"] == [entry.to_dict() for entry in survey()]
    assert status == 0
    assert document["default"] == "cuda"
    assert document["absent"] == {name: f"this test has no {name}" for name in ("mps", "xpu", "xla")}
    assert {e["status"] for e in document["entries"] if e["accelerator"] == "xla"} == {"unsupported"}


def test_auto_and_xla_show_what_they_become(capsys):
    with pretend(Fake("xla")):
        _, text = said(capsys, "auto", "16-mixed", "--accelerator", "xla")
    assert "native as bf16-mixed" in text
    assert "native as bfloat16 (docs: no)" in text
    assert "auto chose bf16-mixed" in text
