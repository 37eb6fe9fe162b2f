"""The smallest input on which a verdict stays the same, and a test that shows it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

import torch

from precision_runtime.asked import budget_of, check_subject, seed_of, whole
from precision_runtime.auditing import Originals, audit
from precision_runtime.errors import AuditError, ConfigurationError
from precision_runtime.modes import parse_mode
from precision_runtime.options import Options
from precision_runtime.pasting import Draw, source_of_test
from precision_runtime.ranging.quickly import verdict
from precision_runtime.record import Report
from precision_runtime.tree import leaves, map_tensors

# With more elements than this, values that a seed draws make a shorter test than those that were given.
SHORT = 64
_SEEDS = range(3)
_DIGITS = (1, 2, 3)


@dataclass(frozen=True, eq=False)
class Shrunk:
    """The inputs that are left, the audit's ``report`` on them, and ``source``: a test that fails in the same way.

    ``before`` and ``after`` count the elements of all tensors; ``audits`` is the number of verdicts that it took.
    ``draws`` are tensors that the test's text draws by a seed, by their path in ``(args, kwargs)``.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    seed: int
    report: Report
    source: str
    before: int
    after: int
    audits: int
    draws: Mapping[str, Draw] = field(default_factory=dict)

    def __str__(self) -> str:
        size = f"{self.before} elements to {self.after}, by {self.audits} audits"
        return f"shrunk from {size}; the same failure, as a test:\n\n{self.source}"


