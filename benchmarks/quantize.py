"""What it takes to put a model of 200 million parameters into 4 or 8 bits, against bitsandbytes' own quantising.

    python benchmarks/quantize.py [--modes nf4 nf4-dq int8] [--width 4096] [--layers 12] [--rounds 3] [--json FILE]

Time: ``setup`` of the model, over the library's quantising functions called on the same float32 weights one by one, in
turns; the figure is the median ratio, the target at most 1.1. Memory: the largest resident size while ``init_module``
makes the model, in a process of its own and above what the libraries take; the target is what the quantised model
takes, plus one layer in float32, plus 15%.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from precision_runtime.layers import quantized_layers
from precision_runtime.runtime import PrecisionRuntime

MODES = ("nf4", "nf4-dq", "int8")
RATIO = 1.1
SLACK = 1.15


def main() -> int:
    """Measure, print a table, return 1 where a target is missed."""
    options = parse()
    if options.worker:
        print(json.dumps(made(options.worker, options)))
        return 0
    rows = [{"mode": mode, **swap(mode, options), **in_process(mode, options)} for mode in options.modes]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return show(rows, options)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--modes", nargs="+", default=MODES)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


class Net(nn.Module):
    """Big linear layers and nothing else, initialised a second time as models do."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        for weight in self.weights():
            nn.init.normal_(weight, std=0.02)

    def weights(self) -> list[nn.Parameter]:
        """Those of the layers, each of shape (width, width)."""
        return [p for name, p in self.named_parameters() if name.endswith("weight")]


def swap(mode: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of ``setup`` and of the library alone, and their ratio."""
    from precision_runtime.layers.library import bnb

    def library(weight: torch.Tensor) -> object:
        if mode == "int8":
            return bnb.functional.int8_vectorwise_quant(weight.to(torch.float16))  # it takes nothing else
        kind, _, nested = mode.partition("-")
        return bnb.functional.quantize_4bit(weight, quant_type=kind, compress_statistics=bool(nested))

    rt = PrecisionRuntime(mode, "cpu")
    rt.setup(nn.Linear(64, 64))
    ours, theirs = [], []
    for _ in range(options.rounds + 1):  # the first warms up
        model = Net(options.width, options.layers)
        start = time.perf_counter()
        kept = [library(weight.detach()) for weight in model.weights()]
        theirs.append(time.perf_counter() - start)
        del kept
        start = time.perf_counter()
        rt.setup(model)
        ours.append(time.perf_counter() - start)
        del model
        gc.collect()
    ratio = statistics.median(a / b for a, b in zip(ours[1:], theirs[1:], strict=True))
    return {"setup": statistics.median(ours[1:]), "library": statistics.median(theirs[1:]), "ratio": ratio}


def in_process(mode: str, options: argparse.Namespace) -> dict[str, Any]:
    """What ``made`` says in a process of its own."""
    sizes = ["--width", str(options.width), "--layers", str(options.layers)]
    command = [sys.executable, __file__, "--worker", mode, *sizes]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def made(mode: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and bytes of making the model in ``init_module``, and the bytes that are allowed."""
    rt = PrecisionRuntime(mode, "cpu")
    with rt.init_module():  # everything that is loaded late is loaded
        Net(256, 2)
    gc.collect()
    before, peak, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    with rt.init_module():
        model = Net(options.width, options.layers)
    seconds = time.perf_counter() - start
    done.set()
    thread.join()
    parts = quantized_layers(model).values()
    stored = sum(part.stored_bits() // 8 + part.bias.nbytes for part in parts)
    return {
        "make": seconds,
        "peak": peak - before,
        "stored": stored,
        "allowed": SLACK * (stored + 4 * options.width**2),
    }


def resident() -> int:
    """Bytes of this process in memory (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def show(rows: list[dict[str, Any]], options: argparse.Namespace) -> int:
    """Print the table; 1 where a target is missed."""
    count = options.layers * options.width**2 / 1e6
    table = Table(title=f"{count:.0f} million parameters in layers of {options.width} by {options.width}")
    titles = ("mode", "setup s", "library s", f"ratio (≤ {RATIO})", "make s", "peak MB", "stored MB", "allowed MB")
    for title in titles:
        table.add_column(title, justify="left" if title == "mode" else "right")
    missed = 0
    for row in rows:
        missed += row["ratio"] > RATIO or row["peak"] > row["allowed"]
        megabytes = [f"{row[name] / 1e6:.0f}" for name in ("peak", "stored", "allowed")]
        times = [f"{row['setup']:.2f}", f"{row['library']:.2f}", f"{row['ratio']:.2f}", f"{row['make']:.2f}"]
        table.add_row(row["mode"], *times, *megabytes)
    Console().print(table)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
