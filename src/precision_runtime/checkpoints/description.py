"""What a runtime writes about itself into a checkpoint, and how two such descriptions differ."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from precision_runtime.checkpoints.changes import Change
from precision_runtime.errors import ConfigurationError
from precision_runtime.modes import Mode, parse_mode
from precision_runtime.pointing import users_line

if TYPE_CHECKING:
    from precision_runtime.runtime import PrecisionRuntime

KEYS = frozenset(("recipe", "switches", "islands"))

# What may differ where a run goes on: another machine, and torch's own switches, which are told.
_FREE = frozenset(("accelerator", "torch"))


class SwitchWarning(UserWarning):
    """torch's switches are not as they were when a checkpoint was saved."""


def describe(runtime: PrecisionRuntime) -> dict[str, Any]:
    """Recipe, switches and islands of ``runtime``, as builtins."""
    options = runtime.strategy.options
    return {
        "recipe": None if options.recipe is None else options.recipe.to_dict(),
        "switches": {
            "accelerator": runtime.device.type,
            "params": runtime.mode.params,
            "compute": runtime.mode.compute,
            "ignore_modules": list(options.ignore_modules),
            "quantize_embeddings": options.quantize_embeddings,
            "updates": runtime.updates.name,
            "torch": _torch_switches(),
        },
        "islands": {
            "asked": [list(pair) for pair in options.islands],
            "auto": options.auto_islands,
            "kept": [[i.path, i.kind, i.dtype, i.reason] for i in runtime.islands],
        },
    }


def refuse_other(saved: Mapping[str, Any], runtime: PrecisionRuntime) -> None:
    """Raise ``ConfigurationError`` with everything in which ``runtime`` differs from the one that was saved, where the
    run could not go on as if it had never stopped. What an older state does not tell is not compared.
    """
    now = describe(runtime)
    wrong = [
        f"{name}: saved {before!r}, here {now['switches'][name]!r}"
        for name, before in saved.get("switches", {}).items()
        if name not in (*_FREE, "updates") and before != now["switches"].get(name, before)
    ]
    if "recipe" in saved and saved["recipe"] != now["recipe"]:
        wrong.append(f"recipe: saved {saved['recipe']}, here {now['recipe']}")
    if "islands" in saved:
        asked = {name: saved["islands"][name] for name in ("asked", "auto")}
        here = {name: now["islands"][name] for name in ("asked", "auto")}
        if asked != here:
            wrong.append(f"islands: saved {asked}, here {here}")
    way = saved.get("switches", {}).get("updates", runtime.updates.name)
    if way != runtime.updates.name:
        raise ConfigurationError(
            f"this state was saved with updates={way!r} and cannot be loaded with updates={runtime.updates.name!r}: "
            "make the runtime with the same updates"
        )
    if wrong:
        raise ConfigurationError(
            "this state was saved by a runtime with other arguments, and the run would not go on as it was: "
            f"{'; '.join(wrong)}. Make the runtime with the same arguments, or carry the checkpoint over with "
            "load_across, which says what changes"
        )
    switches = saved.get("switches", {}).get("torch", {})
    changed = {k: (v, now["switches"]["torch"].get(k)) for k, v in switches.items()}
    told = [f"{name} was {old!r}, is {new!r}" for name, (old, new) in changed.items() if old != new]
    if told:
        warnings.warn(
            f"torch's switches differ from those that the state was saved under: {', '.join(told)}",
            SwitchWarning,
            stacklevel=users_line(),
        )


def mode_in(saved: Mapping[str, Any]) -> Mode:
    """The mode that a state was saved in, with the dtypes that were chosen for it."""
    mode = parse_mode(saved["mode"], "a saved state")
    switches = saved.get("switches", {})
    return dataclasses.replace(
        mode, params=switches.get("params", mode.params), compute=switches.get("compute", mode.compute)
    )


def differences(saved: Mapping[str, Any], runtime: PrecisionRuntime) -> Iterator[Change]:
    """Mode, recipe, switches and islands that are not what they were."""
    now = describe(runtime)
    if saved["mode"] != runtime.mode.name:
        yield Change("mode", "", saved["mode"], runtime.mode.name)
    recipe = saved.get("recipe")
    if recipe != now["recipe"]:
        yield Change("recipe", "", _recipe(recipe), _recipe(now["recipe"]))
    for name, value in now["switches"].items():
        before = saved.get("switches", {}).get(name, value)
        if before != value:
            yield Change("switch", name, str(before), str(value))
    kept = {path: dtype for path, _, dtype, _ in saved.get("islands", {}).get("kept", [])}
    here = {path: dtype for path, _, dtype, _ in now["islands"]["kept"]}
    for path in sorted({*kept, *here}):
        if kept.get(path) != here.get(path):
            yield Change("island", path, kept.get(path, "none"), here.get(path, "none"))


def _recipe(recipe: Mapping[str, Any] | None) -> str:
    return "none" if recipe is None else ", ".join(f"{k}={v}" for k, v in recipe.items())


def _torch_switches() -> dict[str, str]:
    """Switches of torch that change what products give, by the API that does not mix with the older one."""
    backends: Any = torch.backends
    places = {
        "cuda.matmul.fp32_precision": (backends.cuda.matmul, "fp32_precision"),
        "cudnn.conv.fp32_precision": (getattr(backends.cudnn, "conv", None), "fp32_precision"),
        "mkldnn.matmul.fp32_precision": (getattr(backends.mkldnn, "matmul", None), "fp32_precision"),
        "deterministic": (torch, "are_deterministic_algorithms_enabled"),
    }
    found = {}
    for name, (owner, attribute) in places.items():
        value = getattr(owner, attribute, None)
        if value is not None:
            found[name] = str(value() if callable(value) else value)
    return found
