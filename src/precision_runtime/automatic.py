"""Where a mode's name leaves something to the accelerator: "auto", and half on XLA. Imports no torch.

``auto`` is bf16-mixed wherever bfloat16 has units: it has float32's range, so that nothing over- or underflows that did
not before, and no loss scaler is needed. Where it has none, 16-mixed on a GPU; on a processor float16 products are
slower than float32's (measured: 100 times for a plain product), so there it is 32-true. The choice rests on probes,
never on timings: the same machine and torch always choose the same. ``PrecisionRuntime.state_dict`` records it.

On XLA "16" always meant bfloat16, the only half format of TPUs (PyTorch Lightning's documentation, 1.x: "When using
TPUs, setting precision=16 will enable bfloat16"). The mode keeps its name there and says what it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from precision_runtime.accelerators import Machine, machine
from precision_runtime.modes import AUTO, MODES, Mode

_CANDIDATES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "cpu": ("bf16-mixed",),
        "cuda": ("bf16-mixed", "16-mixed"),
        "xpu": ("bf16-mixed", "16-mixed"),
        "mps": ("bf16-mixed", "16-mixed"),
        "xla": ("bf16-mixed",),
    }
)
_FALLBACK = "32-true"


@dataclass(frozen=True)
class Placed:
    """A mode as it runs on an accelerator.

    ``runs``: what it became, in a word, empty where it is the mode that was named; ``reason``: why, as a sentence.
    """

    mode: Mode
    runs: str = ""
    reason: str = ""


def placed(mode: Mode, accelerator: str) -> Placed:
    """``mode`` on ``accelerator`` (a plain name): "auto" chosen, half on XLA replaced, everything else as it is."""
    if mode == AUTO:
        mode, why = _chosen(machine(), accelerator)
        return Placed(mode, mode.name, f"auto chose {mode}: {why}")
    if accelerator == "xla" and mode.family in _HALF_ON_XLA and "float16" in (mode.params, mode.compute):
        half = {"float16": "bfloat16"}
        mode = replace(
            mode, params=half.get(mode.params, mode.params), compute=half.get(mode.compute, mode.compute), scaled=False
        )
        return Placed(
            mode, "bfloat16", f"{mode} runs in bfloat16 on xla, as ever: TPUs have no float16. No loss scaler is needed"
        )
    return Placed(mode)


_HALF_ON_XLA = ("true", "mixed", "apex")


def _chosen(here: Machine, accelerator: str) -> tuple[Mode, str]:
    """The first candidate that runs natively, and why; with it, why those before it do not."""
    against: list[str] = []
    for name in _CANDIDATES[accelerator]:
        mode = MODES[name]
        reason = _drawback(here, mode, accelerator)
        if reason is None:
            return mode, "; ".join([_FOR[name].format(accelerator), *against])
        against.append(f"not {name}, because {reason}")
    return MODES[_FALLBACK], "; ".join(against)


_FOR: Mapping[str, str] = MappingProxyType(
    {
        "bf16-mixed": "{} computes in bfloat16 natively, which has float32's range and needs no loss scaler",
        "16-mixed": "{} computes in float16 natively",
    }
)


def _drawback(here: Machine, mode: Mode, accelerator: str) -> str | None:
    """Why ``mode`` is not worth choosing on ``accelerator``; None where it runs natively and fast."""
    missing = here.missing(accelerator)
    if missing is not None:
        return missing
    error = here.product_error(accelerator, mode.compute)
    if error is not None:
        return f"{accelerator} cannot compute in {mode.compute} ({error})"
    result = here.autocast_result(accelerator, mode.compute)
    if result != mode.compute:
        return f"autocast to {mode.compute} takes no effect there"
    return here.emulation(accelerator, mode.compute) or here.slow(accelerator, mode.compute)
