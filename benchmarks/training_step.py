"""What the runtime adds to a training step: a 4-layer, 256-wide transformer, against the same loop written by hand.

    python benchmarks/training_step.py [--rounds 60] [--threads 1]

Both contenders of a mode train equal models on the same batch, in turns within each round, so that a slow second of
the machine hits both. A step is zero_grad, forward, loss, backward, clipping by norm and AdamW. The figure is the
median over rounds of the ratio of the two times in the same round. The hand-written loop is what torch's documentation
shows: autocast and ``GradScaler`` in 16-mixed, autocast in bf16-mixed, ``model.to(dtype)`` with inputs cast in the true
modes. CPUs without float16 products take seconds for a step in 16-true and 16-mixed: ``--batch 1 --tokens 16`` there.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from precision_runtime.modes import MODES, Mode
from precision_runtime.runtime import PrecisionRuntime

NATIVE = ("32-true", "64-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed")
WIDTH, LAYERS = 256, 4
LIMIT = 1.02

Step = Callable[[], None]


def network() -> nn.Module:
    """A transformer encoder and a head, the same at each call."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
    return nn.Sequential(encoder, nn.Linear(WIDTH, WIDTH))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with an eps that float16 can hold."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, eps=1e-4)


def ours(mode: Mode, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Step:
    """The loop with the runtime's verbs."""
    rt = PrecisionRuntime(mode, accelerator="cpu")
    model, optimizer = rt.setup(model, adamw(model))

    def step() -> None:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y.to(torch.float64) if mode.params == "float64" else y)
        rt.backward(loss)
        rt.clip_gradients(optimizer, max_norm=1.0)
        rt.step(optimizer)

    return step


def by_hand(mode: Mode, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Step:
    """The loop as a user writes it with torch alone."""
    dtype, compute = getattr(torch, mode.params), getattr(torch, mode.compute)
    model = model.to(dtype)
    optimizer = adamw(model)
    target = y.to(torch.float64) if mode.params == "float64" else y
    scaler = torch.amp.GradScaler("cpu", enabled=mode.scaled)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=compute, enabled=mode.autocast):
            out = model(x.to(dtype))
        loss = nn.functional.mse_loss(out.to(target.dtype), target)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    return step


def measure(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Milliseconds per step, per round and contender; who goes first changes from round to round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 3):
        order = list(steps) if number % 2 else list(reversed(steps))
        for name in order:
            start = time.perf_counter()
            steps[name]()
            if number >= 3:  # three rounds to warm up
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def main() -> None:
    """Measure, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--modes", nargs="*", default=NATIVE)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(options.batch, options.tokens, WIDTH, generator=generator) for _ in range(2))

    table = Table(title=f"a training step, {LAYERS} layers of width {WIDTH}, on the CPU; torch {torch.__version__}")
    for column in ("mode", "by hand, ms", "ours, ms", "ratio", f"≤ {LIMIT}"):
        table.add_column(column, justify="right", no_wrap=True)
    for name in options.modes:
        mode, model = MODES[name], network()
        steps = {
            "ours": ours(mode, copy.deepcopy(model), x, y),
            "by hand": by_hand(mode, copy.deepcopy(model), x, y),
        }
        times = measure(steps, options.rounds)
        ratio = statistics.median(a / b for a, b in zip(times["ours"], times["by hand"], strict=True))
        medians = [f"{statistics.median(times[who]):.1f}" for who in ("by hand", "ours")]
        table.add_row(name, *medians, f"{ratio:.3f}", "[green]yes" if ratio <= LIMIT else "[red]no")
    Console().print(table)


if __name__ == "__main__":
    main()
