"""Observed tensors beside their references, by site: what one call, or the whole function, is judged on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from precision_runtime.auditing.executing.noise import Reach
from precision_runtime.auditing.executing.recorder import Call
from precision_runtime.auditing.executing.references import Sample
from precision_runtime.auditing.executing.runs import Run
from precision_runtime.auditing.judging.excess import Judgement, Pair, flatten_sample, pair
from precision_runtime.auditing.judging.screened import Screened, Site

# How much wider than u the disturbance of wide runs is (see judge.py).
WIDE = 4.0


@dataclass
class Sheet:
    """Pairs by site, and sentences on what could not be put side by side."""

    pairs: dict[Site, Pair] = field(default_factory=dict)
    apart: list[str] = field(default_factory=list)

    def add_outputs(
        self, low: Sequence[tuple[str, torch.Tensor]], true: Sequence[tuple[str, torch.Tensor]], u: float, step: float
    ) -> None:
        """Add results by path; ``step`` is the subnormal step within which a value is as right as it can be."""
        theirs = dict(true)
        for path, value in low:
            if path in theirs:
                self._add("forward", f"output{path}", value, theirs[path], u, step)
        self.apart += unlike(len(low), len(theirs))

    def add_gradient(
        self, name: str, low: torch.Tensor | None, true: torch.Tensor | None, u: float, step: float, scale: float
    ) -> None:
        """Add a gradient that was computed for a loss multiplied by ``scale``; None on either side is left out."""
        if low is None or true is None or low.shape != true.shape:
            return
        unscaled = low if scale == 1.0 else low.to(torch.float64) / scale
        self._add("backward", f"grad of {name}", unscaled, true, u, step / scale)

    def only(self, sites: Iterable[Site]) -> Sheet:
        """The part of the sheet at these sites."""
        return Sheet({site: self.pairs[site] for site in sites})

    def judge(self, limit: float, samples: Sequence[Sample] = (), wide: Sequence[Sample] = ()) -> dict[Site, Judgement]:
        """Judge every pair with the perturbed runs given; worst elements are looked for above ``limit`` only."""
        return {
            site: entry.judge(values(samples, site, entry), values(wide, site, entry), WIDE, limit, quick=True)
            for site, entry in self.pairs.items()
        }

    def screen(self, limit: float) -> Screened:
        """Whether every pair passes without perturbed runs; how badly the others fail is only roughly said."""
        judged = {site: entry.judge(locate=limit, quick=True, brief=True) for site, entry in self.pairs.items()}
        return Screened(judged, list(self.apart))

    def _add(self, where: str, name: str, low: torch.Tensor, true: torch.Tensor, u: float, step: float) -> None:
        made = pair(name, low, true, u, step, gradient=where == "backward")
        if isinstance(made, str):
            self.apart.append(made)
        else:
            self.pairs[where, name] = made


def unlike(low: int, true: int) -> list[str]:
    """A sentence where other numbers of tensors come out of a call in the mode and in FP64."""
    return [] if low == true else [f"{low} tensors come out in the mode, {true} in FP64"]


def values(samples: Sequence[Sample], site: Site, entry: Pair) -> list[torch.Tensor]:
    """What perturbed runs have at a site, flat; runs whose shape came out otherwise, or NaN, are left out."""
    found = [getattr(s, site[0]).get(site[1]) for s in samples]
    flat = [flatten_sample(t, entry) for t in found if t is not None]
    masked = entry.settled is not None  # places that are not compared may hold anything
    return [f for f in flat if f is not None and (masked or not math.isnan(float(f.sum())))]


def sample_of(run: Run, names: dict[int, str]) -> Sample:
    """A perturbed run's tensors by the names that a sheet gives them."""
    forward = {f"output{path}": t for path, t in run.outputs}
    backward = {f"grad of {input_name(path)}": t for path, t in run.input_grads.items()}
    backward |= {f"grad of {names[k]}": t for k, t in run.parameter_grads.items() if k in names}
    inner = {
        (c.name, c.index): Sample({f"output{path}": t for path, t in c.outputs}, {})
        for c in run.calls
        if c.anchors is not None
    }
    return Sample(forward, backward, inner)


def input_name(path: str) -> str:
    """What a reader calls the input at a path of (args, kwargs): ``input[0]``, ``input['mask']``."""
    return "input" + (path[3:] if path[:3] in ("[0]", "[1]") else path)


@dataclass
class Verdict:
    """The judged tensors of one call (None: the whole function) in one direction."""

    call: Call | None
    where: str
    judgements: list[Judgement]
    amplification: float = 0.0
    failed: bool = False
    consequence: bool = False  # a call inside this one failed in the same direction
    reach: Reach = Reach.ALL  # of the perturbed runs beside which it has failed

    @property
    def measured(self) -> float:
        """The worst score that perturbed runs or logic settled, leaving out upper bounds."""
        return max((j.score for j in self.judgements if not j.bound), default=0.0)

    @property
    def worst(self) -> Judgement:
        """The worst of the judged tensors."""
        return max(self.judgements, key=lambda j: j.score)

    @property
    def score(self) -> float:
        """The worst score, upper bounds included."""
        return max((j.score for j in self.judgements), default=0.0)
