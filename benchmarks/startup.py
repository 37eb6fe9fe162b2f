"""pytest on an empty suite with the plugin installed against the same with ``-p no:precision``.

In turns, each in a fresh process; the target is at most 15 ms more in the median of the pairs' differences. Other
plugins of this environment are left out on both sides, because some take a second and its noise with them, and bytecode
is cached, as it is where people work.

    python benchmarks/startup.py [--rounds 41]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TARGET = 15.0  # ms
OTHERS = ("hypothesispytest", "xdist", "xdist.looponfail", "anyio")


def main() -> None:
    """Run the rounds and print a table; exit 1 where the target is missed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=41)
    options = parser.parse_args()
    runs = {"installed": [], "-p no:precision": ["-p", "no:precision"]}
    times: dict[str, list[float]] = {name: [] for name in runs}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "pytest.ini").write_text("[pytest]\n")
        Path(folder, "test_nothing.py").write_text("def test_nothing():\n    pass\n")
        for _ in range(options.rounds + 1):  # the first round fills the caches
            for name, arguments in runs.items():
                times[name].append(_run(arguments, folder))
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    for name, median in medians.items():
        print(f"{name:16} {median:7.1f} ms   ({min(times[name][1:]):.1f} to {max(times[name][1:]):.1f})")
    more = statistics.median([a - b for a, b in zip(*times.values(), strict=True)][1:])
    print(f"{'difference':16} {more:7.1f} ms   ratio {medians['installed'] / medians['-p no:precision']:.3f}")
    print(f"{'target':16} {TARGET:7.1f} ms at most")
    sys.exit(more > TARGET)


def _run(arguments: list[str], folder: str) -> float:
    others = [argument for name in OTHERS for argument in ("-p", f"no:{name}")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *others, *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, capture_output=True, env=environment)
    return 1000 * (time.perf_counter() - start)


if __name__ == "__main__":
    main()
