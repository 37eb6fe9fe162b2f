"""What an audit costs, in FP64 forwards of the same model, measured in one run.

    python benchmarks/audit_cost.py [--repeat 3] [--json FILE]

The model is a GPT-2 of 6 layers and width 256, batch 4, sequence 128, judged forward only, in bf16-true and bf16-mixed,
and with gradients in bf16-true, in FP64 forward and backward passes.
Then all six modes with one shared reference, against bf16-true alone: the low-precision runs themselves, timed
apart, are not counted there, because half products without hardware for them are slow by themselves. They take some
50 FP64 forwards here, and their noise would drown what is left when they are taken away: each mode is timed by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from precision_runtime import audit, parse_mode
from precision_runtime.auditing import References

NATIVE = ("32-true", "64-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed")
WANTED = {"audit bf16-true": 6.0, "audit bf16-mixed": 6.0, "with gradients": 6.0, "six modes / one mode": 4.0}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def main() -> int:
    """Measure, print a table, return 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=256, n_layer=6, n_head=4, n_positions=128, vocab_size=5000, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config).train(False)
    ids = torch.randint(5000, (4, 128))

    shared = References()

    def audit_in(mode: str) -> None:
        audit(model, mode=mode, kwargs={"input_ids": ids}, gradients=False)

    def audit_shared(mode: str) -> None:
        nonlocal shared
        if mode == NATIVE[0]:  # a new round
            shared = References()
        audit(model, mode=mode, kwargs={"input_ids": ids}, gradients=False, references=shared)

    def audit_gradients() -> None:
        audit(model, mode="bf16-true", kwargs={"input_ids": ids})

    reference = copy.deepcopy(model).double()
    # The plain runs are part of every audit; here they are timed so that they can be taken away again.
    plain = {name: low_run(model, name) for name in NATIVE}
    measures: dict[str, Callable[[], object]] = {
        "FP64 forward": lambda: forward(reference, ids),
        "FP64 both ways": lambda: both_ways(reference, ids),
        "with gradients": audit_gradients,
        "audit bf16-true": lambda: audit_in("bf16-true"),
        "audit bf16-mixed": lambda: audit_in("bf16-mixed"),
        **{f"shared {name}": functools.partial(audit_shared, name) for name in NATIVE},
        **{f"plain {name}": functools.partial(run, ids) for name, run in plain.items()},
    }
    seconds = interleaved(measures, options.repeat)
    one = seconds["FP64 forward"]
    all_plain = sum(seconds[f"plain {name}"] for name in NATIVE)
    all_audits = sum(seconds[f"shared {name}"] for name in NATIVE)
    ratios = {
        "audit bf16-true": seconds["audit bf16-true"] / one,
        "audit bf16-mixed": seconds["audit bf16-mixed"] / one,
        "with gradients": seconds["with gradients"] / seconds["FP64 both ways"],
        "six modes / one mode": (all_audits - all_plain) / (seconds["audit bf16-true"] - seconds["plain bf16-true"]),
    }
    print(f"one FP64 forward: {one * 1e3:.1f} ms; low runs of six modes: {all_plain / one:.1f} FP64 forwards")
    for name, ratio in ratios.items():
        verdict = "ok" if ratio <= WANTED[name] else "MISSED"
        print(f"{name:24} {ratio:6.2f} x   wanted at most {WANTED[name]:g}   {verdict}")
    if options.json:
        options.json.write_text(json.dumps({"seconds": seconds, "ratios": ratios}, indent=1))
    return int(any(ratio > WANTED[name] for name, ratio in ratios.items()))


@torch.no_grad()
def forward(model: Any, ids: torch.Tensor) -> object:
    """Run the model once."""
    return model(input_ids=ids).logits


def both_ways(model: Any, ids: torch.Tensor) -> None:
    """Run the model once, forward and backward."""
    model.zero_grad(set_to_none=True)
    model(input_ids=ids).logits.mean().backward()


def low_run(model: Any, name: str) -> Callable[[torch.Tensor], object]:
    """Return a function that runs a copy of the model as the mode does, without any judging."""
    mode = parse_mode(name)
    cast = copy.deepcopy(model).to(DTYPES[mode.params])

    def run(ids: torch.Tensor) -> object:
        low = torch.autocast("cpu", DTYPES[mode.compute]) if mode.autocast else contextlib.nullcontext()
        with low:
            return forward(cast, ids)

    return run


def interleaved(measures: dict[str, Callable[[], object]], repeat: int) -> dict[str, float]:
    """Time all in turn, several rounds after one to warm up, and return the least of each: noise only ever adds."""
    times: dict[str, list[float]] = {name: [] for name in measures}
    for turn in range(repeat + 1):
        for name, run in measures.items():
            start = time.perf_counter()
            run()
            taken = time.perf_counter() - start
            print(f"round {turn} of {repeat}: {name:20} {taken:7.3f} s", file=sys.stderr, flush=True)
            if turn:
                times[name].append(taken)
    return {name: min(values) for name, values in times.items()}


if __name__ == "__main__":
    sys.exit(main())
