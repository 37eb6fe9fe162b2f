"""What this machine has: the only place that probes hardware and packages. Importing it imports no torch.

Every question is asked of the hardware by really doing a small thing on it, once per process. Nothing here is believed
from a table or a version number: autocast, for instance, is silently disabled on a device that is not there, and only
the dtype of a result shows it. Probes draw no random numbers and name every dtype and device that they use: an answer
holds for the whole process, and the default dtype of the moment must not be in it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from precision_runtime.errors import UnsupportedError, unknown_names

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

ACCELERATORS = ("cpu", "cuda", "mps", "xpu", "xla")

# What others call them; likeness of letters alone would lead from gpu and tpu to xpu.
ELSEWHERE = MappingProxyType(
    {
        "gpu": ("cuda", "mps"),
        **dict.fromkeys(("nvidia", "rocm", "hip", "amd"), ("cuda",)),
        **dict.fromkeys(("metal", "apple"), ("mps",)),
        "intel": ("xpu",),
        "tpu": ("xla",),
    }
)

# What "auto" tries, best first. XLA is taken only by name: its package may be there without any accelerator behind it.
AUTO = ("cuda", "xpu", "mps", "cpu")


class Machine:
    """The accelerators and kernels of a machine. Tests pass a subclass that answers in its place.

    Accelerators and dtypes are given and returned by name, so that a fake needs no torch. Each method is a probe that
    may be replaced by itself; answers are remembered per instance.
    """

    def __init__(self) -> None:
        self._answers: dict[tuple[str, ...], Any] = {}

    def missing(self, accelerator: str) -> str | None:
        """Why ``accelerator`` cannot be used at all, with what to do; None when it is there."""
        return self._once(("missing", accelerator), _MISSING[accelerator])

    def product_error(self, accelerator: str, dtype: str) -> str | None:
        """The error that a small matrix product and its gradient raise in ``dtype``; None when they work."""
        return self._once(("product", accelerator, dtype), lambda: _product_error(self.device(accelerator), dtype))

    def autocast_result(self, accelerator: str, dtype: str) -> str:
        """The dtype that a float32 product really has under autocast to ``dtype``, or the error's text."""
        return self._once(("autocast", accelerator, dtype), lambda: _autocast_result(self.device(accelerator), dtype))

    def emulation(self, accelerator: str, dtype: str) -> str | None:
        """Why ``dtype`` (or "tf32", or an FP8 recipe) is emulated on ``accelerator`` although it runs; None: native."""
        probe = _EMULATION.get((accelerator, dtype))
        return None if probe is None else self._once(("emulation", accelerator, dtype), probe)

    def slow(self, accelerator: str, dtype: str) -> str | None:
        """Why ``dtype``, though it runs, is no gain on ``accelerator``; None where it is, or where nobody knows."""
        probe = _SLOW.get((accelerator, dtype))
        return None if probe is None else self._once(("slow", accelerator, dtype), probe)

    def quantized_error(self, accelerator: str, storage: str) -> str | None:
        """Why layers stored as ``storage`` ("nf4-dq") cannot run on ``accelerator``; None when they do."""
        missing = self._once(("bitsandbytes",), _no_bitsandbytes)
        if missing is not None:
            return missing
        return self._once(
            ("quantized", accelerator, storage), lambda: _quantized_error(self.device(accelerator), storage)
        )

    def device(self, accelerator: str) -> torch.device:
        """The torch device that stands for ``accelerator``: the current one where there are several."""
        import torch

        if accelerator == "cuda":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device(accelerator)

    def auto(self) -> str:
        """The accelerator that "auto" means here: the first of ``AUTO`` that is there."""
        return next(name for name in AUTO if self.missing(name) is None)

    def _once(self, question: tuple[str, ...], probe: Callable[[], T]) -> T:
        if question not in self._answers:
            self._answers[question] = probe()
        answer: T = self._answers[question]
        return answer


_machine = Machine()


def machine() -> Machine:
    """The machine that everything in this process asks."""
    return _machine


@contextlib.contextmanager
def pretend(other: Machine) -> Iterator[Machine]:
    """Let every question inside be answered by ``other``: for tests. The process's own machine is put back."""
    global _machine  # noqa: PLW0603  # the one place where it may change, and it is put back
    before, _machine = _machine, other
    try:
        yield other
    finally:
        _machine = before


def name_of(accelerator: object, where: str = "") -> str:
    """The plain name behind ``accelerator``: "auto" is resolved; a ``torch.device`` or "cuda:1" gives its type.

    Raises ``UnknownNameError`` with the nearest known name.
    """
    text = str(accelerator).strip().lower()
    kind, _, index = text.partition(":")
    if text == "auto":
        return machine().auto()
    if kind not in ACCELERATORS or (":" in text and not index.isdigit()):
        raise unknown_names("accelerator", [accelerator], ["auto", *ACCELERATORS], where, ELSEWHERE)
    return kind


