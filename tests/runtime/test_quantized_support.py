"""When a machine can run the bitsandbytes modes, and what it says when it cannot: with faked probes."""

import subprocess
import sys

import pytest

from precision_runtime import accelerators
from precision_runtime.accelerators import Machine, pretend
from precision_runtime.capability import support
from precision_runtime.errors import UnsupportedError
from precision_runtime.modes import GROUPS
from precision_runtime.runtime import PrecisionRuntime

MODES = GROUPS["quantized"]


class Fresh(Machine):
    """This machine, with nothing remembered, and without accelerators' own reasons."""

    def missing(self, accelerator):
        return None

    def product_error(self, accelerator, dtype):
        return None


@pytest.mark.parametrize("mode", MODES)
def test_this_machine_runs_them_or_says_which_package_is_missing(mode):
    answer = support(mode, "cpu")
    assert answer.ok or "bitsandbytes" in answer.reason
    if answer.ok:
        assert answer.status == "native"


@pytest.mark.parametrize("mode", MODES)
def test_a_missing_package_is_a_reason_and_no_import_error(mode, monkeypatch):
    monkeypatch.setattr(accelerators.importlib.util, "find_spec", lambda name: None)
    with pretend(Fresh()):
        answer = support(mode, "cpu")
        assert (answer.status, answer.ok) == ("unsupported", False)
        assert "not installed (pip install 'pytest-precision[bitsandbytes]')" in answer.reason
        with pytest.raises(UnsupportedError, match=rf"{mode} cannot run on cpu: the package bitsandbytes"):
            PrecisionRuntime(mode, "cpu")
        assert support("bf16-true", "cpu").ok


@pytest.mark.parametrize(
    ("version", "old"), [("0.49.9", True), ("0.50.0", False), ("1.0", False), ("0.50.2.dev0", False)]
)
def test_a_package_that_is_too_old_is_told_by_its_version(version, old, monkeypatch):
    monkeypatch.setattr(accelerators.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(accelerators.importlib.metadata, "version", lambda name: version)
    monkeypatch.setattr(accelerators, "_quantized_error", lambda device, storage: None)
    with pretend(Fresh()):
        assert support("nf4", "cpu").ok is not old
        if old:
            assert f"bitsandbytes {version} is installed, and 0.50 is the oldest" in support("nf4", "cpu").reason


def test_a_device_without_kernels_says_so(monkeypatch):
    def probe(device, storage):
        return "no kernel" if storage.startswith("int8") else None

    monkeypatch.setattr(accelerators, "_no_bitsandbytes", lambda: None)
    monkeypatch.setattr(accelerators, "_quantized_error", probe)
    with pretend(Fresh()):
        assert support("nf4", "cpu").ok
        assert support("int8", "cpu").reason == "no kernel"


def test_a_probe_that_raises_or_computes_wrongly_is_a_reason(monkeypatch):
    bnb = pytest.importorskip("bitsandbytes")
    import torch

    cpu = torch.device("cpu")
    assert all(accelerators._quantized_error(cpu, mode) is None for mode in MODES)

    def broken(*args, **kwargs):
        raise NotImplementedError("no such operator\nand more")

    monkeypatch.setattr(bnb, "matmul_4bit", broken)
    assert accelerators._quantized_error(cpu, "nf4") == (
        "bitsandbytes does not compute in nf4 on cpu: no such operator"
    )
    monkeypatch.setattr(bnb, "matmul_4bit", lambda x, *args, **kwargs: x * 1.1)
    assert accelerators._quantized_error(cpu, "fp4-dq") == "bitsandbytes gives wrong results in fp4-dq on cpu"


IMPORTS = [
    ("precision_runtime.runtime", False),
    pytest.param("precision_runtime.layers.library", True, marks=pytest.mark.slow),  # the library's own import
]


@pytest.mark.parametrize(("module", "loaded"), IMPORTS)
def test_bitsandbytes_is_imported_late_and_quietly(module, loaded):
    pytest.importorskip("bitsandbytes")
    code = f"import sys, {module}\nprint('bitsandbytes' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(loaded)
    assert done.stderr == ""


def test_the_library_that_cannot_be_imported_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "precision_runtime.layers.library", raising=False)
    with pytest.raises(UnsupportedError, match=r"need the package bitsandbytes.*pip install"):
        import precision_runtime.layers.library  # noqa: F401
