"""Counts false alarms: a thousand audits of small modules that are right in every half mode, each with its own seed.

    python benchmarks/false_alarms.py [--audits 1000] [--first SEED] [--jobs 2] [--json FILE]

The kinds are drawn in turn, the sizes, the scale of the inputs and the mode by the seed. Weights and inputs are torch's
own first ones. Gradients are judged, too. At most one alarm in a thousand is wanted; each is printed with what
repeats it.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from precision_runtime import audit

MODES = ("16-true", "bf16-true", "16-mixed", "bf16-mixed")
ALLOWED = 1 / 1000

Made = tuple[Callable[..., Any], tuple[Any, ...]]


def main() -> int:
    """Audit, print what alarmed and how often; 1 where more did than is wanted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--audits", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    seeds = range(options.first, options.first + options.audits)
    rows: list[dict[str, Any]] = []
    with multiprocessing.get_context("spawn").Pool(options.jobs, initializer=quiet) as pool:
        for row in pool.imap_unordered(judged, seeds, chunksize=8):
            rows.append(row)
            if row["alarms"]:
                print(f"ALARM  seed {row['seed']}: {row['kind']} in {row['mode']}: {row['alarms']}", flush=True)
            if len(rows) % 100 == 0:
                print(f"{len(rows)} of {options.audits}", file=sys.stderr, flush=True)
    rows.sort(key=lambda row: row["seed"])
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    alarms = [row for row in rows if row["alarms"]]
    scores = sorted(row["excess"] for row in rows)
    print(f"{len(alarms)} of {len(rows)} healthy audits alarm; by kind: {dict(Counter(r['kind'] for r in alarms))}")
    print(f"largest excess: median {scores[len(scores) // 2]:.2f}, of 99 % {scores[int(0.99 * len(scores))]:.2f}")
    return int(len(alarms) > max(1.0, ALLOWED * len(rows)))


def quiet() -> None:
    """Each process: one thread, no warnings."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def judged(seed: int) -> dict[str, Any]:
    """One audit, made from its seed alone."""
    names = sorted(KINDS)
    kind, rng = names[seed % len(names)], random.Random(seed)
    mode = rng.choice(MODES)
    torch.manual_seed(seed)
    function, args = KINDS[kind](rng)
    try:
        report = audit(function, *args, mode=mode, seed=seed)
    except Exception as error:  # a crash is an alarm, too
        return {"seed": seed, "kind": kind, "mode": mode, "excess": 0.0, "alarms": [f"{type(error).__name__}: {error}"]}
    alarms = [f.title() for f in report.findings]
    return {"seed": seed, "kind": kind, "mode": mode, "excess": report.excess, "alarms": alarms}


def scale(rng: random.Random) -> float:
    """Between 1/4 and 4."""
    return math.exp2(rng.uniform(-2.0, 2.0))


def rows(rng: random.Random, width: int) -> torch.Tensor:
    """Some rows of inputs, at a scale between 1/4 and 4."""
    return torch.randn(rng.choice((1, 3, 16, 64)), width) * scale(rng)


def image(rng: random.Random, channels: int) -> torch.Tensor:
    """A small batch of images."""
    size = rng.choice((8, 12, 16))
    return torch.randn(rng.choice((1, 4)), channels, size, size) * scale(rng)


def mlp(rng: random.Random) -> Made:
    """Linear layers with an activation that is named at random."""
    width, act = rng.choice((8, 32, 128)), rng.choice((nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.ELU, nn.Softplus))
    parts = [nn.Sequential(nn.Linear(width, width), act()) for _ in range(rng.randint(1, 6))]
    return nn.Sequential(*parts, nn.Linear(width, rng.choice((1, 2, 10)))), (rows(rng, width),)


def convolutions(rng: random.Random) -> Made:
    """Convolutions with norms and pooling, in training."""
    c = rng.choice((4, 8, 16))
    norm = rng.choice((nn.BatchNorm2d(c), nn.GroupNorm(2, c), nn.InstanceNorm2d(c)))
    parts = (nn.Conv2d(3, c, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(c, c, 3, padding=1))
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10)), (image(rng, 3),)


def norms(rng: random.Random) -> Made:
    """A norm by itself."""
    width = rng.choice((8, 64, 256))
    return rng.choice((nn.LayerNorm(width), nn.RMSNorm(width))), (rows(rng, width) + rng.choice((0.0, 1.0)),)


def transformer(rng: random.Random) -> Made:
    """A transformer's layers, without dropout or with it."""
    width = rng.choice((16, 32))
    layer = nn.TransformerEncoderLayer(
        width, 4, 2 * width, dropout=rng.choice((0.0, 0.1)), batch_first=True, norm_first=rng.random() < 0.5
    )
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), (torch.randn(2, rng.choice((5, 24)), width),)


