"""``--precision-bisect``: a failed check is followed by the search for its repair."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from precision_runtime import Report
from precision_runtime.auditing import Originals, audit
from precision_runtime.auditing.executing.discover import find_modules
from precision_runtime.errors import PrecisionError
from precision_runtime.record import Repair
from precision_runtime.setup.forwarding import is_set_up
from pytest_precision.pristine import Picture
from pytest_precision.shrinking import RAISED


def repaired(
    report: Report,
    function: Callable[..., Any],
    args: Sequence[Any],
    asked: Mapping[str, Any],
    before: Mapping[int, Picture],
    originals: Originals,
) -> Report:
    """``report`` of a failed check with its repair, or with the reason why none could be looked for.

    ``asked`` are the arguments of the audit that failed, ``before`` pictures of set-up models from before their set-up,
    by their identity. Nothing that goes wrong in the search hides the finding.
    """
    roots = list(find_modules(function, args, asked["kwargs"] or {}).values())
    if len(roots) != 1:
        return _without(report, f"a repair is looked for in one model, and this check runs {len(roots)}")
    (model,) = roots
    # A part of a set-up model is judged in the mode, too, and cast like the whole of it.
    picture = next((each for each in before.values() if any(part is model for part in each.model.modules())), None)
    if picture is None and any(is_set_up(part) for part in model.modules()):
        return _without(report, "the model was not set up by precision_ctx.setup: what it was before is not known")
    try:
        with nullcontext() if picture is None else picture.shown(originals):
            tried = audit(function, *args, repair=True, **{**asked, "originals": originals})
    except PrecisionError as error:
        return _without(report, str(error))
    except RAISED as error:  # the model's own, on a second look
        return _without(report, f"{type(error).__name__}: {error}")
    if tried.repair is None:
        return _without(report, "the model as it was before its set-up does not fail")
    return replace(report, repair=tried.repair)


def _without(report: Report, note: str) -> Report:
    lost = report.lost_bits
    return replace(report, repair=Repair(islands={}, holds=False, before=lost, after=lost, audits=0, note=note))
