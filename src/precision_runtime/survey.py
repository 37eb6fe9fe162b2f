"""Every mode on every accelerator of a machine: how it runs here, beside what others' documents promised.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from precision_runtime.accelerators import ACCELERATORS, machine
from precision_runtime.capability import Support, support
from precision_runtime.modes import GROUPS, MODES, Mode

_NO_GPU_NEEDED = MappingProxyType({"cpu": "yes", "cuda": "yes", "xla": "yes"})
_GPU_ONLY = MappingProxyType({"cpu": "no", "cuda": "yes", "xla": "no"})

# PyTorch Lightning's documentation of its precision modes (1.6 to 2.6). It says nothing of other accelerators, and
# nothing of 16-true, bf16-true and TF32.
PROMISED: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "32-true": _NO_GPU_NEEDED,
        "64-true": MappingProxyType({"cpu": "yes", "cuda": "yes", "xla": "no"}),
        "16-mixed": _GPU_ONLY,
        "bf16-mixed": _NO_GPU_NEEDED,
        **{name: MappingProxyType({**_GPU_ONLY, "cuda": "Linux"}) for name in GROUPS["quantized"]},
        **{name: MappingProxyType({**_GPU_ONLY, "cuda": "Hopper"}) for name in GROUPS["fp8"]},
        **dict.fromkeys(GROUPS["apex"], _GPU_ONLY),
    }
)


@dataclass(frozen=True)
class Entry:
    """A mode on an accelerator; ``promised`` is the documents' word, empty where they have none."""

    support: Support
    promised: str

    def to_dict(self) -> dict[str, str | bool]:
        """Builtins only."""
        here = self.support
        return {
            "mode": here.mode,
            "accelerator": here.accelerator,
            "status": here.status,
            "ok": here.ok,
            "runs": here.runs or here.mode,
            "reason": here.reason,
            "promised": self.promised,
        }


def present() -> list[str]:
    """The accelerators that this machine has, the default one first."""
    here = machine()
    found = [name for name in ACCELERATORS if here.missing(name) is None]
    return list(dict.fromkeys((here.auto(), *found)))


def survey(modes: Iterable[Mode] = tuple(MODES.values()), accelerators: Iterable[str] = ACCELERATORS) -> list[Entry]:
    """An entry for each of ``modes`` on each of ``accelerators``, by mode."""
    names = list(accelerators)
    return [Entry(support(mode, name), PROMISED.get(mode.name, {}).get(name, "")) for mode in modes for name in names]
