"""Range and precision told apart: the audit in formats that have one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from precision_runtime.asked import budget_of, check_subject, seed_of
from precision_runtime.auditing import Originals, References
from precision_runtime.auditing.executing.discover import name_of
from precision_runtime.errors import unknown_names
from precision_runtime.formats import FORMATS, Format
from precision_runtime.ranging.emulation import emulate
from precision_runtime.ranging.grid import HYBRIDS
from precision_runtime.ranging.need import Forecast, Need, Sensitivity

_PREFIX = {"float16": "16", "bfloat16": "bf16"}
_FAMILIES = ("true", "mixed")
# With more precision than float16 the question is whether the code then does as well as a float16 mode must, not
# whether it is as good as float32 could be.
_YARDSTICKS = {"float32's precision with float16's range": FORMATS["float16"]}


def sensitivity(
    function: Callable[..., Any],
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    families: Iterable[str] = _FAMILIES,
    gradients: bool = True,
    budget: float = 2.0,
    seed: int = 0,
    originals: Originals | None = None,
    name: str | None = None,
) -> Sensitivity:
    """Say whether ``function`` needs range or precision, and in which 16-bit modes it will hold.

    It is audited in float16 and bfloat16, emulated op by op in FP64, so that no hardware needs to have them. Where one
    of them fails, three formats that nothing computes in follow: float16's precision with float32's range, bfloat16's
    with float16's, and float32's precision with float16's range. What holds says what was missing.

    ``families``: "true" (every op in the format) and "mixed" (where torch's autocast for CPUs chooses it). The other
    arguments, and the errors, are ``audit``'s.
    """
    check_subject(function, "sensitivity")
    budget, seed = budget_of(budget), seed_of(seed)
    chosen = tuple(families)
    unknown = [f for f in chosen if f not in _FAMILIES]
    if unknown:
        raise unknown_names("family", unknown, _FAMILIES, "sensitivity(families=...)", plural="families")
    originals, references = originals or Originals(), References(1)

    def forecast(grid: Format, family: str) -> Forecast:
        report = emulate(
            function, args, kwargs or {}, grid, autocast=family == "mixed", yardstick=_YARDSTICKS.get(grid.name),
            gradients=gradients, budget=budget,
            seed=seed, originals=originals, references=references, name=name,
        )  # fmt: skip
        first = report.findings[0] if report.findings else None
        return Forecast(
            mode=f"{_PREFIX[grid.name]}-{family}" if grid.name in _PREFIX else "", family=family, format=grid.name,
            precision=grid.precision, emax=grid.emax, ok=report.ok, lost_bits=report.lost_bits,
            expected_error=report.figures.get("expected_error", 0.0),
            error=report.figures.get("error", float("inf")),
            blame=f"{first.module or first.module_type or 'the whole function'}: {first.kind} in {first.where}"
            if first else "",
        )  # fmt: skip

    rows: list[Forecast] = []
    needs: dict[str, Need] = {}
    for family in chosen:
        half = [forecast(FORMATS[n], family) for n in _PREFIX]
        hybrids = [] if all(r.ok for r in half) else [forecast(grid, family) for grid in HYBRIDS.values()]
        rows += [*half, *hybrids]
        needs[family] = _need(*(r.ok for r in (*half, *hybrids)))
    return Sensitivity(name or name_of(function), budget, needs, tuple(rows))


def _need(float16: bool, bfloat16: bool, wide: bool = True, coarse: bool = True, fine: bool = True) -> Need:
    """``wide``: float16 with range, ``coarse``: bfloat16 without it, ``fine``: float16 with precision.

    Each format is judged by its own roundings, so bfloat16 may hold where float16 with range does not. It has range and
    the least precision of all: where it holds and float16 does not, range is what was missing.
    """
    if float16:  # bfloat16 has range enough
        return "nothing" if bfloat16 else "precision"
    if wide or bfloat16:
        return "range or precision" if fine else "range"
    return "precision" if fine else "range and precision"
