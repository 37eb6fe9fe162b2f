"""Tensors of few numbers: the run in the mode once more, on inputs and weights that are a little smaller.

The rms of an error over thousands of elements is known from one run. Of a single number (a loss, a score) one run shows
one draw: the error of a bad formula is small by chance, that of a good one large. So the code runs again in the mode
and in FP64, both on inputs and parameters that are moved by a few hundredths and by one rounding (what the mode's dtype
holds exactly stays), and the rms is taken over these replicas as well. Each is judged against its own FP64 run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from precision_runtime.auditing.executing.recorder import Call
from precision_runtime.auditing.judging.excess import Judgement, Pair
from precision_runtime.auditing.judging.screened import Site
from precision_runtime.auditing.judging.sheet import Sheet

FEW = 64  # elements; an rms over fewer is too uncertain after one run
# A healthy error is about 1, and above 1 in one draw of three. A computation that is off by 9 times stays below 1 in
# one draw of eleven.
SUSPECT = 1.0
# No chance makes a healthy error this many times the limit.
CERTAIN = 4.0
# A result of operands that are a sixteenth smaller is itself this many times smaller at most, unless its terms cancel.
SHRUNK = 2.0
# With the judged run 4 draws: a healthy one (at most 1) is above 1.5 then in 6 of 100 cases, one that is off by 9 is
# below it in 2 of 1,000 (chi-squared, 4 degrees of freedom). What is not clear by then is judged on 16.
FIRST, ALL = 3, 15
CLEAR = 0.375  # of the limit
# Rounded to nearest, a value anywhere between two neighbours is off by their gap / sqrt(12) (rms); rounded by chance,
# as far as p(1 - p) has it for p uniform in [0, 1], by their gap / sqrt(6).
BY_CHANCE = math.sqrt(2.0)


class Replica(Protocol):
    """One run in the mode beside its FP64 run, as a judge sees them."""

    def few(self, call: Call | None) -> Sheet | None:
        """What came out of ``call``'s counterpart (None: the whole) beside FP64 on its own inputs; None if it is not.

        Nothing is judged.
        """


@dataclass
class Replicas:
    """Makes replicas when asked, once each; None where one could not be made (the code checks its values).

    ``dithered`` makes runs of the whole function on its very inputs, with roundings that are drawn by chance: beside
    FP64, in the direction and by the number given.
    """

    make: Callable[[int], Replica | None]
    dithered: Callable[[str, int], Sheet | None] = lambda where, number: None
    made: list[Replica | None] = field(default_factory=list)

    def get(self, number: int) -> Replica | None:
        """The replica of this number, from 0."""
        while len(self.made) <= number:
            self.made.append(self.make(len(self.made)))
        return self.made[number]


def replicated(
    replicas: Replicas, call: Call | None, sheet: Sheet, judged: dict[Site, Judgement], limit: float
) -> dict[Site, Judgement]:
    """Judgements of the tensors of few numbers among ``judged``, over replicas; the others are left out.

    A single number counts when it is suspect, more of them when they failed.
    """
    open_ = {s: j for s, j in judged.items() if _open(sheet, s, j, limit)}
    errors: dict[Site, list[float]] = {s: [] for s in open_}
    out: dict[Site, Judgement] = {}
    for count, clear in ((FIRST, CLEAR * limit), (ALL, math.inf)):
        for number in range(count):
            if not open_ or number < min(len(errors[s]) for s in open_):
                continue
            replica = replicas.get(number)
            again = None if replica is None else replica.few(call)
            if again is None:
                return out
            for site in open_:
                entry = again.pairs.get(site)
                if entry is None or entry.lost is not None or entry.rms_reference == 0.0:
                    return out
                # Relative to the result, which has moved; what rounding the operands must cost has moved with it, but
                # not where terms cancel and the result has come close to 0.
                errors[site].append(
                    entry.rms_error * min(SHRUNK, sheet.pairs[site].rms_reference / entry.rms_reference)
                )
        for site, before in open_.items():
            out[site] = _over(before, errors[site], sheet.pairs[site], limit)
        open_ = {s: j for s, j in open_.items() if out[s].excess > clear}
    if call is None:
        for site, after in out.items():
            if sheet.pairs[site].reference.numel() == 1 and after.excess <= limit:
                out[site] = _by_chance(replicas, site, after, judged[site], sheet.pairs[site], limit)
    return out


def _by_chance(
    replicas: Replicas, site: Site, after: Judgement, before: Judgement, entry: Pair, limit: float
) -> Judgement:
    """The judgement ``after`` replicas, or a worse one that runs with roundings drawn by chance lead to.

    A replica is disturbed less than a running total's last place, so it may be as lucky as the judged run was.
    """
    errors: list[float] = []
    for count, clear in ((FIRST + 1, CLEAR * limit), (ALL + 1, limit)):
        while len(errors) < count:
            drawn = replicas.dithered(site[0], len(errors))
            other = None if drawn is None else drawn.pairs.get(site)
            if other is None or other.lost is not None:
                return after
            errors.append(other.rms_error)
        excess = math.sqrt(sum(e * e for e in errors) / count) / BY_CHANCE * before.excess / before.error
        if excess <= clear:
            return after
    return replace(
        after, excess=excess, worst=after.worst or entry.farthest(limit * before.error / before.excess),
        note=f"the error is {excess:.3g} times what rounding the operands must cost (rms of {len(errors)} runs whose "
        f"roundings were drawn by chance; {before.excess:.3g} times in the judged one)",
    )  # fmt: skip


def _open(sheet: Sheet, site: Site, judgement: Judgement, limit: float) -> bool:
    entry = sheet.pairs[site]
    if entry.decision or judgement.kind is not None or judgement.bound or not math.isfinite(judgement.excess):
        return False
    size, line = entry.reference.numel(), limit if entry.reference.numel() > 1 else SUSPECT * limit / 4.0
    return size < FEW and line < judgement.excess < CERTAIN * limit


def _over(judgement: Judgement, errors: list[float], entry: Pair, limit: float) -> Judgement:
    """The judgement with the error's rms over all runs; a tail of its own stays."""
    squares = [judgement.error**2, *(e**2 for e in errors)]
    excess = judgement.excess * math.sqrt(sum(squares) / len(squares)) / judgement.error
    return replace(
        judgement, excess=excess, alone=judgement.score,
        worst=judgement.worst or (entry.farthest(limit * judgement.error / judgement.excess)),
        note=f"the error is {excess:.3g} times what rounding the operands must cost (rms of {len(squares)} runs, each "
        f"on operands that are a little smaller; {judgement.excess:.3g} times in the judged one)",
    )  # fmt: skip
