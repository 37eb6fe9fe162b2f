"""What a ledger adds to a training step of a small transformer, and that a step without one is untouched.

    python benchmarks/ledger.py [--rounds 15] [--json FILE]

4 layers, width 256, batch 8, sequence 128, SGD, on the CPU. Steps with the ledger on, off, and off before any ledger
was ever used run in turns within each round; the figure is the median over rounds of the ratio within a round. Targets:
on at most 1.3, off no more than the same step against itself (whose spread is shown).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from precision_runtime.runtime import PrecisionRuntime

MODES = ("32-true", "bf16-true", "bf16-mixed")
TARGET = 1.3
VOCABULARY, WIDTH, LAYERS, BATCH, LENGTH = 512, 256, 4, 8, 128


class Transformer(nn.Module):
    """A language model without a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, batch_first=True) for _ in range(LAYERS))
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits."""
        logits: torch.Tensor = self.head(self.blocks(self.embed(ids)))
        return logits


def training_step(mode: str) -> tuple[PrecisionRuntime, Callable[[AbstractContextManager[Any]], None]]:
    """A runtime, and one step of a model in it inside a context."""
    torch.manual_seed(0)
    runtime = PrecisionRuntime(mode, "cpu")
    model = Transformer()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    runtime.setup(model, optimizer)
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH))

    def step(context: AbstractContextManager[Any]) -> None:
        with context:
            loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
            runtime.backward(loss)
            runtime.step(optimizer)
            optimizer.zero_grad()

    return runtime, step


def measure(mode: str, rounds: int) -> dict[str, list[float]]:
    """Seconds per step, each contender in each round."""
    runtime, step = training_step(mode)
    _, fresh = training_step(mode)  # its runtime makes no ledger
    contenders: dict[str, Callable[[], None]] = {
        "never": lambda: fresh(nullcontext()),
        "off": lambda: step(nullcontext()),
        "off again": lambda: step(nullcontext()),
        "on": lambda: step(runtime.ledger()),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 2):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if number >= 2:  # two rounds to warm up
                times[name].append(time.perf_counter() - start)
    return times


def main() -> int:
    """Measure, print a table, return 1 where the target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    table = Table(title=f"one step with a ledger against one without; torch {torch.__version__}")
    for column in ("mode", "ms without", "on / off", "off / never", "off / off again"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    ratios: dict[str, dict[str, float]] = {}
    for mode in MODES:
        times = measure(mode, options.rounds)

        def ratio(a: str, b: str, times: dict[str, list[float]] = times) -> float:
            return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))

        ratios[mode] = {"on": ratio("on", "off"), "off": ratio("off", "never"), "spread": ratio("off", "off again")}
        cells = [f"{ratios[mode][k]:.3f}" for k in ("on", "off", "spread")]
        table.add_row(mode, f"{statistics.median(times['off']) * 1e3:.0f}", *cells)
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(ratios, indent=1))
    worst = max(r["on"] for r in ratios.values())
    print(f"worst ratio {worst:.3f}, target at most {TARGET}: {'ok' if worst <= TARGET else 'MISSED'}")
    return int(worst > TARGET)


if __name__ == "__main__":
    sys.exit(main())
