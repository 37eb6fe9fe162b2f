"""Train a small transformer on the sources of Python's own standard library, in the mode that is asked for outside.

    python examples/training/train.py --steps 100                                            in float32
    precision-runtime run --precision bf16-mixed examples/training/train.py --steps 100      in any mode

``PrecisionRuntime()`` below names no mode. The rest is a plain training loop.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from precision_runtime import PrecisionRuntime

MODULES = ("argparse", "ast", "dataclasses", "datetime", "inspect", "pathlib", "statistics", "textwrap", "typing")
LETTERS, CONTEXT, WIDTH, HEADS, LAYERS = 128, 64, 96, 4, 2
ROUGHLY_THE_END = 64  # steps whose mean is called the final loss: single batches differ by more than modes do


@functools.cache
def text() -> torch.Tensor:
    """Sources that every Python brings along, as the numbers of their ASCII characters."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [folder / f"{name}.py" for name in MODULES]
    joined = "".join(path.read_text(encoding="utf-8") for path in files if path.is_file())
    return torch.tensor([number for number in joined.encode("ascii", "replace") if number < LETTERS])


def batches(seed: int, steps: int, size: int = 16) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pieces of the text from random places, and what follows each character."""
    source, drawn = text(), random.Random(seed)
    for _ in range(steps):
        starts = [drawn.randrange(len(source) - CONTEXT - 1) for _ in range(size)]
        piece = torch.stack([source[start : start + CONTEXT + 1] for start in starts])
        yield piece[:, :-1], piece[:, 1:]


class Block(nn.Module):
    """Attention to what came before, then two layers at each place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mix, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.feed = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.mix(self.norm1(x)).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.feed(self.norm2(x))


class Writer(nn.Module):
    """Guesses the next character at every place of a text."""

    def __init__(self) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(LETTERS, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, LETTERS)

    def forward(self, letters: torch.Tensor) -> torch.Tensor:
        places = torch.arange(letters.shape[1], device=letters.device)
        return self.head(self.norm(self.blocks(self.letters(letters) + self.places(places))))


def optimizer_for(model: nn.Module, name: str, rate: float) -> torch.optim.Optimizer:
    """Adam, or bitsandbytes' Adam, whose state takes 8 bits instead of 32."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if name == "adam8bit":
        import bitsandbytes

        return bitsandbytes.optim.Adam8bit(trained, lr=rate)
    return torch.optim.Adam(trained, lr=rate)


def train(
    runtime: PrecisionRuntime, steps: int, seed: int = 0, rate: float = 3e-3, optimizer: str = "adam", every: int = 20
) -> dict[str, Any]:
    """Train and return what was seen: loss and scale of each step, and the share of updates that rounding lost.

    The share is measured in one step of ``every``, and in the last.
    """
    torch.manual_seed(seed)
    model = runtime.setup(Writer())
    adam = optimizer_for(model, optimizer, rate)
    model, adam = runtime.setup(model, adam)
    warm = runtime.gate(torch.optim.lr_scheduler.LambdaLR(adam, lambda step: min(1.0, (step + 1) / 20)))
    losses, scales, lost = [], [], {}
    for number, (letters, following) in enumerate(batches(seed, steps)):
        adam.zero_grad()
        guesses = model(letters.to(runtime.device))
        loss = nn.functional.cross_entropy(guesses.flatten(0, 1), following.to(runtime.device).flatten())
        runtime.backward(loss)
        runtime.clip_gradients(adam, max_norm=1.0)
        if number % every == every - 1 or number == steps - 1:
            with runtime.lost_updates() as meter:
                result = runtime.step(adam)
            lost[number] = meter.share
        else:
            result = runtime.step(adam)
        warm.step()  # does nothing after a step that was skipped
        losses.append(loss.item())
        scales.append(result.scale)
    return {
        "mode": runtime.mode.name, "updates": runtime.updates.name, "optimizer": optimizer, "seed": seed,
        "losses": losses, "scales": scales, "lost": lost, "final": final(losses),
    }  # fmt: skip


def final(losses: list[float]) -> float:
    """The mean over the last steps."""
    last = losses[-ROUGHLY_THE_END:]
    return sum(last) / len(last)


def main() -> None:
    """Read the command line, train, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--optimizer", choices=("adam", "adam8bit"), default="adam")
    parser.add_argument("--updates", choices=("nearest", "stochastic", "kahan"), default="nearest")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write what was seen as JSON")
    given = parser.parse_args()
    runtime = PrecisionRuntime(updates=given.updates)
    seen = train(runtime, given.steps, given.seed, optimizer=given.optimizer)
    print(f"{runtime}: loss {seen['losses'][0]:.3f} -> {seen['final']:.3f}, scale {seen['scales'][-1]:g}")
    for number, share in seen["lost"].items():
        print(f"  step {number}: {share:.1%} of the updates were lost to rounding")
    if given.record is not None:
        given.record.write_text(json.dumps(seen), encoding="utf-8")


if __name__ == "__main__":
    main()
