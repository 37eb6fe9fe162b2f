"""Can this machine run a mode on an accelerator, and how: natively, by emulation, or not at all. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Literal

from precision_runtime.accelerators import Machine, machine, name_of
from precision_runtime.automatic import placed
from precision_runtime.float8.recipes import parse_recipe
from precision_runtime.modes import Mode, parse_mode

Status = Literal["native", "emulated", "unsupported"]


@dataclass(frozen=True)
class Support:
    """How a mode runs on an accelerator, and why. ``reason`` is for people and says what to do where it does not.

    ``mode`` is the name that was asked for, "auto" too; ``runs`` says in a word what it becomes here, empty where it is
    what its name says.
    """

    mode: str
    accelerator: str
    status: Status
    reason: str
    runs: str = ""

    @property
    def ok(self) -> bool:
        """Whether the mode can run at all."""
        return self.status != "unsupported"

    def __str__(self) -> str:
        what = f"{self.mode} (as {self.runs})" if self.runs else self.mode
        return f"{what} on {self.accelerator}: {self.status} ({self.reason})"


def support(mode: object, accelerator: object = "auto", recipe: object = None) -> Support:
    """Say whether this machine runs ``mode`` on ``accelerator``, found by trying it; a bad answer is no exception.

    ``recipe``: of the FP8 modes, since GPUs differ in those that they have units for. The probes run once per process.
    Raises ``UnknownNameError`` for names that do not exist.
    """
    name = name_of(accelerator)
    asked = parse_mode(mode)
    missing = machine().missing(name)
    if missing is not None:
        return Support(asked.name, name, "unsupported", missing)
    place = placed(asked, name)
    status, reason = _answer(place.mode, name, recipe)
    return Support(asked.name, name, status, "; ".join(filter(None, (place.reason, reason))), place.runs)


def _answer(mode: Mode, name: str, recipe: object) -> tuple[Status, str]:
    here = machine()
    checks: tuple[Check, ...] = (*_CHECKS, partial(_float8, recipe))
    for check in checks:
        answer = check(here, mode, name)
        if answer is not None:
            return answer
    what = f"{mode.compute} autocast" if mode.autocast else f"{mode.compute} arithmetic"
    return "native", f"{what} was tried on this machine and works"


Check = Callable[[Machine, Mode, str], "tuple[Status, str] | None"]


def _offered(here: Machine, mode: Mode, name: str) -> tuple[Status, str] | None:
    reason = _REFUSED.get((name, mode.products or mode.params))
    return None if reason is None else ("unsupported", reason)


_REFUSED = MappingProxyType(
    {
        # XLA on a processor has it; no device of the kind does.
        ("xla", "float64"): "TPUs have no float64: run 64-true with accelerator='cpu'",
        ("xla", "tf32"): "XLA chooses the precision of its products by itself and cannot look at a float's bits, which "
        "the emulation of TF32 takes: run tf32 with accelerator='cpu'",
    }
)


def _arithmetic(here: Machine, mode: Mode, name: str) -> tuple[Status, str] | None:
    for dtype in dict.fromkeys((mode.params, mode.compute)):
        error = here.product_error(name, dtype)
        if error is not None:
            advice = _ADVICE.get((name, dtype), "choose another mode or accelerator")
            return "unsupported", f"{name} cannot compute in {dtype} ({error}); {advice}"
    return None


def _autocasts(here: Machine, mode: Mode, name: str) -> tuple[Status, str] | None:
    if not mode.autocast:
        return None
    result = here.autocast_result(name, mode.compute)
    if result == mode.compute:
        return None
    return (
        "unsupported",
        f"autocast to {mode.compute} takes no effect on {name}: a product that should be {mode.compute} gave {result}; "
        "use a true mode, or another accelerator",
    )


def _quantizes(here: Machine, mode: Mode, name: str) -> tuple[Status, str] | None:
    reason = here.quantized_error(name, mode.weights) if mode.family == "quantized" else None
    return None if reason is None else ("unsupported", reason)


def _emulated(here: Machine, mode: Mode, name: str) -> tuple[Status, str] | None:
    for what in dict.fromkeys((mode.compute, "tf32" if mode.products == "tf32" else mode.compute)):
        reason = here.emulation(name, what)
        if reason is not None:
            return "emulated", reason
    return None


def _float8(recipe: object, here: Machine, mode: Mode, name: str) -> tuple[Status, str] | None:
    if mode.family != "float8":
        return None
    parsed = type(parse_recipe(recipe)).__name__
    reason = here.emulation(name, parsed)
    if reason is not None:
        return "emulated", reason
    return "native", f"NVIDIA's transformer_engine runs {parsed} on this GPU"


_CHECKS: tuple[Check, ...] = (_offered, _arithmetic, _autocasts, _quantizes, _emulated)

_ADVICE = MappingProxyType(
    {
        ("mps", "float64"): "Metal has no float64: run 64-true with accelerator='cpu'",
        ("mps", "bfloat16"): "bfloat16 takes macOS 14 and an M-series chip: use a float16 mode, or accelerator='cpu'",
    }
)