def resolve(accelerator: object = "auto", where: str = "") -> torch.device:
    """The device for ``accelerator``: "auto", a name, a name with an index ("cuda:1") or a ``torch.device``.

    Raises ``UnknownNameError`` for a name that does not exist, ``UnsupportedError`` with the reason for a device that
    this machine does not have.
    """
    import torch

    name = name_of(accelerator, where)
    reason = machine().missing(name)
    if reason is not None:
        raise UnsupportedError(f"accelerator {name!r} cannot be used here: {reason}")
    text = str(accelerator).strip().lower()
    return torch.device(text) if ":" in text else machine().device(name)


def _no_cpu() -> None:
    return None


def _no_cuda() -> str | None:
    import torch

    if torch.cuda.is_available():
        return None
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch, or use the cpu"
    return "torch has CUDA, but finds no GPU (see nvidia-smi and CUDA_VISIBLE_DEVICES)"


def _no_mps() -> str | None:
    import torch

    if torch.backends.mps.is_available():
        return None
    if not torch.backends.mps.is_built():
        return "torch is built without MPS, which exists on Apple silicon only"
    return "this Mac has no usable Metal device, or its macOS is older than 14"


def _no_xpu() -> str | None:
    import torch

    if torch.xpu.is_available():
        return None
    return "torch finds no Intel GPU; it takes torch's XPU build and Intel's GPU driver"


def _no_xla() -> str | None:
    if importlib.util.find_spec("torch_xla") is None:
        return "the package torch_xla is not installed (pip install torch_xla, in the version of your torch)"
    try:
        import torch
        import torch_xla  # type: ignore[import-not-found]  # noqa: F401  # its import registers the device

        torch.ones(1, device="xla", dtype=torch.float32).cpu()
    except Exception as error:
        return f"torch_xla is installed, but its device does not work: {_first_line(error)}"
    return None


_MISSING: MappingProxyType[str, Callable[[], str | None]] = MappingProxyType(
    {"cpu": _no_cpu, "cuda": _no_cuda, "mps": _no_mps, "xpu": _no_xpu, "xla": _no_xla}
)


def _cuda_bfloat16() -> str | None:
    import torch

    if torch.cuda.is_bf16_supported(including_emulation=False):
        return None
    major, minor = torch.cuda.get_device_capability()
    return (
        f"{torch.cuda.get_device_name()} (compute capability {major}.{minor}) has no bfloat16 units, which came with "
        "8.0; torch computes in float32 and rounds"
    )


def _no_tf32_units(accelerator: str) -> str | None:
    from precision_runtime.tf32 import has_units, switches

    device = machine().device(accelerator)
    try:
        if switches(device.type) and has_units(device):
            return None
    except Exception as error:
        return f"{_NO_TF32} here: torch's switch for it does not work on {accelerator} ({_first_line(error)})"
    if accelerator != "cuda":
        return f"{_NO_TF32} because {accelerator} has no TF32 units that torch can switch on"
    import torch

    major, minor = torch.cuda.get_device_capability()
    return (
        f"{_NO_TF32} because {torch.cuda.get_device_name()} (compute capability {major}.{minor}) has no TF32 units, "
        "which came with 8.0"
    )


_NO_TF32 = "operands of each product are rounded to TF32's 10 bits beforehand,"


def _no_float8(accelerator: str, recipe: str) -> str | None:
    if accelerator != "cuda":
        return f"{_NO_FLOAT8} because NVIDIA's transformer_engine runs on CUDA GPUs alone, not on {accelerator}"
    import torch

    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (8, 9):
        return (
            f"{_NO_FLOAT8} because {torch.cuda.get_device_name()} (compute capability {major}.{minor}) has no FP8 "
            "units, which came with 8.9"
        )
    if importlib.util.find_spec("transformer_engine") is None:
        install = "pip install 'pytest-precision[transformer-engine]'"
        return f"{_NO_FLOAT8} because the package transformer_engine is not installed ({install})"
    try:
        te = importlib.import_module("transformer_engine.pytorch.fp8")
        works, reason = getattr(te.FP8GlobalStateManager, _FLOAT8[recipe])()
    except Exception as error:
        return f"{_NO_FLOAT8} because transformer_engine is installed, but does not work: {_first_line(error)}"
    return None if works else f"{_NO_FLOAT8} because transformer_engine cannot run {recipe} here: {reason}"


