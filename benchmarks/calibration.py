"""Calibrates the one constant of the audit, the limit on excess error, by split conformal prediction.

    python benchmarks/calibration.py [--every N] [--jobs 2] [--json FILE] [--document docs/limit.md]

Known-good cases: every op of torch that has an OpInfo, on its own samples; the layers and losses of ``torch.nn`` in
several sizes; small real models. None of them comes from a collection of bugs. Each is audited in the half modes with a
low limit, so that what passes on a mere bound lies below it, and everything above is measured. The score of a case is
the worst over its module calls, tensors and directions, in the very units that the limit is in.

Split conformal (Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random World", 2005, section 4.2.2): among n
scores of exchangeable cases, a new one exceeds the ceil((1 - alpha)(n + 1))-th smallest with probability at most alpha.

Left out, and counted: what does not run in a mode; what left the range of the dtype (that is logic, no limit); samples
of whole numbers that the mode's dtype does not hold, as those of sort and argsort are (the cast makes other numbers of
them, which an audit has to find). What is above the limit is listed, and docs/found.md has what of it is torch's.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import platform
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from precision_runtime import audit
from precision_runtime.auditing.executing.noise import is_count
from precision_runtime.errors import AuditError

LOW_BUDGET = 1.0  # bits: scores above 2 are measured
LIMIT = 4.0
ALPHA = 0.01
MODES = ("16-true", "bf16-true", "16-mixed", "bf16-mixed")
LARGEST = 20_000  # elements of an op's sample

# Ops without a right value to compare: uninitialised memory, casts that ask for another format than the mode's, and the
# next number of the format itself.
NO_TRUTH = frozenset(("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided",
                      "bfloat16", "half", "float", "double", "nextafter"))  # fmt: skip
HALF = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}

Case = tuple[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def main() -> int:
    """Audit every case, print the order statistics, write the document; 1 where the limit is not covered by them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="take every N-th op")
    parser.add_argument("--seeds", type=int, default=3, help="for layers and models")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--rows", type=Path, help="audit nothing, and take the rows that an earlier run wrote")
    parser.add_argument("--document", type=Path)
    options = parser.parse_args()
    if options.rows:
        known = [row for row in json.loads(options.rows.read_text()) if row["case"] not in NO_TRUTH]
        return told(known, options.document)
    tasks = [("op", i) for i in range(0, ops_count(), options.every)]
    tasks += [("layer", seed) for seed in range(options.seeds)] + [("model", seed) for seed in range(options.seeds)]
    rows: list[dict[str, Any]] = []
    with multiprocessing.get_context("spawn").Pool(options.jobs, initializer=quiet, maxtasksperchild=100) as pool:
        for number, found in enumerate(pool.imap_unordered(run, tasks), 1):
            rows += found
            if number % 50 == 0:
                print(f"{number} of {len(tasks)}", file=sys.stderr, flush=True)
    rows.sort(key=lambda row: (row["source"], row["case"], row["mode"]))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return told(rows, options.document)


def told(rows: list[dict[str, Any]], place: Path | None) -> int:
    """Print the document, and write it; 1 where the limit is not covered."""
    text = document(rows)
    print(text)
    if place:
        place.write_text(text)
    return int(order_statistic([r["score"] for r in rows if r["outcome"] == "judged"], ALPHA) > LIMIT)


def quiet() -> None:
    """Each process: one thread, no warnings."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def ops_count() -> int:
    """How many OpInfos torch has."""
    return len(opinfos())


def opinfos() -> Sequence[Any]:
    """Torch's own descriptions of its ops; in torch.testing, though not public."""
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db

    return op_db


def run(task: tuple[str, int]) -> list[dict[str, Any]]:
    """Audit the cases of one task in every mode."""
    source, number = task
    cases = {"op": op_case, "layer": layers, "model": models}[source](number)
    rows = []
    for name, function, args, kwargs in cases:
        for mode in MODES:
            row: dict[str, Any] = {"source": source, "case": name, "mode": mode, "seed": number, "score": None}
            rows.append(row | judged(function, args, kwargs, mode))
    return rows


