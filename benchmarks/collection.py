"""Collection of 2,000 tests in 8 lanes against plain parametrize of the same 2,000 by 8.

Both suites are collected in turns, each in a fresh process, and the time is that of pytest's own collection hook. The
target is a ratio of at most 1.15.

    python benchmarks/collection.py [--rounds 7] [--tests 2000]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

TARGET = 1.15
FILES = 20

CONFTEST = """
import time, pytest

@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection(session):
    start = time.perf_counter()
    result = yield
    print(f"\\nseconds={time.perf_counter() - start} items={len(session.items)}")
    return result
"""
LANES = [f"{mode}{at}" for at in ("", "@cuda") for mode in ("16-true", "bf16-true", "16-mixed", "bf16-mixed")]
PLAIN = f"import pytest\nLANES = {LANES!r}\n"
PLAIN_TEST = '@pytest.mark.parametrize("lane", LANES)\ndef test_{}(lane):\n    pass\n'
LANE_TEST = '@pytest.mark.precision("half", accelerators=("cpu", "cuda"))\ndef test_{}(precision_ctx):\n    pass\n'


def main() -> None:
    """Run the rounds and print a table; exit 1 where the target is missed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tests", type=int, default=2000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        suites = {
            "plain parametrize": _write(Path(folder, "plain"), PLAIN, PLAIN_TEST, options.tests),
            "precision lanes": _write(Path(folder, "lanes"), "import pytest\n", LANE_TEST, options.tests),
        }
        times: dict[str, list[float]] = {name: [] for name in suites}
        for _ in range(options.rounds + 1):  # the first round fills the caches of the file system and bytecode
            for name, suite in suites.items():
                times[name].append(_collect(suite, options.tests * len(LANES)))
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    for name, median in medians.items():
        print(f"{name:20} {median:7.3f} s   ({min(times[name][1:]):.3f} to {max(times[name][1:]):.3f})")
    ratios = [b / a for a, b in zip(*times.values(), strict=True)][1:]
    ratio = statistics.median(ratios)
    print(f"{'ratio':20} {ratio:7.3f}     target at most {TARGET}")
    sys.exit(ratio > TARGET)


def _write(folder: Path, head: str, test: str, count: int) -> Path:
    folder.mkdir()
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "pytest.ini").write_text("[pytest]\n")
    for number in range(FILES):
        tests = [test.format(i) for i in range(number * count // FILES, (number + 1) * count // FILES)]
        (folder / f"test_{number}.py").write_text("\n".join([head, *tests]))
    return folder


def _collect(folder: Path, expected: int) -> float:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-qq", "-s", "-p", "no:cacheprovider", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=True)
    line = next(line for line in result.stdout.splitlines() if line.startswith("seconds="))
    seconds, items = (part.partition("=")[2] for part in line.split())
    if int(items) != expected:
        raise SystemExit(f"{folder.name} collected {items} items instead of {expected}")
    return float(seconds)


if __name__ == "__main__":
    main()
