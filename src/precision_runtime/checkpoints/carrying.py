"""Saving and loading: in the same mode exactly, into another one with an account of what changed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from precision_runtime.casting import FLOATING
from precision_runtime.checkpoints import probe as probes
from precision_runtime.checkpoints import weights
from precision_runtime.checkpoints.changes import Change, Changes, ProbeResult
from precision_runtime.checkpoints.description import differences, mode_in
from precision_runtime.checkpoints.files import Checkpoint, read, write
from precision_runtime.errors import ConfigurationError, PrecisionError
from precision_runtime.planning.toll import toll
from precision_runtime.setup import forwarding

if TYPE_CHECKING:
    from precision_runtime.runtime import PrecisionRuntime

Path = str | os.PathLike[str]


class ProbeError(PrecisionError, RuntimeError):
    """A loaded model does not give the outputs that were saved with it. ``changes`` has the figures."""

    def __init__(self, message: str, changes: Changes) -> None:
        super().__init__(message)
        self.changes = changes


def save(runtime: PrecisionRuntime, path: Path, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Write model, optimizers and runtime to the folder ``path``."""
    _check_set_up(runtime, model)
    write(path, Checkpoint(dict(model.state_dict()), [o.state_dict() for o in optimizers], runtime.state_dict()))


def load(runtime: PrecisionRuntime, path: Path, model: nn.Module, optimizers: Sequence[Optimizer]) -> Changes:
    """Load a checkpoint of the same mode: the run goes on bit by bit. The probe is run where there is one."""
    _check_set_up(runtime, model)
    found = read(path)
    runtime.check_state(found.runtime)
    _check_optimizers(found.optimizers, optimizers)
    if len(found.optimizers) != len(optimizers):
        raise ConfigurationError(
            f"the checkpoint has the state of {len(found.optimizers)} optimizers, and {len(optimizers)} were given; "
            "the run goes on with all of them, in the same order. load_across loads weights alone"
        )
    weights.check_names(found.model, model)
    model.load_state_dict(found.model)
    for optimizer, state in zip(optimizers, found.optimizers, strict=True):
        optimizer.load_state_dict(state)
    runtime.load_state_dict(found.runtime)
    return _probed(runtime, model, found.runtime, (), {}, True)


def load_across(
    runtime: PrecisionRuntime, path: Path, model: nn.Module, optimizers: Sequence[Optimizer], check: bool
) -> Changes:
    """Load a checkpoint of any mode, and say what changed."""
    _check_set_up(runtime, model)
    found = read(path)
    saved = found.runtime
    _check_optimizers(found.optimizers, optimizers)
    rows = list(differences(saved, runtime))
    state = dict(found.model)
    residuals = saved.get("updates", {}).get("residuals", {})
    if runtime.updates.name != "kahan":
        rows += weights.folded(state, residuals)
    state, fitted = weights.fitting(state, model)
    rows += fitted
    before = mode_in(saved)
    alike = before.masters and runtime.mode.masters and before.params == runtime.mode.params
    rows += weights.casts(state, model, {row.name for row in fitted}, masters=alike)
    rows += _optimizer_rows(runtime, found.optimizers, optimizers)
    model.load_state_dict(state)
    moved = weights.moves(state, model)
    for optimizer, own in zip(optimizers, found.optimizers, strict=False):
        optimizer.load_state_dict(own)
    rows += _scaler(runtime, saved)
    rows += _updates(runtime, saved)
    return _probed(runtime, model, saved, rows, moved, check)


def _probed(
    runtime: PrecisionRuntime, model: nn.Module, saved: Mapping[str, Any], rows: Sequence[Change],
    moved: Mapping[int, torch.Tensor], check: bool,
) -> Changes:  # fmt: skip
    state = saved.get("probe")
    if state is None or not check:
        return Changes(tuple(rows))
    before, now = mode_in(saved), runtime.mode
    recipe = runtime.strategy.options.recipe
    u = max(probes.roundoff(before, saved.get("recipe")), probes.roundoff(now, recipe))
    step = max(mode.format.smallest_subnormal for mode in (before, now))
    results: list[ProbeResult] = probes.check(model, state, runtime.device, u, step, moved)
    changes = Changes(tuple(rows), tuple(results))
    if not changes.ok:
        bad = "; ".join(str(result) for result in results if not result.ok)
        lost = "".join(f"\n  {row}" for row in changes.lossy)
        raise ProbeError(
            f"the checkpoint has been loaded in {now}, but the model is not the one that was saved in {before}: {bad}."
            + (f" Lossy on the way:{lost}" if lost else " No cast explains that: the code may have changed."),
            changes,
        )
    runtime.take_probe(probes.Probe(model, state["args"], state["kwargs"]))
    return changes


