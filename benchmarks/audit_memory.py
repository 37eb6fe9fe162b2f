"""What an audit adds to a process's memory at its peak, against the size of what is judged.

    python benchmarks/audit_memory.py [--model mlp] [--json FILE]

The yardstick is the model as the user gave it (parameters and buffers, in float32) plus the largest single activation
of its FP64 reference, both in bytes. The peak is that of resident memory over what the process had before the audit,
in a process of its own for each line. Beside it stands the peak of one plain run of the model in FP64, forward or
forward and backward, which no audit can do without. Models: layers of many parameters (mlp), a GPT-2 of 6 layers and
width 256 (gpt2), convolutions with large activations (conv), each in bf16-true, forward only and with gradients. Linux
only.
The C library is told to give freed blocks of 1 MB and more back at once (MALLOC_MMAP_THRESHOLD_): by default it keeps
what it thinks will be asked for again, and the figure would be its habit, not the audit's need.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from precision_runtime import audit

WANTED = 3.0
STATUS = Path("/proc/self/status")
GIVING_BACK = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}


def mlp() -> tuple[nn.Module, dict[str, Any]]:
    """8 layers of width 2048 (34 million parameters), batch 16."""
    layers = [part for _ in range(8) for part in (nn.Linear(2048, 2048), nn.GELU())]
    return nn.Sequential(*layers), {"input": torch.randn(16, 2048)}


def gpt2() -> tuple[nn.Module, dict[str, Any]]:
    """The model of audit_cost.py (6 million parameters), batch 4, sequence 128."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=256, n_layer=6, n_head=4, n_positions=128, vocab_size=5000, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).train(False), {"input_ids": torch.randint(5000, (4, 128))}


def conv() -> tuple[nn.Module, dict[str, Any]]:
    """8 convolutions of 32 channels with batch norms (0.07 million parameters), on 4 images of 128 x 128."""
    parts = [
        part
        for i in range(8)
        for part in (nn.Conv2d(3 if i == 0 else 32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
    ]
    return nn.Sequential(*parts).eval(), {"input": torch.randn(4, 3, 128, 128)}


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {"mlp": mlp, "gpt2": gpt2, "conv": conv}


def main() -> int:
    """Measure each line in a process of its own, print a table, return 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=sorted(MODELS))
    parser.add_argument("--one", choices=["forward", "gradients"], help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.one:
        print(json.dumps((plain if options.plain else measure)(options.model, options.one == "gradients")))
        return 0
    rows: list[dict[str, Any]] = []
    for model in [options.model] if options.model else list(MODELS):
        for how in ("forward", "gradients"):
            found: dict[str, float] = {}
            for option in ([], ["--plain"]):
                command = [sys.executable, __file__, "--model", model, "--one", how, *option]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=GIVING_BACK)
                found |= json.loads(done.stdout.splitlines()[-1])
            rows.append({"model": model, "how": how, **found})
    print(
        f"{'model':8} {'audit':10} {'model MB':>9} {'largest MB':>11} {'all MB':>8} {'plain MB':>9} {'peak MB':>8} "
        f"{'ratio':>7}"
    )
    for row in rows:
        verdict = "ok" if row["ratio"] <= WANTED else "MISSED"
        print(
            f"{row['model']:8} {row['how']:10} {row['model_mb']:9.1f} {row['largest_mb']:11.1f} {row['all_mb']:8.1f} "
            f"{row['plain_mb']:9.1f} {row['peak_mb']:8.1f} {row['ratio']:6.2f} x  wanted at most {WANTED:g}   {verdict}"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return int(any(row["ratio"] > WANTED for row in rows))


def measure(name: str, gradients: bool) -> dict[str, float]:
    """Audit one model and say what memory was needed, in MB (10^6 bytes)."""
    warm_up()
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    largest, everything = activations(model, inputs)
    before = resident()
    audit(model, mode="bf16-true", kwargs=inputs, gradients=gradients)
    added = resident(peak=True) - before
    return {
        "model_mb": size / 1e6, "largest_mb": largest / 1e6, "all_mb": everything / 1e6, "peak_mb": added / 1e6,
        "ratio": added / (size + largest),
    }  # fmt: skip


def plain(name: str, gradients: bool) -> dict[str, float]:
    """Run a copy of one model in FP64, without any audit, and say what memory that needs beside the model's, in MB."""
    warm_up()
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    before = resident()
    wide = copy.deepcopy(model).double()
    given = {key: t.double() if t.is_floating_point() else t for key, t in inputs.items()}
    with torch.set_grad_enabled(gradients):
        result = wide(**given)
        first = result if isinstance(result, torch.Tensor) else next(iter(result.values()))
        if gradients:
            first.sum().backward()
    return {"plain_mb": (resident(peak=True) - before) / 1e6}


def warm_up() -> None:
    """Load what an audit loads, and build its tables."""
    small = nn.Sequential(nn.Linear(8, 8), nn.GELU())
    audit(small, torch.randn(64, 8), mode="bf16-true")


def activations(model: nn.Module, inputs: dict[str, Any]) -> tuple[int, int]:
    """Bytes in FP64 of the largest result of any module, and of all results together."""
    sizes: list[int] = []

    def note(module: nn.Module, args: Any, result: Any) -> None:
        first = (
            result
            if isinstance(result, torch.Tensor)
            else next(iter(result.values() if isinstance(result, dict) else result))
        )
        sizes.append(first.numel() * 8)

    handles = [m.register_forward_hook(note) for m in model.modules()]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return max(sizes), sum(sizes)


def resident(peak: bool = False) -> int:
    """Bytes of this process that are in memory: now (from here on a new peak counts), or at the peak since then."""
    wanted = "VmHWM:" if peak else "VmRSS:"
    if not peak:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(wanted))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
