"""Reading and writing the folder that a checkpoint is."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from precision_runtime.checkpoints.trees import Tensors, decode, encode, restored
from precision_runtime.errors import ConfigurationError, UnsupportedError

VERSION = 1
_MODEL, _STATE, _REST = "model.safetensors", "state.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: a model's state, the optimizers', and the runtime's."""

    model: dict[str, Any]
    optimizers: list[dict[str, Any]]
    runtime: dict[str, Any]


def write(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Write ``checkpoint`` to the folder ``path``, which is replaced as a whole once everything has been written.

    Raises ``ConfigurationError`` for a path that holds something else, ``UnsupportedError`` without safetensors.
    """
    library = _library()
    target = Path(path)
    if target.exists() and not (target / _REST).is_file():
        raise ConfigurationError(f"{target} is there already and no checkpoint; choose another path, or remove it")
    weights, others = Tensors(), Tensors()
    extra: dict[str, Any] = {}
    for name, value in checkpoint.model.items():
        if isinstance(value, torch.Tensor):
            weights.add(name, value)
        else:
            extra[name] = value
    state = {"extra": extra, "optimizers": checkpoint.optimizers, "runtime": checkpoint.runtime}
    encoded = encode(state, others)
    rest = {"version": VERSION, "weights": weights.names(), "others": others.names(), "state": encoded}
    text = json.dumps(rest, indent=1, allow_nan=False)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        library.save_file(weights.by_name, partial / _MODEL, metadata={"format": "pt"})
        library.save_file(others.by_name, partial / _STATE, metadata={"format": "pt"})
        (partial / _REST).write_text(text, encoding="utf-8")
        _replace(target, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint in the folder ``path``, on the CPU. Raises ``ConfigurationError`` for what is none."""
    library = _library()
    source = Path(path)
    missing = [name for name in (_REST, _MODEL, _STATE) if not (source / name).is_file()]
    if missing:
        raise ConfigurationError(f"{source} is no checkpoint: it lacks {', '.join(missing)}")
    try:
        rest = json.loads((source / _REST).read_text(encoding="utf-8"))
        version = rest["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"{source / _REST} is damaged: {error}") from error
    if version != VERSION:
        raise ConfigurationError(f"{source} was written in version {version!r} of the format; this one reads {VERSION}")
    others = restored(library.load_file(source / _STATE), rest["others"])
    weights = restored(library.load_file(source / _MODEL), rest["weights"])
    state = decode(rest["state"], others)
    return Checkpoint({**weights, **state["extra"]}, state["optimizers"], state["runtime"])


def _replace(target: Path, partial: Path) -> None:
    """Put ``partial`` in the place of ``target``; what was there goes only when the new one stands."""
    former = target.with_name(f".{target.name}.former")
    shutil.rmtree(former, ignore_errors=True)
    if target.exists():
        target.rename(former)
    try:
        partial.rename(target)
    except OSError:
        if former.exists():
            former.rename(target)
        raise
    shutil.rmtree(former, ignore_errors=True)


def _library() -> Any:
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise UnsupportedError(
            "checkpoints keep tensors in safetensors files, and that package is not installed: pip install "
            "'pytest-precision[safetensors]'"
        ) from error