_NO_FLOAT8 = "operands of FP8 layers are rounded beforehand, their products summed in float32,"

# How transformer_engine is asked whether this GPU has what a recipe needs.
_FLOAT8 = MappingProxyType(
    {
        "DelayedScaling": "is_fp8_available",
        "Float8CurrentScaling": "is_fp8_available",
        "Float8BlockScaling": "is_fp8_block_scaling_available",
        "MXFP8BlockScaling": "is_mxfp8_available",
        "NVFP4BlockScaling": "is_nvfp4_available",
    }
)

_EMULATION: MappingProxyType[tuple[str, str], Callable[[], str | None]] = MappingProxyType(
    {
        ("cuda", "bfloat16"): _cuda_bfloat16,
        **{(name, "tf32"): partial(_no_tf32_units, name) for name in ACCELERATORS},
        **{(name, recipe): partial(_no_float8, name, recipe) for name in ACCELERATORS for recipe in _FLOAT8},
    }
)


_BITSANDBYTES = (0, 50)  # before, its 4-bit products took weights the other way round and no odd shapes


def _no_bitsandbytes() -> str | None:
    install = "pip install 'pytest-precision[bitsandbytes]'"
    if importlib.util.find_spec("bitsandbytes") is None:
        return f"the package bitsandbytes is not installed ({install})"
    version = importlib.metadata.version("bitsandbytes")
    if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < _BITSANDBYTES:
        needed = ".".join(map(str, _BITSANDBYTES))
        return f"bitsandbytes {version} is installed, and {needed} is the oldest that will do ({install})"
    return None


def _quantized_error(device: torch.device, storage: str) -> str | None:
    import torch

    try:
        from precision_runtime.layers.library import bnb, float32_tables

        # Zeros and ones are exact in every format, and so are their products. This is the first use of a device, for
        # which bitsandbytes keeps the tables that it makes.
        with _alone(), torch.no_grad(), torch.autocast(device.type, enabled=False), float32_tables():
            ones = torch.eye(64, device=device, dtype=torch.float32)
            if storage.startswith("int8"):
                half = ones.to(torch.float16)
                codes, scales, _ = bnb.functional.int8_vectorwise_quant(half)
                product = torch.ops.bitsandbytes.int8_scaled_mm.default(codes, codes, scales, scales)
            else:
                kind, _, nested = storage.partition("-")
                packed, state = bnb.functional.quantize_4bit(ones, quant_type=kind, compress_statistics=bool(nested))
                product = bnb.matmul_4bit(ones.to(torch.bfloat16), packed, quant_state=state)
            exact = torch.allclose(product.float(), ones, atol=0.0, rtol=1e-3)
    except Exception as error:
        return f"bitsandbytes does not compute in {storage} on {device.type}: {_first_line(error)}"
    return None if exact else f"bitsandbytes gives wrong results in {storage} on {device.type}"


def _cpu_bfloat16() -> str | None:
    import torch

    # Newer releases of torch tell it in a table, older ones in functions of the same facts.
    facts: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    units = [name for name in _BFLOAT16_INSTRUCTIONS if facts.get(name)]
    if units or (not facts and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())):
        return None
    return "this processor has no bfloat16 instructions (AVX-512 BF16, AMX, Arm BF16), so that float32 is faster"


_BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16")  # x86, then Arm

_SLOW: MappingProxyType[tuple[str, str], Callable[[], str | None]] = MappingProxyType(
    {("cpu", "bfloat16"): _cpu_bfloat16}
)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Without what the caller runs in: under fake tensors a product has no values, and every mode would seem broken."""
    import torch
    from torch.utils._python_dispatch import _disable_current_modes

    with torch.inference_mode(False), _disable_current_modes():
        yield


def _product_error(device: torch.device, dtype: str) -> str | None:
    import torch

    try:
        with _alone(), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            a = torch.ones(4, 8, device=device, dtype=getattr(torch, dtype), requires_grad=True)
            product = a @ a.T
            product.sum().backward()
            exact = bool((product.detach().cpu().double() == 8.0).all())  # 8 is exact in every format
    except Exception as error:
        return _first_line(error)
    return None if exact else "a product of ones gives a wrong result"


def _autocast_result(device: torch.device, dtype: str) -> str:
    import torch

    try:
        with warnings.catch_warnings(), _alone():
            warnings.simplefilter("ignore")  # "Disabling autocast": the result says it
            ones = torch.ones(4, 4, device=device, dtype=torch.float32)
            with torch.no_grad(), torch.autocast(device.type, dtype=getattr(torch, dtype)):
                return str((ones @ ones).dtype).removeprefix("torch.")
    except Exception as error:
        return _first_line(error)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
