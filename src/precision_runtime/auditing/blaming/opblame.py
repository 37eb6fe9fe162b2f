"""Which op of a failing call is guilty, and the proof: the same call again with that op alone in FP64.

Two searches, by cause and by effect:

- The run is made with everything from its k-th op on in FP64, and k is bisected: the op at which the failure becomes
  one that no precision downstream repairs is the **cause**. It says where information was lost, whatever the amounts.
- The run is followed in FP64 op by op (``Following``): where inf or NaN was born, which op's result is off by many
  times what its operands were (an unstable formula), whose own kernel is wrong, whose whole numbers were lost.

The cause is named, with two exceptions. A chain of functions of one value, such as log(sigmoid(x)) or 1 - cos(x), is a
formula, and the op of it that amplifies is named (with its derivative, where a gradient fails): nothing is wrong with a
rounded sigmoid. And where the cause alone in FP64 leaves more than a trace of the failure, other roundings are as bad:
then the op behind them all that amplifies is named, such as the subtraction of mean(x)^2 from mean(x^2).
Whatever is named is then computed in FP64 alone, and the figure that remains is the proof; where it fails, the next
candidate is tried, and where all fail, the finding says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from precision_runtime.auditing.blaming.following import Event, Following
from precision_runtime.auditing.blaming.observer import Site
from precision_runtime.auditing.blaming.proof import Scene, Stage
from precision_runtime.auditing.blaming.widened import Widening
from precision_runtime.auditing.executing.dispatch import PRODUCTS
from precision_runtime.auditing.executing.failing import first_line
from precision_runtime.auditing.judging.sheet import Verdict
from precision_runtime.record import Kind, bits, lost_bits

# Where nothing alone brings the figure below the limit, what makes it this many times smaller is guilty of most of it.
FALL = 4.0
# The same line of code that runs so often, each result rounded, is an accumulation.
MANY = 16
# A function with more matrix products and convolutions than this is a model: keeping most of them in FP32 is no island.
# Steep functions that are defects have 1 to 3 of them, models that are steep as a whole 32 and more (measured).
MODEL = 8
# Ops that amplify what the cause lost, tried one after the other: x - mean(x) amplifies, too, and is right.
AMPLIFIERS = 4
# A quotient of differences (of a network, by a small step) has as many products in it as there are values to compare,
# and yet it is one formula. Models that are steep as a whole have no difference in them that is steep (measured).
_DIFFERENCES = frozenset(("aten::sub", "aten::add", "aten::rsub"))
_CASTS = frozenset(
    f"aten::{n}" for n in ("_to_copy", "to", "arange", "full", "scalar_tensor", "linspace", "lift_fresh_copy")
)


@dataclass(frozen=True)
class Blame:
    """The guilty op: its name ('aten::log'), the user's line, what it did, and what remains without it."""

    op: str | None
    line: str = ""
    kind: Kind | None = None  # None: the verdict's own kind stands
    did: str = ""
    proof: str = ""
    proven: bool = False
    spread: bool = False  # no part of the call explains it, only most of the products that a model makes


@dataclass(frozen=True)
class _Candidate:
    """Sites to compute in FP64, and the event that names one of them, with what it did.

    ``whole``: only what passes by far proves it, because other candidates are left.
    """

    sites: tuple[Site, ...]
    event: Event
    did: str
    kind: Kind | None = None
    whole: bool = False


def blame_op(stage: Stage, verdict: Verdict) -> Blame | None:
    """Name the op that a failing call fails by; None where nothing wider than the mode exists to prove it with."""
    if stage.mode.compute == "float64":
        return None
    try:
        return _search(stage, verdict)
    except Exception as error:  # the audit's verdict stands without it
        return Blame(
            None, proof=f"the search for the op raised {type(error).__name__}: {first_line(error)}; not proven"
        )


def _search(stage: Stage, verdict: Verdict) -> Blame | None:
    scene, before = _again(stage, verdict)
    if before <= scene.line:
        return Blame(None, proof="the call does not fail when it is run again by itself: no op can be singled out")
    following = Following()
    scene.run(following)
    search = _Search(scene, before, following.events, following.count)
    tried: list[_Candidate] = []
    for candidate in search.candidates():
        tried.append(candidate)
        if search.proves(candidate):
            return search.named(candidate, proven=True)
    if not tried:
        return None
    best = min(tried, key=search.without) if search.remains <= scene.line else tried[0]
    return search.named(best, proven=math.isfinite(before) and search.without(best) * FALL <= before)


def _again(stage: Stage, verdict: Verdict) -> tuple[Scene, float]:
    """The scene in which the call fails again, and its figure: the call may have run outside the mode's autocast."""
    scene, before = Scene(stage, verdict), 0.0
    for autocast in (True, False) if stage.mode.autocast and verdict.call is not None else (True,):
        scene.autocast = autocast
        before = scene.figure()
        if before > scene.line:
            break
    return scene, before