def judged(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], mode: str) -> dict[str, Any]:
    """The score of one case in one mode, or why it has none."""
    strided = [t for t in tensors(args) if t.layout is torch.strided]
    if any(is_count(t) and not torch.equal(t.to(HALF[mode]).to(t.dtype), t) for t in strided):
        return {"outcome": "whole numbers that the dtype does not hold", "why": ""}
    try:
        report = audit(function, *args, mode=mode, kwargs=kwargs, budget=LOW_BUDGET)
    except AuditError as error:
        return {"outcome": "no reference", "why": str(error)[:200]}
    except Exception as error:
        return {"outcome": "does not run", "why": f"{type(error).__name__}: {error}"[:200]}
    kinds = {finding.kind for finding in report.findings}
    if "error" in kinds:
        return {"outcome": "does not run", "why": report.findings[0].message[:200]}
    if kinds & {"range", "underflow"} or not math.isfinite(report.excess):
        return {"outcome": "range", "why": report.findings[0].title()[:200] if report.findings else ""}
    if kinds & {"not-applied", "amplification"}:
        return {"outcome": "advice", "why": report.findings[0].title()[:200]}
    return {"outcome": "judged", "score": report.excess, "why": report.findings[0].title() if report.findings else ""}


def op_case(number: int) -> Iterator[Case]:
    """One op on the largest of its first samples."""
    op = opinfos()[number]
    if op.name in NO_TRUTH:
        return
    if torch.bfloat16 not in op.dtypes and torch.float16 not in op.dtypes:
        return
    torch.manual_seed(number)
    try:
        samples = [s for _, s in zip(range(8), op.sample_inputs("cpu", torch.float64), strict=False)]
    except Exception:
        return
    sizes = [sum(t.numel() for t in tensors((s.input, s.args))) for s in samples]
    fitting = [(size, i) for i, size in enumerate(sizes) if 0 < size <= LARGEST]
    if fitting:
        sample = samples[max(fitting)[1]]
        name = op.name + (f".{op.variant_test_name}" if op.variant_test_name else "")
        yield name, Op(op.op, sample.kwargs), (sample.input, *sample.args), {}


class Op:
    """An op with its keyword arguments, which are no tensors to be judged."""

    def __init__(self, op: Callable[..., Any], kwargs: dict[str, Any]) -> None:
        self.op, self.kwargs = op, kwargs

    def __call__(self, *args: Any) -> Any:
        """Call the op."""
        return self.op(*args, **self.kwargs)


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors(part)


def layers(seed: int) -> Iterator[Case]:
    """Layers and losses of torch.nn, small and large."""
    torch.manual_seed(seed)
    for width, rows in ((16, 4), (64, 64), (256, 512)):
        x, y = torch.randn(rows, width), torch.randn(rows, width)
        image, signal = torch.randn(4, 8, width // 4, width // 4), torch.randn(4, 8, width)
        sequence = torch.randn(4, max(8, rows // 8), width)
        classes = torch.randint(width, (rows,))
        plain: dict[str, tuple[nn.Module, tuple[Any, ...]]] = {
            "Linear": (nn.Linear(width, 2 * width), (x,)),
            "Bilinear": (nn.Bilinear(width, width, 4), (x, y)),
            "Conv1d": (nn.Conv1d(8, 16, 3), (signal,)),
            "Conv2d": (nn.Conv2d(8, 16, 3, padding=1), (image,)),
            "ConvTranspose2d": (nn.ConvTranspose2d(8, 4, 3, stride=2), (image,)),
            "LayerNorm": (nn.LayerNorm(width), (x,)),
            "RMSNorm": (nn.RMSNorm(width), (x,)),
            "GroupNorm": (nn.GroupNorm(4, 8), (image,)),
            "BatchNorm2d": (nn.BatchNorm2d(8), (image,)),
            "InstanceNorm2d": (nn.InstanceNorm2d(8), (image,)),
            "MultiheadAttention": (nn.MultiheadAttention(width, 4, batch_first=True), (sequence, sequence, sequence)),
            "TransformerEncoderLayer": (nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True), (sequence,)),
            "GRU": (nn.GRU(width, 32, batch_first=True), (sequence,)),
            "LSTM": (nn.LSTM(width, 32, 2, batch_first=True), (sequence,)),
            "RNN": (nn.RNN(width, 32, batch_first=True), (sequence,)),
            "Softmax": (nn.Softmax(-1), (4 * x,)),
            "LogSoftmax": (nn.LogSoftmax(-1), (4 * x,)),
            "GELU": (nn.GELU(), (x,)),
            "SiLU": (nn.SiLU(), (x,)),
            "Softplus": (nn.Softplus(), (x,)),
            "Mish": (nn.Mish(), (x,)),
            "MLP": (nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(8)]), (x,)),
            "AvgPool2d": (nn.AvgPool2d(2), (image,)),
            "Upsample": (nn.Upsample(scale_factor=2, mode="bilinear"), (image,)),
            "CrossEntropyLoss": (nn.CrossEntropyLoss(), (x, classes)),
            "NLLLoss": (nn.NLLLoss(), (x.log_softmax(-1), classes)),
            "MSELoss": (nn.MSELoss(), (x, y)),
            "SmoothL1Loss": (nn.SmoothL1Loss(), (x, y)),
            "BCEWithLogitsLoss": (nn.BCEWithLogitsLoss(), (x, y.sigmoid())),
            "KLDivLoss": (nn.KLDivLoss(reduction="batchmean"), (x.log_softmax(-1), y.softmax(-1))),
            "CosineSimilarity": (nn.CosineSimilarity(), (x, y)),
            "TripletMarginLoss": (nn.TripletMarginLoss(), (x, y, x.flip(0))),
        }
        for name, (module, args) in plain.items():
            yield f"{name}-{width}", module, args, {}


