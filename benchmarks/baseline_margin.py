"""How much a lane's lost bits differ where nothing was changed: what a baseline's margin has to stand.

Architectures of ``examples/real_models`` run with several seeds, and each of these with other kernels, as other
machines have them: torch's without vector instructions, oneDNN's of another generation, more threads. Two figures of
one lane are compared between kernels, the seed being the same: that is what a baseline meets, because the plugin seeds
every test alike. Between seeds, other weights and inputs, they differ more; that is shown beside it.

    python benchmarks/baseline_margin.py [--seeds 3] [-k gpt2] [--lanes half,nf4]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pytest_precision.baseline import MARGIN

ROOT = Path(__file__).parents[1]
SHARES = (0.5, 0.9, 0.99, 1.0)
KERNELS = {
    "as they are": {},
    "no vectors": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "AVX2, two threads": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "2"},
}
Place = tuple[str, str, str, str]  # test without its seed, lane, seed, kernels


def main() -> None:
    """Run, and print the quantiles of the differences."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lanes", default="half,tf32,fp8,quantized")
    parser.add_argument("-k", default="holds", help="as pytest's -k")
    options = parser.parse_args()
    figures: dict[Place, float] = {}
    for kernels, environment in KERNELS.items():
        for row in _run(options, environment):
            if row["verdict"] == "pass" and row["lost_bits"] is not None:
                case, seed = re.sub(r"seed\d+", "seed", row["case"]), re.findall(r"seed(\d+)", row["case"])[0]
                figures[case, row["lane"], seed, kernels] = float(row["lost_bits"])
    print(f"{len(figures)} figures, {len({place[:2] for place in figures})} lanes; the margin is {MARGIN} bits")
    _print("other kernels, the same seed", _differences(figures, lambda place: place[:3]))
    _print("other seeds, the same kernels", _differences(figures, lambda place: (*place[:2], place[3])))


def _run(options: argparse.Namespace, environment: dict[str, str]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "run.json")
        command = [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "examples/real_models", "-k", options.k,
            f"--seeds={options.seeds}", f"--precision-lanes={options.lanes}", f"--precision-json={file}",
        ]  # fmt: skip
        subprocess.run(command, cwd=ROOT, check=False, capture_output=True, env={**os.environ, **environment})
        rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["rows"]
        return rows


def _differences(figures: dict[Place, float], group: Callable[[Place], object]) -> list[float]:
    groups: dict[object, list[float]] = {}
    for place, lost in figures.items():
        groups.setdefault(group(place), []).append(lost)
    return sorted(abs(a - b) for lost in groups.values() for a, b in itertools.combinations(lost, 2))


def _print(what: str, differences: list[float]) -> None:
    if not differences:
        print(f"{what}: nothing to compare")
        return
    told = (f"{share:.0%} within {differences[round(share * (len(differences) - 1))]:.3f}" for share in SHARES)
    within = sum(each <= MARGIN for each in differences) / len(differences)
    print(f"{what}: {len(differences)} pairs; {', '.join(told)}; {within:.1%} within the margin")


if __name__ == "__main__":
    main()