def shrink(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    mode: object,
    *,
    accelerator: object = "cpu",
    gradients: bool = True,
    budget: float = 2.0,
    seed: int = 0,
    audits: int = 200,
    originals: Originals | None = None,
    name: str | None = None,
    options: Options | None = None,
    report: Report | None = None,
) -> Shrunk:
    """Find the smallest input on which ``function`` fails as it does on ``args`` and ``kwargs``.

    "As it does": the first finding names the same module, kind and direction. In this order, and as long as that
    stays true: rows of each axis are left out (the same of every tensor that shares the axis), magnitudes are brought
    nearer to 1 by powers of two, values become equal, or zero, or have fewer digits; many values become those that a
    seed draws; the audit's own seed becomes 0. What is left is a local minimum: no single one of these steps makes
    it smaller, unless ``audits``, the most verdicts that may be asked for, ran out.

    ``source`` names the function ``name``; without one, by its own name where it has one, or else ``subject``: paste
    the test where that name means the same function. For inputs that no text can make (objects of your own), it is a
    comment that says so. ``report`` is that of the failing audit, where there is one: it spares that audit. The other
    arguments, and the errors, are ``audit``'s; raises ``ConfigurationError`` where nothing fails, and ``AuditError``
    where the same inputs fail otherwise when they are audited again.
    """
    check_subject(function, "shrink")
    if not isinstance(args, (tuple, list)):
        raise ConfigurationError(
            f"shrink() got {type(args).__name__} as args; pass the inputs as a tuple, as in "
            "shrink(function, (x,), None, mode)"
        )
    if not isinstance(kwargs, (Mapping, NoneType)):
        raise ConfigurationError(
            f"shrink() got {type(kwargs).__name__} as kwargs; pass a dict of inputs by name, or None"
        )
    budget, seed = budget_of(budget), seed_of(seed)
    audits = whole("audits", audits, 1, allowed="shrink() needs one audit at least")
    parsed = parse_mode(mode, "shrink(mode=...)")
    options = options or Options()
    asked: dict[str, Any] = {"accelerator": accelerator, "gradients": gradients, "budget": budget, "options": options}
    more: dict[str, Any] = {**asked, "originals": originals or Originals()}

    def quick(inputs: Any, seed: int) -> Report:
        with warnings.catch_warnings(record=True):  # of inputs that are not the user's
            return verdict(function, inputs[0], inputs[1], parsed, seed=seed, **more)

    def full(inputs: Any, seed: int) -> Report:
        with warnings.catch_warnings(record=True):
            return audit(function, *inputs[0], mode=parsed, kwargs=inputs[1], seed=seed, **more)

    given = (tuple(args), dict(kwargs or {}))
    first = full(given, seed) if report is None else report
    if first.ok:
        raise ConfigurationError(
            f"shrink() got inputs on which nothing fails: {first.subject} holds in {first.mode}; "
            "pass the inputs, the seed and the budget of a failing audit"
        )
    # The search for the guilty op takes most of an audit. It may settle the kind, or find that nothing fails after all:
    # then it cannot be spared, and what is left of the audits, a quarter at least, is asked again with it.
    spent = 0
    for judge, most in ((quick, audits - audits // 4), (full, audits)):
        search = _Search(judge, first if judge is full else quick(given, seed), given, seed, most - spent)
        search.run()
        spent += search.audits
        last = full(search.inputs, search.seed)
        if _key(last) == _key(first):
            break
    else:
        now = last.findings[0].title() if last.findings else "nothing fails"
        raise AuditError(
            f"the same inputs end otherwise when audited again: first {first.findings[0].title()}; then {now}. "
            "Code that keeps something from call to call, or draws from generators of its own, cannot be shrunk"
        )
    subject = name or _name_of(function)
    try:
        source = source_of_test(
            subject, parsed, search.inputs[0], search.inputs[1], search.draws, last, asked, search.seed
        )
    except ConfigurationError as error:  # what was found stands without it
        source = f"# {error}\n"
    return Shrunk(
        search.inputs[0],
        search.inputs[1],
        search.seed,
        last,
        source,
        _elements(given),
        _elements(search.inputs),
        spent,
        search.draws,
    )


def smallest(items: Sequence[int], holds: Callable[[Sequence[int]], bool]) -> list[int]:
    """A part of ``items``, in order, for which ``holds`` and of which no single one may be left out.

    Zeller's minimising delta debugging (2002): parts are left out, halves first, then ever smaller ones.
    """
    kept, size = list(items), max(1, len(items) // 2)
    while len(kept) > 1:
        for start in range(0, len(kept), size):
            rest = kept[:start] + kept[start + size :]
            if rest and holds(rest):
                kept = rest
                size = min(size, max(1, len(kept) // 2))
                break
        else:
            if size == 1:
                break
            size = max(1, size // 2)
    return kept


class _Search:
    """``judge`` is asked ``most`` times at most, its ``report`` on ``inputs`` among them."""

    def __init__(self, judge: Callable[[Any, int], Report], report: Report, inputs: Any, seed: int, most: int) -> None:
        self._judge, self._most = judge, most
        self.inputs, self.seed, self.audits = inputs, seed, min(1, most)
        self.draws: dict[str, Draw] = {}  # tensors that a seed draws, by path
        self._key = _key(report)
        self._worst = report.findings[0].worst if report.findings else None

    def run(self) -> None:
        """All steps; those that made nothing smaller need no second turn."""
        while True:
            before = self._size()
            self._axes()
            if self._size() == before:
                break
        self._scale()
        self._simplify()
        self._draw()
        if self.seed != 0 and self._same(self.inputs, 0):
            self.seed = 0

    # -- the question -----------------------------------------------------------------------------------------------

    def _same(self, inputs: Any, seed: int | None = None) -> bool:
        """Whether it fails in the same way; whatever the code raises for a smaller input is another matter."""
        if self.audits >= self._most or self._key is None:
            return False
        self.audits += 1
        try:
            report = self._judge(inputs, self.seed if seed is None else seed)
        except Exception:
            return False
        return _key(report) == self._key

    def _take(self, inputs: Any) -> bool:
        if not self._same(inputs):
            return False
        self.inputs = inputs
        return True

    def _size(self) -> int:
        return _elements(self.inputs)

    def _replaced(self, new: Mapping[str, torch.Tensor]) -> Any:
        by_id = {id(t): new[path] for path, t in leaves(self.inputs) if path in new}
        return map_tensors(lambda t: by_id.get(id(t), t), self.inputs)

    # -- the steps --------------------------------------------------------------------------------------------------

    def _axes(self) -> None:
        for places in list(self._groups()):
            tensors = dict(leaves(self.inputs))
            if any(path not in tensors or tensors[path].dim() <= d for path, d in places):
                continue
            size = tensors[places[0][0]].shape[places[0][1]]
            if any(tensors[path].shape[d] != size for path, d in places) or size < 2:
                continue

            def without(kept: Sequence[int], places: Any = places, tensors: Any = tensors) -> Any:
                new = dict(tensors)
                index = torch.tensor(list(kept))
                for path, d in places:
                    new[path] = new[path].index_select(d, index.to(new[path].device))
                return self._replaced({path: new[path] for path, _ in places})

            # An axis that other things fix (features of a layer) is told by its first two halves.
            half = size // 2
            guess = [[i] for i in self._suspects(size)]
            tries = [*guess, list(range(half)), list(range(half, size))]
            start = next((kept for kept in tries if self._same(without(kept))), None)
            if start is None and not self._same(without(list(range(size - 1)))):
                continue
            self._cut(start or list(range(size - 1)), without)

    def _cut(self, start: Sequence[int], without: Callable[[Sequence[int]], Any]) -> None:
        self.inputs = without(smallest(start, lambda kept: self._same(without(kept))))

    def _suspects(self, size: int) -> list[int]:
        """Where the worst element of the finding stands, along any axis."""
        return sorted({i for i in self._worst.index if i < size}) if self._worst is not None else []

    def _groups(self) -> Iterator[list[tuple[str, int]]]:
        """Axes that may only be cut together: the same axis of all tensors that are as long there; then any axis."""
        tensors = [(path, t) for path, t in leaves(self.inputs) if t.layout is torch.strided]
        seen: list[list[tuple[str, int]]] = []
        for d in range(max((t.dim() for _, t in tensors), default=0)):
            for size in dict.fromkeys(t.shape[d] for _, t in tensors if t.dim() > d):
                seen.append([(path, d) for path, t in tensors if t.dim() > d and t.shape[d] == size])
        for size in dict.fromkeys(s for _, t in tensors for s in t.shape):
            group = [(path, d) for path, t in tensors for d in range(t.dim()) if t.shape[d] == size]
            if group not in seen:
                seen.append(group)
        yield from seen

    def _floating(self) -> dict[str, torch.Tensor]:
        return {path: t for path, t in leaves(self.inputs) if t.is_floating_point() and t.numel()}

    def _scale(self) -> None:
        """Bring the largest magnitude nearer to 1: as few powers of two from it as still fail."""
        tensors = self._floating()
        largest = max((float(t.abs().max()) for t in tensors.values()), default=0.0)
        if not math.isfinite(largest) or largest == 0.0:
            return
        far = math.floor(math.log2(largest))
        good, bad = 0, abs(far) + 1  # powers of two to take away
        sign = -1 if far > 0 else 1
        while bad - good > 1:
            middle = (good + bad) // 2
            scaled = {path: t * 2.0 ** (sign * middle) for path, t in tensors.items()}
            good, bad = (middle, bad) if self._take(self._replaced(scaled)) else (good, middle)

    def _simplify(self) -> None:
        for path in self._floating():
            t = self._floating()[path]
            finite = t[torch.isfinite(t)]
            if finite.numel() == 0:
                continue
            extreme = finite.flatten()[int(finite.abs().argmax())]
            if t.numel() > 1 and self._take(self._replaced({path: torch.full_like(t, float(extreme))})):
                t = self._floating()[path]
            elif 1 < t.numel() <= SHORT:
                self._zero(path, t)
                t = self._floating()[path]
            for digits in _DIGITS:
                shorter = _rounded(t, digits)
                if torch.equal(shorter, t) or self._take(self._replaced({path: shorter})):
                    break

    def _zero(self, path: str, t: torch.Tensor) -> None:
        def only(kept: Sequence[int]) -> Any:
            mask = torch.zeros(t.numel(), dtype=torch.bool, device=t.device)
            mask[list(kept)] = True
            return self._replaced({path: torch.where(mask.view(t.shape), t, torch.zeros_like(t))})

        kept = smallest(range(t.numel()), lambda kept: self._same(only(kept)))
        if len(kept) < t.numel():
            self.inputs = only(kept)

    def _draw(self) -> None:
        for path, t in self._floating().items():
            if t.numel() <= SHORT or not bool(torch.isfinite(t).all()):
                continue
            deviation, mean = torch.std_mean(t.double())
            for seed in _SEEDS:
                draw = Draw(seed, _decimal(float(mean)), _decimal(float(deviation)), tuple(t.shape), t.dtype)
                if self._take(self._replaced({path: draw.tensor().to(t.device)})):
                    self.draws[path] = draw
                    break


def _key(report: Report) -> tuple[str, str, str] | None:
    """What must stay the same: module, kind and direction of the first finding."""
    return next(((f.module, f.kind, f.where) for f in report.findings), None)


def _elements(inputs: Any) -> int:
    return sum(t.numel() for _, t in leaves(inputs))


def _rounded(t: torch.Tensor, digits: int) -> torch.Tensor:
    """Each value to so many significant decimal digits."""
    rounded = [_decimal(v, digits) for v in t.detach().double().flatten().tolist()]
    return torch.tensor(rounded, dtype=torch.float64, device=t.device).to(t.dtype).view(t.shape)


def _decimal(value: float, digits: int = 2) -> float:
    return float(f"{value:.{digits - 1}e}") if math.isfinite(value) else value


def _name_of(function: Any) -> str:
    name = getattr(function, "__name__", "")
    return name if isinstance(name, str) and name.isidentifier() else "subject"
