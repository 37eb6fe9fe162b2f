"""``audit_training``: a training in the mode judged among FP64 trainings, with everything around it put back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from precision_runtime import environment
from precision_runtime.accelerators import resolve
from precision_runtime.asked import budget_of, seed_of
from precision_runtime.auditing.executing.masking import Masking
from precision_runtime.auditing.executing.randomness import seeded
from precision_runtime.automatic import placed
from precision_runtime.capability import support
from precision_runtime.errors import ConfigurationError, UnsupportedError
from precision_runtime.modes import parse_mode
from precision_runtime.record import Report
from precision_runtime.scaling.history import StallWarning
from precision_runtime.stepping.optimizers import OptimizerWarning
from precision_runtime.stepping.updates import updates_from
from precision_runtime.training.examination import Examination
from precision_runtime.training.lesson import lesson_of
from precision_runtime.training.trainings import Trainings


def audit_training(
    make_model: Callable[[], nn.Module],
    make_optimizer: Callable[[Any], Any],
    loss_fn: Callable[[Any, Any], torch.Tensor],
    batches: Iterable[Any],
    mode: object,
    accelerator: object = "cpu",
    *,
    steps: int | None = None,
    step_fn: Callable[[Any, Any, Any], Any] | None = None,
    scaler: object = None,
    islands: object = (),
    updates: object = None,
    budget: float = 2.0,
    seed: int = 0,
    name: str | None = None,
) -> Report:
    """Train in ``mode`` and in FP64, and judge where it has led. There is no tolerance to choose.

    ``make_model()`` returns a new model, ``make_optimizer(model)`` its optimizer (torch's, or any object with
    ``step()``), ``loss_fn(model, batch)`` the loss; each is called again for every run, with the same random numbers.
    ``step_fn(model, optimizer, loss)`` stands for backward and step where given, with a scaler and clipping of its own;
    otherwise a ``PrecisionRuntime`` does both. Where ``step_fn`` does not step, gradients accumulate. ``batches`` are
    gone through once, or, with ``steps``, for so many steps and from the beginning again. ``scaler``, ``islands``
    and ``updates`` are as ``PrecisionRuntime`` takes them. State that lives outside of what these functions make is
    shared by all runs: make a ``GradScaler`` or a scheduler with the model or optimizer.

    Weights, buffers, optimizer state and losses are ranked among FP64 trainings that are disturbed by one unit
    roundoff: a chaotic training, where those are far apart, stays silent. ``budget`` is the number of bits that may be
    lost beyond what the mode must lose. Same seed, same verdict. Random state and default dtype are put back.

    Raises ``UnsupportedError`` where this machine cannot run the mode, ``ConfigurationError`` for what is no training,
    ``AuditError`` where the code runs in float32 but not in FP64, and what the code raises in float32, too.
    """
    budget, seed = budget_of(budget), seed_of(seed)
    lesson = lesson_of(make_model, make_optimizer, loss_fn, batches, steps, step_fn, seed)
    parsed = parse_mode(mode, "audit_training(mode=...)")
    lane = support(parsed, accelerator)
    if not lane.ok:
        raise UnsupportedError(f"{parsed} on {lane.accelerator} cannot be audited here: {lane.reason}")
    parsed, device = placed(parsed, lane.accelerator).mode, resolve(lane.accelerator)
    way = updates_from(updates, parsed)
    if way.wide and step_fn is not None:
        raise ConfigurationError(
            f"updates={way.name!r} is what PrecisionRuntime.step does, and step_fn steps without it: leave out one "
            "of the two"
        )
    options = {"scaler": scaler, "islands": islands, "updates": way}
    trainings = Trainings(lesson, parsed, lane.accelerator, device, options, Masking(parsed.format))
    before = torch.get_default_dtype()
    with seeded(seed, device), torch.enable_grad(), _alone(), _quiet(), environment.ignored():
        try:
            report = Examination(lesson, parsed, trainings, budget, name).report()
        finally:
            torch.set_default_dtype(before)
    return replace(report, accelerator=lane.accelerator, status=lane.status)


@contextmanager
def _alone() -> Iterator[None]:
    """An autocast around the audit is none of the mode's."""
    enabled = [device for device in ("cpu", "cuda", "mps", "xpu") if torch.is_autocast_enabled(device)]
    for device in enabled:
        torch.set_autocast_enabled(device, False)
    try:
        yield
    finally:
        for device in enabled:
            torch.set_autocast_enabled(device, True)


@contextmanager
def _quiet() -> Iterator[None]:
    """What would be warned of is in the report."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OptimizerWarning)
        warnings.simplefilter("ignore", StallWarning)
        warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step\(\)`", UserWarning)  # after a skip
        yield
