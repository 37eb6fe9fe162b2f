"""The audit's verdict without the search for the guilty op: for measurements that need many verdicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from precision_runtime.accelerators import resolve
from precision_runtime.asked import budget_of, seed_of
from precision_runtime.auditing.executing.discover import name_of
from precision_runtime.auditing.executing.originals import Originals
from precision_runtime.auditing.executing.randomness import seeded
from precision_runtime.auditing.executing.references import References
from precision_runtime.auditing.trial import Trial
from precision_runtime.automatic import placed
from precision_runtime.capability import support
from precision_runtime.errors import UnsupportedError
from precision_runtime.modes import Mode, parse_mode
from precision_runtime.options import Options
from precision_runtime.record import Report
from precision_runtime.strategies import strategy_for


def verdict(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    mode: object,
    accelerator: object = "cpu",
    *,
    gradients: bool = True,
    budget: float = 2.0,
    seed: int = 0,
    originals: Originals | None = None,
    references: References | None = None,
    name: str | None = None,
    options: Options | None = None,
) -> Report:
    """What ``audit`` would find, with its arguments and errors. Kinds are those that the judge alone can tell."""
    budget, seed = budget_of(budget), seed_of(seed)
    parsed = parse_mode(mode)
    options = options or Options()
    lane = support(parsed, accelerator, options.recipe)
    if not lane.ok:
        raise UnsupportedError(f"{parsed} on {lane.accelerator} cannot be audited here: {lane.reason}")
    place = placed(parsed, lane.accelerator)
    return run_trial(
        Trial, function, args, kwargs, place.mode, place.mode, lane.accelerator, lane.status, gradients, budget, seed,
        originals, references, name, options,
    )  # fmt: skip


def run_trial(
    trial: type[Trial], function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], mode: Mode,
    carrier: Mode, accelerator: str, status: str, gradients: bool, budget: float, seed: int,
    originals: Originals | None, references: References | None, name: str | None, options: Options | None = None,
) -> Report:  # fmt: skip
    """One trial in ``mode``, whose modules are cast as ``carrier`` casts."""
    device = resolve(accelerator)
    with seeded(seed, device):
        return trial(
            function, tuple(args), dict(kwargs), mode, strategy_for(carrier, device, options or Options()), status,
            accelerator, gradients, budget, seed, originals or Originals(), references or References(0),
            name or name_of(function), False,
        ).report()  # fmt: skip