def models(seed: int) -> Iterator[Case]:
    """Small real models whose modules are known to be right in every half mode."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "real_models"))
    import test_real_models as real

    for make in (*real.HEALTHY, *real.ODD):
        model, inputs = make(seed)
        yield make.__name__, model, (), inputs


def order_statistic(scores: Sequence[float], alpha: float) -> float:
    """The ceil((1 - alpha)(n + 1))-th smallest; inf where there are too few."""
    rank = math.ceil((1.0 - alpha) * (len(scores) + 1))
    return sorted(scores)[rank - 1] if rank <= len(scores) else math.inf


def document(rows: list[dict[str, Any]]) -> str:
    """The report, in Markdown."""
    good = [r for r in rows if r["outcome"] == "judged"]
    lines = [
        "# The limit, and where it comes from",
        "",
        "The audit fails a module call when its error is more than **4 times** (2 bits: the default budget) what",
        "rounding its operands must cost. That is the only constant of the judgement. This document is written by",
        "`python benchmarks/calibration.py --document docs/limit.md`; the method, and its source, are in that script.",
        "",
        f"torch {torch.__version__}, {platform.machine()}, {len(good)} known-good cases: ops on torch's own samples,",
        "layers and losses in three sizes, small real models; each in " + ", ".join(MODES) + ".",
        "",
        "| cases | mode | judged | median | 95% | 99% | largest | above 4 | conformal limit for 1% |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for source in ("op", "layer", "model", "all"):
        for mode in (*MODES, "all"):
            scores = [r["score"] for r in good if source in ("all", r["source"]) and mode in ("all", r["mode"])]
            if scores and (mode == "all" or source != "all"):
                lines.append(_line(source, mode, scores))
    lines += [
        "",
        "What passed on its bound counts as that bound, at most 2: the true score is smaller. The promise of at most",
        "1% false alarms is about a case like these taken from all of them together: where a row has a larger limit",
        "than 4, the share above 4 in that row is what was seen there. Ops without a right value are left out: memory",
        "that nobody has set, casts that ask for another format than the mode's, the next number of the format. The",
        "gradients of KLDivLoss and of matrix_exp are true findings about torch: [found.md](found.md).",
        "",
    ]
    lines += ["## Cases above the limit", ""]
    lines += ["| case | mode | times | found |", "|---|---|---|---|"]
    for r in sorted(good, key=lambda r: -r["score"]):
        if r["score"] > LIMIT:
            lines.append(f"| {r['source']} {r['case']} | {r['mode']} | {r['score']:.1f} | {r['why']} |")
    lines += ["", "## Not judged by the limit", ""]
    for outcome in sorted({r["outcome"] for r in rows} - {"judged"}):
        members = [r for r in rows if r["outcome"] == outcome]
        names = sorted({r["case"] for r in members})
        lines.append(f"- {outcome}: {len(members)} ({', '.join(names[:12])}{', …' if len(names) > 12 else ''})")
    return "\n".join(lines) + "\n"


def _line(source: str, mode: str, scores: list[float]) -> str:
    ordered = sorted(scores)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    limit = order_statistic(scores, ALPHA)
    above = sum(s > LIMIT for s in scores)
    return (
        f"| {source} | {mode} | {len(scores)} | {at(0.5):.2f} | {at(0.95):.2f} | {at(0.99):.2f} | {ordered[-1]:.1f} "
        f"| {above} ({above / len(scores):.2%}) | {'too few' if math.isinf(limit) else f'{limit:.2f}'} |"
    )


if __name__ == "__main__":
    sys.exit(main())
