"""The same training in seven ways, side by side: loss, loss scale, and the share of updates that rounding lost.

    python examples/training/compare.py --steps 300 --plot training.png

Plain bf16-true stands beside bf16-true with stochastic rounding and with Kahan's compensation: an update below half a
unit in the last place of its weight is lost in the first, arrives in expectation in the second, and is kept until it
counts in the third. In nf4 the linear layers are frozen codes: only
embeddings, norms and biases learn, from frozen random layers, and the loss stays above the others'.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from train import train

from precision_runtime import PrecisionRuntime

WAYS: dict[str, dict[str, str]] = {
    "32-true": {"mode": "32-true"},
    "bf16-mixed": {"mode": "bf16-mixed"},
    "16-mixed": {"mode": "16-mixed"},
    "bf16-true": {"mode": "bf16-true"},
    "bf16-true, stochastic": {"mode": "bf16-true", "updates": "stochastic"},
    "bf16-true, Kahan": {"mode": "bf16-true", "updates": "kahan"},
    "nf4, int8 Adam": {"mode": "nf4", "optimizer": "adam8bit"},
}


def run(way: str, steps: int, seed: int, rate: float) -> dict[str, Any]:
    """Train once."""
    chosen = dict(WAYS[way])
    optimizer = chosen.pop("optimizer", "adam")
    return train(PrecisionRuntime(**chosen), steps, seed, rate, optimizer)


def plot(seen: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Three pictures above each other; the losses smoothed over ten steps."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, (losses, scales, lost) = pyplot.subplots(3, 1, figsize=(8, 10), sharex=True, layout="constrained")
    for way, (first, *_) in seen.items():
        values = first["losses"]
        smooth = [statistics.fmean(values[max(0, i - 9) : i + 1]) for i in range(len(values))]
        losses.plot(smooth, label=way)
        if len(set(first["scales"])) > 1 or first["scales"][0] != 1.0:
            scales.plot(first["scales"], label=way)
        lost.plot(list(first["lost"]), [100 * share for share in first["lost"].values()], marker=".", label=way)
    losses.set(ylabel="loss (nats per character)")
    scales.set(ylabel="loss scale")
    scales.set_yscale("log", base=2)
    lost.set(ylabel="updates lost (%)", xlabel="step")
    for axes in (losses, scales, lost):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:  # no mode with a scaler, no line
            axes.legend()
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    """Read the command line, train in every way, print a table and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=1, help="trainings in each way, for the spread")
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate: a small one loses more")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw loss, scale and lost updates")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write what was seen as JSON")
    given = parser.parse_args()
    seen = {way: [run(way, given.steps, seed, given.rate) for seed in range(given.seeds)] for way in given.ways}
    print(f"{'':24}{'final loss':>12}{'spread':>9}{'scale':>9}{'lost updates':>15}")
    for way, runs in seen.items():
        finals = [r["final"] for r in runs]
        spread = f"{statistics.stdev(finals):.4f}" if len(finals) > 1 else "-"
        shares = [share for r in runs for share in r["lost"].values()]
        lost = f"{statistics.fmean(shares):.1%}" if shares else "-"
        print(f"{way:24}{statistics.fmean(finals):>12.4f}{spread:>9}{runs[0]['scales'][-1]:>9g}{lost:>15}")
    if given.plot is not None:
        plot(seen, given.plot)
    if given.record is not None:
        given.record.write_text(json.dumps(seen), encoding="utf-8")


if __name__ == "__main__":
    main()
