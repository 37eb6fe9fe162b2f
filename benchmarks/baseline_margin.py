"""How much a lane's lost bits differ between seeds: what a baseline's margin has to stand.

Each architecture of ``examples/real_models`` that is asked for runs with other weights and inputs, in every mode. The
figures of one lane are then compared pair by pair. A baseline is compared with runs of the same seed, so that what
differs there, with other processors, threads and releases of torch, is less than this: the margin of half a bit is an
upper bound where nearly all pairs are within it.

    python benchmarks/baseline_margin.py [--seeds 6] [-k gpt2]
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from pytest_precision.baseline import MARGIN

ROOT = Path(__file__).parents[1]
SHARES = (0.5, 0.9, 0.99, 1.0)


def main() -> None:
    """Run, and print the quantiles of the differences."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--lanes", default="half,tf32,fp8,quantized")
    parser.add_argument("-k", default="", help="as pytest's -k")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "run.json")
        command = [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "examples/real_models",
            f"--seeds={options.seeds}", f"--precision-lanes={options.lanes}", f"--precision-json={file}",
            *(["-k", options.k] if options.k else []),
        ]  # fmt: skip
        subprocess.run(command, cwd=ROOT, check=False, capture_output=True)
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    figures: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row["verdict"] == "pass" and row["lost_bits"] is not None:
            figures.setdefault((re.sub(r"seed\d+", "seed", row["case"]), row["lane"]), []).append(
                float(row["lost_bits"])
            )
    differences = sorted(abs(a - b) for lost in figures.values() for a, b in itertools.combinations(lost, 2))
    if not differences:
        sys.exit("nothing to compare: no lane held with two seeds")
    print(f"{len(figures)} lanes, {len(differences)} pairs of seeds; a margin of {MARGIN} bits")
    for share in SHARES:
        print(
            f"{share:6.0%} of the pairs differ by at most {differences[int(share * (len(differences) - 1))]:.2f} bits"
        )
    print(f"{sum(d <= MARGIN for d in differences) / len(differences):6.1%} are within the margin")


if __name__ == "__main__":
    main()
