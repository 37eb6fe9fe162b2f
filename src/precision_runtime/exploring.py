"""The search for inputs on which a precision fails, driven by Hypothesis: the same seed looks at the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from precision_runtime.errors import AuditError, ConfigurationError
from precision_runtime.record import Report
from precision_runtime.strategies_for_tests import strategies, tensors


@dataclass(frozen=True, eq=False)
class Found:
    """The inputs on which most bits were lost, and their verdict, out of ``examples``."""

    args: tuple[Any, ...]
    report: Report
    examples: int


class _FailedError(Exception):
    """An example fails: Hypothesis may stop."""


def inputs_of(inputs: Sequence[Any], low: float, high: float) -> list[Any]:
    """A strategy for each input: strategies as they are, shapes as tensors in ``low`` … ``high``, the rest fixed.

    A shape is a tuple (or ``torch.Size``) of whole numbers. Raises ``UnsupportedError`` without Hypothesis.
    """
    st = strategies()
    from hypothesis.strategies import SearchStrategy

    def of(value: Any) -> Any:
        if isinstance(value, SearchStrategy):
            return value
        if isinstance(value, tuple) and all(isinstance(s, int) for s in value):
            return tensors(value, low=low, high=high)
        return st.just(value)

    return [of(value) for value in inputs]


def search(
    judge: Callable[[tuple[Any, ...]], Report], inputs: Sequence[Any], *, max_examples: int = 50, seed: int = 0
) -> Found:
    """Ask ``judge`` about examples of ``inputs`` (strategies) until one fails, or there have been ``max_examples``.

    Returns the failing one, or else the one that came nearest to failing. Inputs for which there is no FP64 reference
    count as none; whatever else ``judge`` raises is raised. Examples have no deadline: an audit's first run is slow.
    """
    if max_examples < 1:
        raise ConfigurationError(f"max_examples={max_examples!r} is not allowed: one example at least must be tried")
    st = strategies()
    import hypothesis

    best: list[tuple[tuple[Any, ...], Report]] = []
    count = 0

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=max_examples,
        deadline=None,
        database=None,  # what another run found would make this one depend on it
        derandomize=False,
        report_multiple_bugs=False,
        phases=(hypothesis.Phase.generate,),  # the smallest input is looked for by ``shrink``, in fewer audits
        suppress_health_check=list(hypothesis.HealthCheck),
        verbosity=hypothesis.Verbosity.quiet,
    )
    @hypothesis.given(st.tuples(*inputs))
    def look(args: tuple[Any, ...]) -> None:
        nonlocal count
        try:
            report = judge(args)
        except AuditError:
            hypothesis.reject()
        count += 1
        if not best or not report.ok or report.excess > best[0][1].excess:
            best[:] = [(args, report)]
        if not report.ok:
            raise _FailedError

    try:
        look()
    except _FailedError:
        count -= 1  # Hypothesis looks at it once more
    if not best:
        raise AuditError("none of the inputs that were tried has an FP64 reference, so nothing was judged")
    return Found(*best[0], count)