def recurrent(rng: random.Random) -> Made:
    """An RNN, a GRU or an LSTM (no LSTM kernel exists under fp16 autocast; the report says so, which is no alarm)."""
    width = rng.choice((8, 16))
    kind = rng.choice((nn.RNN, nn.GRU))
    return kind(width, 16, batch_first=True, bidirectional=rng.random() < 0.5), (torch.randn(3, 20, width),)


class Loss(nn.Module):
    """A network and a loss: one number comes out."""

    def __init__(self, width: int, classes: int, loss: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.net, self.loss = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, classes)), loss

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The loss."""
        return self.loss(self.net(x))


def losses(rng: random.Random) -> Made:
    """Losses of torch behind a small network."""
    x, classes = rows(rng, 16), rng.choice((2, 10, 100))
    y, z = torch.randint(classes, (len(x),)), torch.randn(len(x), classes)
    table: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda out: functional.cross_entropy(out, y),
        lambda out: functional.cross_entropy(out, y, label_smoothing=0.1),
        lambda out: functional.mse_loss(out, z.to(out.dtype)),
        lambda out: functional.smooth_l1_loss(out, z.to(out.dtype)),
        lambda out: functional.binary_cross_entropy_with_logits(out, z.sigmoid().to(out.dtype)),
        lambda out: functional.kl_div(out.log_softmax(-1), z.softmax(-1).to(out.dtype), reduction="batchmean"),
        lambda out: functional.huber_loss(out, z.to(out.dtype)),
        lambda out: functional.cosine_embedding_loss(out, z.to(out.dtype), torch.ones(len(out))),
    ]
    return Loss(16, classes, rng.choice(table)), (x,)


def embeddings(rng: random.Random) -> Made:
    """Token and position tables, a norm, a head: no floating input."""
    width = rng.choice((16, 64))
    net = nn.Sequential(nn.Embedding(50, width), nn.LayerNorm(width), nn.Linear(width, 50))
    return net, (torch.randint(50, (rng.choice((1, 4)), rng.choice((3, 20)))),)


class Attention(nn.Module):
    """Attention written out, causal, with a mask that leaves padded rows."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: torch.Tensor) -> Any:
        """Attend."""
        b, t, c = x.shape
        q, k, v = (p.view(b, t, self.heads, -1).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) / (c // self.heads) ** 0.5
        scores = scores.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), torch.finfo(scores.dtype).min)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, c))


def attention(rng: random.Random) -> Made:
    """Attention written by hand."""
    return Attention(32, rng.choice((1, 4))), (torch.randn(2, rng.choice((4, 17)), 32) * scale(rng),)


class Experts(nn.Module):
    """A mixture of experts whose gate is computed in FP32, as it should be."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Send each row through its two best experts."""
        with torch.autocast("cpu", enabled=False):
            weight, chosen = functional.linear(x.float(), self.gate.weight.float()).softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            share = (weight * (chosen == number)).sum(-1, keepdim=True)
            out = out + share.to(x.dtype) * expert(x)
        return out


def experts(rng: random.Random) -> Made:
    """A mixture of experts."""
    return Experts(16, rng.choice((4, 8))), (rows(rng, 16),)


class Decision(nn.Module):
    """A network whose result is a decision."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind = nn.Linear(16, 12), kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Decide."""
        out: torch.Tensor = self.net(x)
        if self.kind == "argmax":
            return out.argmax(-1)
        if self.kind == "topk":
            return out.topk(3, -1).indices
        if self.kind == "threshold":
            return out > 0.1
        return (out * 8.0).round()


def decisions(rng: random.Random) -> Made:
    """Argmax, top-k, a threshold, a quantiser."""
    return Decision(rng.choice(("argmax", "topk", "threshold", "round"))), (rows(rng, 16),)


def gated(rng: random.Random) -> Made:
    """A gated unit with a residual stream, several times over."""
    layers = nn.ModuleList(nn.Linear(24, 48) for _ in range(rng.randint(1, 8)))

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.norm = layers, nn.LayerNorm(24)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = x + functional.glu(layer(self.norm(x)), -1)
            return x

    return Gated(), (rows(rng, 24),)


def statistics(rng: random.Random) -> Made:
    """A mean and a variance as torch computes them: few numbers come out."""
    return (lambda x: (x.mean(0), x.var(0, correction=0))), (rows(rng, rng.choice((1, 4, 32))) + 1.0,)


KINDS: dict[str, Callable[[random.Random], Made]] = {
    f.__name__: f
    for f in (
        mlp, convolutions, norms, transformer, recurrent, losses, embeddings, attention, experts, decisions, gated,
        statistics,
    )
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
