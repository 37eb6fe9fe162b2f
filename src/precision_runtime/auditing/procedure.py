"""The audit itself: one trial of the code in the mode, and a search for a repair where that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from precision_runtime.accelerators import resolve
from precision_runtime.asked import budget_of, check_subject, seed_of
from precision_runtime.auditing.executing.discover import find_modules, name_of
from precision_runtime.auditing.executing.originals import Originals
from precision_runtime.auditing.executing.randomness import seeded
from precision_runtime.auditing.executing.references import References
from precision_runtime.auditing.repair import find_repair, wide
from precision_runtime.auditing.trial import Trial
from precision_runtime.automatic import placed
from precision_runtime.capability import support
from precision_runtime.errors import ConfigurationError, UnsupportedError
from precision_runtime.modes import parse_mode
from precision_runtime.options import Options, islands_of
from precision_runtime.record import Remark, Report
from precision_runtime.strategies import strategy_for


def audit(
    function: Callable[..., Any],
    *args: Any,
    mode: object,
    accelerator: object = "cpu",
    kwargs: Mapping[str, Any] | None = None,
    gradients: bool = True,
    budget: float = 2.0,
    seed: int = 0,
    originals: Originals | None = None,
    references: References | None = None,
    name: str | None = None,
    islands: object = (),
    repair: bool = False,
    options: Options | None = None,
) -> Report:
    """Run ``function`` in ``mode`` and in FP64, and judge what the precision cost. There is no tolerance to choose.

    ``function`` is a module, or any callable over modules and tensors; ``args`` and ``kwargs`` are its inputs, any
    nesting, of any dtype: they are the truth, and are cast as the mode casts. Modules come back as they were, also
    when user code raises. ``gradients`` judges the backward pass, too, where outputs carry gradients. ``budget`` is the
    number of bits that may be lost beyond what the mode must lose. Same seed, same verdict.

    ``originals`` are values from before a cast that has already happened; ``references`` share FP64 runs between modes.
    ``islands`` are parts kept wide, as ``PrecisionRuntime`` takes them; ``options`` is the rest of what a runtime was
    given (``runtime.strategy.options``), and has the islands where none are named here. ``repair`` looks, where the
    mode fails, for the smallest set of modules to keep in FP32 so that it holds (``report.repair``); each proposal
    costs an audit.

    Raises ``UnsupportedError`` where this machine cannot run the mode, ``AuditError`` where the code runs in float32
    but has no FP64 reference, and whatever the code itself raises when it does not even run in float32.
    """
    check_subject(function, "audit")
    budget, seed = budget_of(budget), seed_of(seed)
    parsed = parse_mode(mode, "audit(mode=...)")
    options = options or Options()
    lane = support(parsed, accelerator, options.recipe)
    if not lane.ok:
        raise UnsupportedError(f"{parsed} on {lane.accelerator} cannot be audited here: {lane.reason}")
    place, device = placed(parsed, lane.accelerator), resolve(lane.accelerator)
    parsed = place.mode
    pairs, automatic = islands_of(islands) if islands else (options.islands, options.auto_islands)
    originals, references = originals or Originals(), references or References(1 if repair else 0)

    def judge(kept: Sequence[str] = (), explain: bool = True) -> Report:
        islands = tuple(sorted({**dict(pairs), **dict.fromkeys(kept, wide(parsed))}.items()))
        strategy = strategy_for(parsed, device, replace(options, islands=islands, auto_islands=automatic))
        with seeded(seed, device):
            trial = Trial(
                function, args, dict(kwargs or {}), parsed, strategy, lane.status, lane.accelerator,
                gradients, budget, seed, originals, references, name or name_of(function), explain,
            )  # fmt: skip
            if place.runs:
                trial.remarks.append(Remark("lane", place.reason))
            return trial.report()

    report = judge()
    if not repair or report.ok:
        return report
    roots = find_modules(function, args, dict(kwargs or {}))
    if len(roots) != 1:
        raise ConfigurationError(f"a repair is looked for in one model, and this function runs {len(roots)}")
    ((root, model),) = roots.items()
    found = find_repair(report, root, model, parsed, device.type, lambda kept: judge(kept, explain=False))
    return replace(report, repair=found)
