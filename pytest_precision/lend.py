"""Lends a test its context: skips what the machine cannot do, isolates the rest, and records what came out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from pytest_precision import FIXTURE
from pytest_precision.lanes import Lane, parse_selection
from pytest_precision.matrix import matrix_of, wrong
from pytest_precision.outcome import Outcome, outcome_of, start
from pytest_precision.problems import Problems
from pytest_precision.references import references_of
from pytest_precision.settings import settings_of
from pytest_precision.wishes import wishes_of

if TYPE_CHECKING:
    from pytest_precision.context import PrecisionContext


def lend(request: pytest.FixtureRequest) -> Iterator[PrecisionContext]:
    """The body of the fixture ``precision_ctx``."""
    from precision_runtime import support
    from precision_runtime.errors import PrecisionError, UnsupportedError

    item = request.node
    lane = _lane(request)
    outcome = outcome_of(item)
    if outcome is None:
        outcome = start(item, lane, str(request.param))
    answer = support(lane.mode, lane.accelerator)
    outcome.accelerator, outcome.status, outcome.runs = answer.accelerator, answer.status, answer.runs
    if not answer.ok:
        item.user_properties.extend(outcome.properties())
        pytest.skip(f"{lane.mode} on {answer.accelerator}: {answer.reason}")

    from pytest_precision.context import PrecisionContext
    from pytest_precision.isolation import isolated
    from pytest_precision.pasting import Origin

    problems = Problems()
    wishes = wishes_of(item, lane, problems)
    if problems:  # only where a user's own parametrisation kept the marker from being read at collection
        pytest.fail(wrong(item, problems), pytrace=False)
    settings, references, case = settings_of(item.config), references_of(item.config), outcome.case
    chosen = dict(wishes.runtime)
    with ExitStack() as stack:
        stack.callback(_note, item, outcome)
        stack.enter_context(isolated())
        try:
            context = PrecisionContext(
                lane.mode,
                answer.accelerator,
                budget=settings.budget if wishes.budget is None else float(wishes.budget),
                gradients=wishes.gradients is not False,
                asked=lane.asked,
                references=lambda number: references.at(case, number),
                record=lambda report: outcome.checks.append(report.to_dict()),
                measured=lambda found: outcome.headrooms.append(found.to_dict()),
                runtime=chosen,
                bisect=settings.bisect,
                shrink=settings.shrink,
                origin=Origin(
                    case=case,
                    module=getattr(getattr(item, "module", None), "__name__", ""),
                    marker=_marker(lane, answer.accelerator, chosen),
                    budget=settings.budget,
                ),
            )
        except UnsupportedError as error:  # a recipe, perhaps, that this machine does not run
            outcome.status = "unsupported"
            pytest.skip(f"{lane.mode} on {answer.accelerator}: {error}")
        except PrecisionError as error:
            pytest.fail(f"the marker precision, runtime: {error}", pytrace=False)
        if lane.ambient:
            stack.enter_context(context.ambient())
        yield context


def _note(item: pytest.Item, outcome: Outcome) -> None:
    item.user_properties.extend(outcome.properties())


def _marker(lane: Lane, accelerator: str, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """What a marker says beside the mode to have this one lane."""
    return {
        **({} if lane.default else {"accelerators": accelerator}),
        **({"runtime": dict(chosen)} if chosen else {}),
    }


def _lane(request: pytest.FixtureRequest) -> Lane:
    """The lane in ``request.param``: ours, or the name of one in a user's own indirect parametrisation."""
    given = getattr(request, "param", None)
    if isinstance(given, Lane):
        return given
    if given is None:
        pytest.fail(
            f"{FIXTURE} has no lane here: it was asked for while the test runs (getfixturevalue), where a test cannot "
            "be spread any more. Name it among the test's arguments, or mark the test with @pytest.mark.precision.",
            pytrace=False,
        )
    problems = Problems()
    where = f"the parametrisation of {FIXTURE}"
    selection = parse_selection(str(given), where, problems)
    if not problems and (len(selection.rules) != 1 or len(selection.modes()) != 1):
        problems.add(f"{where} has {given!r}, which is not one mode or one mode@accelerator")
    if problems:
        pytest.fail(problems.text(), pytrace=False)
    (mode,) = selection.modes()
    accelerator = selection.rules[0].accelerator
    default = matrix_of(request.config).machine.default()
    return Lane(mode, accelerator or default, accelerator in (None, default))
