"""What the FP8 emulation costs: forward and backward of a Linear against the same Linear in float32.

    OMP_NUM_THREADS=2 python benchmarks/float8.py [--width 1024] [--rows 256] [--rounds 40]

All contenders run in turns within each round, so that a slow second of the machine hits all of them. The figure is the
median over rounds of the ratio to float32 in the same round; beside it the fastest run of each, in milliseconds. The
weights are bfloat16, as in the mode; the history of delayed scaling has been filled before.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from precision_runtime.float8.layers import become_float8
from precision_runtime.float8.recipes import RECIPES


def once(layer: nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> float:
    """Milliseconds of one forward and backward."""
    layer.zero_grad()
    x.grad = None
    start = time.perf_counter()
    layer(x).backward(gradient)
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    """Measure, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    width, rows, rounds = arguments.width, arguments.rows, arguments.rounds

    torch.manual_seed(0)
    plain = nn.Linear(width, width)
    layers: dict[str, nn.Module] = {"float32": plain}
    for name in RECIPES:
        layers[name] = become_float8(nn.Linear(width, width).to(torch.bfloat16), name)
    x, gradient = torch.randn(rows, width), torch.randn(rows, width)
    times: dict[str, list[float]] = {name: [] for name in layers}
    for number in range(rounds + 3):
        for name, layer in layers.items():
            dtype = torch.float32 if name == "float32" else torch.bfloat16
            took = once(layer, x.to(dtype).requires_grad_(), gradient.to(dtype))
            if number >= 3:  # three rounds to warm up, and for the scales to settle
                times[name].append(took)

    table = Table(title=f"Linear({width}, {width}), {rows} rows, forward and backward; torch {torch.__version__}")
    table.add_column("layer")
    for column in ("ms, fastest", "ratio to float32, median"):
        table.add_column(column, justify="right")
    for name, found in times.items():
        ratio = statistics.median(a / b for a, b in zip(found, times["float32"], strict=True))
        table.add_row(name, f"{min(found):.1f}", f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