@dataclass
class _Search:
    scene: Scene
    before: float
    events: dict[int, Event]
    count: int
    remains: float = 0.0  # the figure with every op in FP64
    figures: dict[tuple[Site, ...], float] = field(default_factory=dict)

    def candidates(self) -> Iterator[_Candidate]:
        """Most likely first; each is computed only where those before it were not proven."""
        cause = self._cause()
        if cause is not None:
            formula = None if cause.born or self._is_cast(cause) else self._formula(cause)
            if formula is not None:
                yield _Candidate((cause.step.site, formula.step.site), formula, *self._did(formula))
            amplifiers = self._amplifiers(cause) if math.isfinite(self.before) else []
            yield _Candidate((cause.step.site,), cause, *self._lost(cause), whole=bool(amplifiers))
            for amplifier in amplifiers:
                yield _Candidate(self._between(cause, amplifier), amplifier, *self._did(amplifier))
            if amplifiers:
                yield _Candidate((cause.step.site,), cause, *self._lost(cause))
        backward = self.scene.verdict.where == "backward"
        born = next((e for e in self.events.values() if e.born and (e.step.backward or not backward)), None)
        if born is not None:
            yield _Candidate((born.step.site,), born, *self._did(born))
        steep = next((e for e in self.events.values() if self._amplification(e) > self.scene.line), None)
        if steep is not None:
            yield _Candidate((steep.step.site,), steep, *self._did(steep))

    def proves(self, candidate: _Candidate) -> bool:
        """Whether what remains with it in FP64 passes (with ``whole``: by far)."""
        return self.without(candidate) <= self.scene.line / (2.0 if candidate.whole else 1.0)

    def without(self, candidate: _Candidate) -> float:
        """The figure with the candidate's sites alone in FP64."""
        if candidate.sites not in self.figures:
            self.figures[candidate.sites] = self.scene.figure(Widening(lambda step: step.site in candidate.sites))
        return self.figures[candidate.sites]

    def named(self, candidate: _Candidate, proven: bool) -> Blame:
        """Put the verdict on a candidate into words."""
        event, sites = candidate.event, candidate.sites
        op = event.step.name if candidate.kind == "kernel" and self._is_off(event) else event.step.site.op
        names = list(dict.fromkeys(f"`{public_name(s.op)}`" for s in sites))
        who = " and ".join(names) if len(names) < 3 else f"{names[-1]} and what feeds it, back to {names[0]},"
        fell = f"from {bits(lost_bits(self.before))} to {bits(lost_bits(self.without(candidate)))}"
        if proven:
            proof = f"with {who} alone in FP64 the loss falls {fell}"
            if self.scene.stage.mode.low:
                single = self.scene.figure(Widening(lambda step: step.site in sites, single=True))
                proof += f" (in FP32: {bits(lost_bits(single))})"
        else:
            why = (
                "so it does with every op in FP64: a value that depends on the dtype (torch.finfo, a constant, an "
                "input) is to blame"
                if self.remains > self.scene.line
                else "no single op explains it, the formula as a whole does"
            )
            proof = f"the proof fails: with {who} alone in FP64 the loss goes {fell}; {why}"
        explained = proven and 2.0 * self.without(candidate) <= self.before  # what falls from 26 to 23 is elsewhere
        spread = self._spread(sites if explained else None) and not (explained and self._differs(event))
        return Blame(public_name(op), event.step.site.line, candidate.kind, candidate.did, proof, proven, spread)

    def _spread(self, sites: tuple[Site, ...] | None) -> bool:
        """Whether these sites (None: there are none that explain the failure) are most of a model's work."""
        products = [e.step.site in (sites or ()) for e in self.events.values() if e.step.name in PRODUCTS]
        return len(products) > MODEL and (sites is None or 2 * sum(products) > len(products))

    def _differs(self, event: Event) -> bool:
        """Whether the op is a difference that alone amplifies so much: it is the formula, however much feeds it."""
        return event.step.name in _DIFFERENCES and self._amplification(event) > self.scene.line

    # -- by effect --------------------------------------------------------------------------------------------------

    def _cause(self) -> Event | None:
        """The op whose result, once it is as the mode has it, no FP64 computation that follows repairs."""
        self.remains = self._from(0)
        if self.remains > self.scene.line:
            return None
        target = min(self.scene.line, math.sqrt(max(self.remains, 0.1) * self.before))
        low, high = 0, self.count
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._from(middle) <= target else (low, middle)
        return self.events.get(low)

    def _from(self, number: int) -> float:
        return self.scene.figure(Widening(lambda step: step.number >= number))

    # -- by cause ---------------------------------------------------------------------------------------------------

    def _formula(self, cause: Event) -> Event | None:
        """Among the ops that are functions of the cause's result alone, the first that amplifies.

        An op counts with its derivative, where a gradient is judged, also for the birth of inf or NaN in it. The event
        returned is the one that shows it.
        """
        derivatives: dict[Site, list[Event]] = {}
        for event in self.events.values():
            if event.step.backward and self.scene.verdict.where == "backward" and not cause.step.backward:
                derivatives.setdefault(event.step.site, []).append(event)
        alone = {cause.step.number}
        for number, event in self.events.items():
            if number <= cause.step.number or event.step.backward != cause.step.backward:
                continue
            if not event.sources or any(s not in alone for s in event.sources) or not 0 < event.numel <= cause.numel:
                continue
            alone.add(number)
            for shown in (event, *derivatives.get(event.step.site, ())):
                broken = shown.born and shown.step.backward  # inf in a forward result is that of the cause's zero
                if broken or self._amplification(shown) > self._limit:
                    return None if event.step.site == cause.step.site else shown
        return None

    def _amplifiers(self, cause: Event) -> list[Event]:
        """The first op that amplifies on each of several lines, among those that the cause's result flows into."""
        inside, found = {cause.step.number}, dict[Site, Event]()
        for number, event in self.events.items():
            if number > cause.step.number and any(s in inside for s in event.sources):
                inside.add(number)
                if event.step.site != cause.step.site and self._amplification(event) > self._limit:
                    found.setdefault(event.step.site, event)
        return list(found.values())[:AMPLIFIERS]

    def _between(self, first: Event, last: Event) -> tuple[Site, ...]:
        """The sites of ``last`` and of all that flows into it, no earlier than ``first``; ``last`` at the end."""
        waiting, found = [last.step.number], set[int]()
        while waiting:
            number = waiting.pop()
            if number not in found and number >= first.step.number and number in self.events:
                found.add(number)
                waiting += [s for s in self.events[number].sources if s is not None]
        sites = dict.fromkeys(self.events[n].step.site for n in sorted(found))
        return (*(s for s in sites if s != last.step.site), last.step.site)

    def _lost(self, event: Event) -> tuple[str, Kind | None]:
        """What the cause did, and the kind that this is; None leaves the verdict's."""
        op = f"`{public_name(event.step.site.op)}`"
        free = self.scene.verdict.worst.kind is None and not self.scene.steep  # the verdict has no kind of its own
        alike = (event.step.site, event.step.name, event.step.backward)
        times = sum((e.step.site, e.step.name, e.step.backward) == alike for e in self.events.values())
        if event.born:
            return self._did(event)
        if event.lost:
            return f"{op} changes whole numbers that are beyond the dtype's exact ones", "cast" if free else None
        if self._is_cast(event):
            return f"{op} casts away what nothing after it can bring back", "cast" if free else None
        if event.zeros and not free:
            return f"{op} makes {event.zeros} of {event.numel} values zero", None
        if event.flushed > 0.5:
            which = f"{event.small} of {event.numel} values"
            return (
                f"{op} makes {which} so small that the dtype holds few of their digits, or none",
                "underflow" if free else None,
            )
        if self._is_off(event):
            times_u = f"{event.local / self._u:.0f} times one rounding"
            return f"{op} is {times_u} away from the right result for its operands", "kernel" if free else None
        if times >= MANY:
            return f"{op} runs {times} times and rounds each result", "kernel" if free else None
        return f"{op} rounds its result, and nothing after it can bring back what that loses", None

    def _did(self, event: Event) -> tuple[str, Kind | None]:
        """What an op that is no cause by itself did, and the kind."""
        op = f"`{public_name(event.step.site.op)}`"
        op = f"the derivative of {op}" if event.step.backward else op
        if event.born:
            return f"inf or NaN is born in {op}, from finite operands", "range"
        if 2.0 * event.local > event.outgoing:  # an error of its own, none that came in
            return self._lost(event)
        times = f"{self._amplification(event):.0f} times what its operands were"
        return f"{op} amplifies: its result is off by {times}", None

    def _amplification(self, event: Event) -> float:
        return event.outgoing / max(event.incoming, self._u)

    def _is_off(self, event: Event) -> bool:
        return event.local > self._limit * self._u and event.flushed <= 0.5

    @staticmethod
    def _is_cast(event: Event) -> bool:
        return event.lost or event.step.site.op in _CASTS

    @property
    def _limit(self) -> float:
        return self.scene.stage.judge.yardstick.limit

    @property
    def _u(self) -> float:
        return self.scene.stage.judge.yardstick.own_u(self.scene.verdict.call, self.scene.verdict.where)


def public_name(op: str) -> str:
    """The name that a user knows: 'aten::softmax' for 'aten::_softmax', 'aten::add' for 'aten::add_'.

    ``aten::_to_copy`` keeps its name: every cast is one.
    """
    space, _, name = op.partition("::")
    plain = name.removesuffix("_") if not name.endswith("__") else name
    if plain.startswith("_scaled_dot_product") and not plain.endswith("backward"):
        plain = "scaled_dot_product_attention"
    for prefix in ("native_", "_"):
        shorter = plain.removeprefix(prefix)
        if plain not in (shorter, "_to_copy") and hasattr(torch.ops.aten, shorter):
            plain = shorter
    return f"{space}::{plain}"
