"""What a set-up model's forward costs beyond the arithmetic: Linear(8, 8), against torch itself and two peers.

    python benchmarks/forward_overhead.py [--rounds 200]

All contenders of a mode run in turns within each round, so that a slow second of the machine hits all of them. The
figure is the median over rounds of microseconds per forward; beside it the medians of the ratio to raw torch in the
same round and of the microseconds above it. Raw torch is ``torch.autocast`` around the call in the mixed modes, and in
the true ones a half module fed half inputs. A peer that is not installed is listed as such.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from precision_runtime.modes import MODES, Mode
from precision_runtime.runtime import PrecisionRuntime

CALLS = 50  # per contender and round: about a millisecond, well above the clock and below most interruptions

Forward = Callable[[torch.Tensor], torch.Tensor]


def plain(mode: Mode) -> Forward:
    """The float32 module with nothing around it."""
    return nn.Linear(8, 8)


def raw(mode: Mode) -> Forward:
    """What a user writes by hand."""
    model = nn.Linear(8, 8)
    dtype = getattr(torch, mode.compute)
    if not mode.autocast:
        model = model.to(dtype)
        # The input is cast and the output cast back, as every runtime does: only what they add is overhead.
        return lambda x: model(x.to(dtype)).to(x.dtype)

    def forward(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=dtype):
            y: torch.Tensor = model(x)
        return y

    return forward


def half_module(mode: Mode) -> Forward:
    """A half module on a half input: no casts at all."""
    dtype = getattr(torch, mode.compute)
    model = nn.Linear(8, 8).to(dtype)
    held: list[torch.Tensor] = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        if not held:
            held.append(x.to(dtype))
        y: torch.Tensor = model(held[0])
        return y

    return forward


def ours(mode: Mode) -> Forward:
    """A model set up by this package."""
    return PrecisionRuntime(mode, accelerator="cpu").setup(nn.Linear(8, 8))


def fabric(mode: Mode) -> Forward:
    """Lightning Fabric."""
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.precision import MixedPrecision

    # Given "16-mixed" on a CPU, Fabric runs bf16-mixed; the plugin, made by hand, runs what its name says.
    if mode.name == "16-mixed":
        runner = Fabric(accelerator="cpu", devices=1, plugins=MixedPrecision("16-mixed", "cpu"))
    else:
        runner = Fabric(accelerator="cpu", devices=1, precision=mode.name)
    model: Forward = runner.setup(nn.Linear(8, 8))
    return model


def accelerate(mode: Mode) -> Forward:
    """Hugging Face accelerate, mixed modes only."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    model: Forward = Accelerator(cpu=True, mixed_precision="bf16").prepare(nn.Linear(8, 8))
    return model


def contenders(mode: Mode) -> dict[str, Callable[[Mode], Forward] | str]:
    """Name to factory, or to the reason why it does not take part."""
    peers: dict[str, Callable[[Mode], Forward] | str] = {"raw torch": raw, "precision_runtime": ours}
    if not mode.autocast:
        peers = {"raw torch": half_module, "raw torch, casts by hand": raw, "precision_runtime": ours}
    peers["Lightning Fabric"] = fabric if importlib.util.find_spec("lightning") else "not installed"
    if mode.name == "bf16-mixed":
        peers["accelerate"] = accelerate if importlib.util.find_spec("accelerate") else "not installed"
    elif mode.name == "16-mixed":
        peers["accelerate"] = "on a CPU it runs float32"
    return {"plain float32": plain, **peers}


def measure(forwards: dict[str, Forward], rounds: int) -> dict[str, list[float]]:
    """Microseconds per call for each round, contenders taking turns."""
    x = torch.ones(4, 8)
    times: dict[str, list[float]] = {name: [] for name in forwards}
    for number in range(rounds + 2):
        for name, forward in forwards.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                forward(x)
            if number >= 2:  # two rounds to warm up
                times[name].append((time.perf_counter() - start) / CALLS * 1e6)
    return times


def main() -> None:
    """Measure, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=200)
    rounds: int = parser.parse_args().rounds
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)

    table = Table(title=f"forward of Linear(8, 8), with gradients, on the CPU; torch {torch.__version__}")
    table.add_column("mode", no_wrap=True)
    table.add_column("contender", no_wrap=True)
    for column in ("µs", "ratio to raw", "µs above raw"):
        table.add_column(column, justify="right")
    for name in ("bf16-mixed", "16-mixed", "bf16-true", "16-true"):
        entries = contenders(MODES[name])
        times = measure({n: make(MODES[name]) for n, make in entries.items() if callable(make)}, rounds)
        base = times["raw torch"]
        for who, entry in entries.items():
            if isinstance(entry, str):
                table.add_row(name, who, f"[yellow]{entry}[/yellow]", "", "")
            else:
                pairs = list(zip(times[who], base, strict=True))
                ratio = statistics.median(a / b for a, b in pairs)
                above = statistics.median(a - b for a, b in pairs)
                table.add_row(name, who, f"{statistics.median(times[who]):.1f}", f"{ratio:.2f}", f"{above:+.1f}")
        table.add_section()
    Console().print(table)


if __name__ == "__main__":
    main()
