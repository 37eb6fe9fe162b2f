"""How long the plan of a 200-million-parameter model takes, and how much memory beside the model.

    python benchmarks/plan.py [--rounds 5] [--json FILE]

A transformer of 16 blocks, width 1,024, on the CPU. The figure is the median; the peak is the largest resident set
while a plan is made, above the one before it (Linux only). Targets: 2 seconds, a tenth of the model's own size.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from precision_runtime.runtime import PrecisionRuntime

MODES = ("16-true", "bf16-true", "16-mixed", "transformer-engine", "nf4", "int8", "apex-O2")
SECONDS, SHARE = 2.0, 0.1
WIDTH, BLOCKS = 1024, 16


class Block(nn.Module):
    """The parameters of a transformer's block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)


def peak() -> int | None:
    """Bytes of the largest resident set since the last call, None where the system does not tell."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists():
        return None
    found = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    reset.write_text("5")
    return int(found.split()[1]) * 1024


def main() -> int:
    """Measure, print a table, return 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(BLOCKS)))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    table = Table(title=f"plan of {size // 4 / 1e6:.0f} million parameters; torch {torch.__version__}")
    for column in ("mode", "seconds", "with AdamW", "peak above the model, MB", "of its size"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    figures: dict[str, dict[str, float]] = {}
    for mode in MODES:
        runtime = PrecisionRuntime(mode, "cpu")
        runtime.plan(nn.Linear(64, 64))  # loads what the mode needs
        alone, both, above = [], [], 0
        for _ in range(options.rounds):
            peak()
            before = peak() or 0
            start = time.perf_counter()
            runtime.plan(model)
            alone.append(time.perf_counter() - start)
            above = max(above, (peak() or 0) - before)
            start = time.perf_counter()
            runtime.plan(model, optimizer)
            both.append(time.perf_counter() - start)
        row = {"seconds": statistics.median(alone), "with_optimizer": statistics.median(both), "above": above / size}
        figures[mode] = row
        cells = [f"{row['seconds']:.2f}", f"{row['with_optimizer']:.2f}", f"{above / 1e6:.0f}", f"{row['above']:.1%}"]
        table.add_row(mode, *cells)
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    slowest = max(max(row["seconds"], row["with_optimizer"]) for row in figures.values())
    largest = max(row["above"] for row in figures.values())
    good = slowest <= SECONDS and largest <= SHARE
    print(f"slowest {slowest:.2f} s of {SECONDS}, largest {largest:.1%} of {SHARE:.0%}: {'ok' if good else 'MISSED'}")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
