"""How often a lane's headroom differs where nothing was changed: what a baseline of whole powers of two has to stand.

Small modules get inputs of many sizes, so that their edges lie anywhere between two powers of two, and each is measured
with other kernels, as other machines have them, and with more threads. The seed is the same, as in a baseline.

    python benchmarks/headroom_margin.py [--seeds 1]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable

import torch
from baseline_margin import KERNELS
from torch import nn

from precision_runtime import headroom

MODES = ("16-true", "16-mixed", "bf16-true")
SIZES = (1.3, 7.1, 29.0, 110.0)  # standard deviations of the inputs


class Attention(nn.Module):
    """Scores of one head, scaled after the product."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One call."""
        return torch.softmax(self.query(x) @ self.key(x).mT * 0.125, -1)


class Variance(nn.Module):
    """E[x²] - E[x]²: what ends its room is instability, not range."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One call."""
        return x.square().mean(-1) - x.mean(-1).square()


class Angles(nn.Module):
    """Steeper the larger its inputs are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One call."""
        return torch.cos(x)


class Energy(nn.Module):
    """A sum of squares."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One call."""
        return x.square().sum(-1).sqrt()


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "attention": Attention,
    "perceptron": lambda: nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)),
    "angles": lambda: nn.Sequential(nn.Linear(64, 64), Angles(), nn.Linear(64, 8)),
    "variance": lambda: nn.Sequential(nn.Linear(64, 64), Variance()),
    "energy": lambda: nn.Sequential(nn.Linear(64, 64), Energy()),
    "transformer": lambda: nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True),
}


def measured(seeds: int) -> dict[str, int]:
    """The bits of every lane, by its name."""
    found = {}
    for seed in range(seeds):
        for name, make in MAKERS.items():
            for size in SIZES:
                for mode in MODES:
                    torch.manual_seed(seed)
                    module, x = make(), size * torch.randn(4, 16, 64)
                    lane = f"{name} {mode} size {size} seed {seed}"
                    found[lane] = headroom(module, x, mode=mode, gradients=False, limit=12).bits
    return found


def main() -> None:
    """Measure under each set of kernels, in a process of its own, and count the differences."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(options.seeds)))
        return
    runs = {}
    for kernels, environment in KERNELS.items():
        command = [sys.executable, __file__, "--one", f"--seeds={options.seeds}"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**os.environ, **environment})
        runs[kernels] = json.loads(done.stdout)
    usual = runs["as they are"]
    for kernels, bits in runs.items():
        changes = Counter(bits[lane] - usual[lane] for lane in usual)
        print(f"{kernels}: {len(bits)} lanes; changes in bits: {dict(sorted(changes.items()))}")
        for lane in usual:
            if bits[lane] != usual[lane]:
                print(f"  {lane}: {usual[lane]} -> {bits[lane]}")
    print("bits of headroom as they are:", dict(sorted(Counter(usual.values()).items())))


if __name__ == "__main__":
    main()
