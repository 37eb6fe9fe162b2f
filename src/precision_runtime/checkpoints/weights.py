"""A model's state out of one mode, made to fit a model in another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from precision_runtime.casting import FLOATING, HALF
from precision_runtime.checkpoints.changes import Change
from precision_runtime.errors import ConfigurationError
from precision_runtime.float8.layers import is_float8, without_scales
from precision_runtime.layers import QuantizedLayer, dequantized_state_dict
from precision_runtime.layers.checkpoints import quantized_entries
from precision_runtime.planning.toll import toll
from precision_runtime.stepping.master import master_of

_STATISTICS = ("SCB", "weight_format")


def fitting(state: Mapping[str, Any], model: nn.Module) -> tuple[dict[str, Any], list[Change]]:
    """``state`` as ``model.load_state_dict`` takes it, and what had to be changed for that.

    Codes stay where the model's layer stores the same codes, and are dequantised elsewhere; FP8 scales stay where the
    model's layer is FP8. Raises ``ConfigurationError``, before anything has been changed, for names and shapes that the
    model has not.
    """
    parts = dict(model.named_modules(remove_duplicate=False))
    wanted, rows = dict(state), []
    for prefix, storage in quantized_entries(state).items():
        layer = parts.get(prefix.removesuffix("."))
        if isinstance(layer, QuantizedLayer) and layer.storage == storage:
            continue
        own = [key for key in state if _belongs(key, prefix)]
        values = dequantized_state_dict({key: wanted.pop(key) for key in own})
        wanted.update(values)
        after = layer.storage if isinstance(layer, QuantizedLayer) else "float32"
        note = "code times scale" if after == "float32" else "dequantised and quantised again"
        rows.append(Change("weight", f"{prefix}weight", storage, after, note, lossy=after != "float32"))
    kept = {f"{path}._extra_state" if path else "_extra_state" for path, part in parts.items() if is_float8(part)}
    plain = without_scales(wanted)
    dropped = [key for key in wanted if key not in plain and key not in kept]
    for key in dropped:
        del wanted[key]
        rows.append(Change("weight", key, "FP8 scales", "none", "the layer is not FP8 here"))
    check_names(wanted, model)
    return wanted, rows


def casts(state: Mapping[str, Any], model: nn.Module, done: set[str], masters: bool = False) -> Iterator[Change]:
    """What loading ``state`` into ``model`` will do to each tensor whose dtype or storage differs; ``done`` are names
    that have been told of. ``masters``: the state is of a mode that keeps them, and so writes half tensors in float32.
    """
    parts = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tensors = {**parameters, **dict(model.named_buffers(remove_duplicate=False))}
    for name, present in tensors.items():
        saved = state.get(name)
        if not isinstance(saved, torch.Tensor) or name in done:
            continue
        owner = parts[name.rpartition(".")[0]]
        before = _name(saved.dtype)
        if isinstance(owner, QuantizedLayer) and saved.is_floating_point() and not present.is_floating_point():
            yield Change("weight", name, before, owner.storage, "quantised", lossy=True)
            continue
        if saved.dtype is present.dtype or saved.dtype not in FLOATING or present.dtype not in FLOATING:
            continue
        after = _name(present.dtype)
        if masters and saved.dtype is torch.float32 and present.dtype in HALF:
            continue
        if master_of(present) is not None and saved.dtype is torch.float32:
            yield Change("weight", name, before, f"{after} with a float32 master")
            continue
        paid = toll(saved, present.dtype)
        if paid is None:
            yield Change("weight", name, before, after, "values unknown", lossy=True)
        else:
            alone = name not in parameters  # code reads buffers value by value
            lossy = bool(paid.inf or paid.whole or (paid.zero and (paid.heavy or alone)))
            note = f"{paid.whole} whole numbers become others" if paid.whole else ""
            yield Change("weight", name, before, after, note, paid.inf, paid.zero, lossy)


def moves(state: Mapping[str, Any], model: nn.Module) -> dict[int, torch.Tensor]:
    """By the id of each weight that loading has quantised: how far each value is from the saved one, float64."""
    found = {}
    for path, part in model.named_modules():
        saved = state.get(f"{path}.weight" if path else "weight")
        if isinstance(part, QuantizedLayer) and isinstance(saved, torch.Tensor) and saved.is_floating_point():
            here = part.dequantized(stored=True).to(torch.float64)
            found[id(part.weight)] = (here - saved.to(here)).abs()
    return found


def folded(state: dict[str, Any], residuals: Mapping[str, torch.Tensor]) -> list[Change]:
    """Add what compensated updates kept beside half weights to those weights, in place, which become float32."""
    rows = []
    for name, residual in residuals.items():
        weight = state.get(name)
        if isinstance(weight, torch.Tensor) and weight.shape == residual.shape:
            state[name] = weight.float() + residual.float()
            rows.append(Change("updates", name, f"{_name(weight.dtype)} and residual", "float32", "added"))
    return rows


def _belongs(key: str, prefix: str) -> bool:
    name = key[len(prefix) :] if key.startswith(prefix) else ""
    return name in ("weight", *_STATISTICS) or name.startswith("weight.")


def check_names(state: Mapping[str, Any], model: nn.Module) -> None:
    """Raise ``ConfigurationError`` where ``state`` has other names or shapes than ``model``."""
    there = model.state_dict()
    saved, present = _logical(state), _logical(there)
    missing, foreign = sorted(present - saved), sorted(saved - present)
    shapes = [
        f"{key} is {tuple(value.shape)}, saved {tuple(state[key].shape)}"
        for key, value in there.items()
        if isinstance(value, torch.Tensor) and isinstance(state.get(key), torch.Tensor)
        and value.is_floating_point() and state[key].is_floating_point() and value.shape != state[key].shape
    ]  # fmt: skip
    if missing or foreign or shapes:
        raise ConfigurationError(
            f"the checkpoint is not one of this {type(model).__name__}; nothing has been changed. "
            f"It lacks {missing}, has besides {foreign}; shapes: {shapes}"
        )


def _logical(state: Mapping[str, Any]) -> set[str]:
    """The names without those of quantisation's statistics and of extra state, which depend on the mode."""
    prefixes = tuple(quantized_entries(state))
    statistics = {
        key for key in state for prefix in prefixes
        if _belongs(key, prefix) and key != f"{prefix}weight"
    }  # fmt: skip
    return {key for key in state if key not in statistics and key.rpartition(".")[2] != "_extra_state"}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
