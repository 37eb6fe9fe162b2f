"""The training example runs, in the ways that it promises, and under the command."""

from __future__ import annotations

import importlib
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "training"


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Run one of the scripts in this process."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def run(script: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
        importlib.import_module(script).main()

    yield run
    for name in ("train", "compare"):
        sys.modules.pop(name, None)


def recorded(path: Path) -> Any:
    return json.loads(path.read_text())


def test_it_learns_and_draws_in_every_way_but_the_slow_one(
    main: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    ways = ["32-true", "16-mixed", "bf16-true", "bf16-true, stochastic"]
    picture, record = tmp_path / "training.png", tmp_path / "training.json"
    main("compare", "--steps", "4", "--ways", *ways, "--plot", str(picture), "--record", str(record))
    seen = {way: run for way, (run,) in recorded(record).items()}
    assert list(seen) == ways
    assert picture.read_bytes().startswith(b"\x89PNG")
    for run in seen.values():
        assert len(run["losses"]) == 4
        assert run["losses"][-1] < run["losses"][0]
    assert seen["16-mixed"]["scales"] == [65536.0] * 4
    assert seen["bf16-true"]["lost"]["3"] > 0.02
    assert seen["bf16-true, stochastic"]["lost"] == {"3": 0.0}
    assert seen["32-true"]["losses"][0] == pytest.approx(seen["16-mixed"]["losses"][0], rel=1e-3)
    table = capsys.readouterr().out.splitlines()[1:]
    assert [line[:24].strip() for line in table] == ways


def test_it_runs_with_4_bit_layers_and_8_bit_state(main: Callable[..., None], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    main("compare", "--steps", "3", "--ways", "nf4, int8 Adam", "--record", str(tmp_path / "seen.json"))
    (run,) = recorded(tmp_path / "seen.json")["nf4, int8 Adam"]
    assert (run["mode"], run["optimizer"]) == ("nf4", "adam8bit")
    assert run["losses"][-1] < run["losses"][0]


def test_the_command_gives_the_plain_script_its_mode(tmp_path: Path) -> None:
    record = tmp_path / "seen.json"
    command = ["-m", "precision_runtime.cli", "run", "--precision", "bf16-mixed", str(FOLDER / "train.py")]
    done = subprocess.run(
        [sys.executable, *command, "--steps", "2", "--record", str(record)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("PrecisionRuntime('bf16-mixed'")
    assert done.stderr == ""
    assert recorded(record)["mode"] == "bf16-mixed"


@pytest.mark.slow
def test_small_updates_that_are_not_lost_reach_float32_s_loss(main: Callable[..., None], tmp_path: Path) -> None:
    record = tmp_path / "seen.json"
    ways = ["32-true", "bf16-true", "bf16-true, stochastic", "bf16-true, Kahan"]
    main("compare", "--steps", "100", "--seeds", "3", "--rate", "1e-3", "--ways", *ways, "--record", str(record))
    finals = {way: [run["final"] for run in runs] for way, runs in recorded(record).items()}
    spread = statistics.stdev(finals["32-true"])
    # The same seed sees the same batches: differences within a seed are the mode's, and much smaller than the spread.
    gaps = {
        way: statistics.fmean(a - b for a, b in zip(values, finals["32-true"], strict=True))
        for way, values in finals.items()
    }
    assert abs(gaps["bf16-true, stochastic"]) < spread / 4
    assert abs(gaps["bf16-true, Kahan"]) < spread / 4
    assert gaps["bf16-true"] > spread, "plain bf16-true is behind by more than seeds differ"