def _check_set_up(runtime: PrecisionRuntime, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"a checkpoint is one of a torch.nn.Module, got {type(model).__name__}")
    if not forwarding.is_set_up(model):
        raise ConfigurationError(
            f"{type(model).__name__} has not been set up: call setup(model, *optimizers) first, which brings model and "
            f"optimizers to {runtime.mode}"
        )
    forwarding.check(model, runtime.strategy)


def _check_optimizers(saved: Sequence[Mapping[str, Any]], optimizers: Sequence[Optimizer]) -> None:
    wrong = [
        f"{type(optimizer).__name__}: saved {before}, here {here}"
        for optimizer, state in zip(optimizers, saved, strict=False)
        if (before := [len(group["params"]) for group in state["param_groups"]])
        != (here := [len(group["params"]) for group in optimizer.param_groups])
    ]
    if len(optimizers) > len(saved):
        wrong.append(f"{len(optimizers)} optimizers were given, and the checkpoint has {len(saved)}")
    if wrong:
        raise ConfigurationError(
            f"optimizers do not fit the checkpoint (parameters by group): {'; '.join(wrong)}. Weights that are stored "
            "as codes belong to no optimizer: load without optimizers, which then start anew. Nothing has been changed"
        )


def _optimizer_rows(
    runtime: PrecisionRuntime, saved: Sequence[Mapping[str, Any]], optimizers: Sequence[Optimizer]
) -> Iterator[Change]:
    if len(saved) > len(optimizers):
        what = f"{len(saved) - len(optimizers)} of {len(saved)}"
        yield Change("optimizer", what, "saved state", "none", "not given: it starts anew")
    for optimizer, state in zip(optimizers, saved, strict=False):
        if runtime.updates.wide:  # keeps float32 state as it is
            continue
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        keys = [key for group in state["param_groups"] for key in group["params"]]
        tolls: dict[tuple[str, str, str], Counter[str]] = {}
        for key, parameter in zip(keys, parameters, strict=True):
            for name, value in state["state"].get(key, {}).items():
                if not isinstance(value, torch.Tensor) or name == "step" or value.dtype not in FLOATING:
                    continue
                if value.dtype is parameter.dtype or parameter.dtype not in FLOATING:
                    continue
                paid = toll(value, parameter.dtype)
                before, after = (str(d).removeprefix("torch.") for d in (value.dtype, parameter.dtype))
                count = tolls.setdefault((name, before, after), Counter())
                if paid is not None:
                    count.update(inf=paid.inf, zero=paid.zero, heavy=int(paid.heavy))
        for (name, before, after), count in tolls.items():
            yield Change(
                "optimizer", f"{type(optimizer).__name__}.{name}", before, after, "", count["inf"], count["zero"],
                bool(count["inf"] or count["heavy"]),
            )  # fmt: skip


def _scaler(runtime: PrecisionRuntime, saved: Mapping[str, Any]) -> Iterator[Change]:
    state, now = saved["scaler"], runtime.scaler
    if state and now.enabled and set(state) == set(now.state_dict()):
        now.load_state_dict(state)
    elif state and now.enabled:
        yield Change("scaler", "", "one of another kind", f"{now.scale:g}", "it starts anew")
    elif state:
        yield Change("scaler", "", "saved state", "none", f"{runtime.mode} does not scale its loss")
    elif now.enabled:
        yield Change("scaler", "", "none", f"{now.scale:g}", "it starts anew")


def _updates(runtime: PrecisionRuntime, saved: Mapping[str, Any]) -> Iterator[Change]:
    state = saved.get("updates", {})
    kind = state.get("kind", "nearest")
    if kind == runtime.updates.name and state:
        runtime.load_updates(state)
    elif kind != runtime.updates.name:
        yield Change("updates", "", kind, runtime.updates.name)
