"""Which layers a mode swaps, and why the others stay: one rule for quantised and FP8 layers.

A layer is swapped by giving the same object another class, so that its name, hooks, training flag and identity stay.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from precision_runtime.errors import unknown_names
from precision_runtime.setup.islands import island_around, named_islands


@dataclass(frozen=True)
class Swap:
    """One layer of a kind that the mode swaps. ``reason`` says why it stays as it is; empty where it is swapped."""

    name: str
    layer: nn.Module
    reason: str = ""

    @property
    def swapped(self) -> bool:
        """Whether the layer is swapped."""
        return not self.reason


def swaps(
    root: nn.Module,
    kinds: Iterable[type[nn.Module]],
    ignore_modules: Iterable[str] = (),
    refuse: Callable[[str, nn.Module], str] = lambda name, layer: "",
    islands: tuple[tuple[str, str], ...] = (),
) -> list[Swap]:
    """Every layer of ``root`` of one of ``kinds``, in the order of ``named_modules``; each is judged by itself.

    Only exact ``kinds`` are swapped: a subclass has reasons of its own (``MultiheadAttention.out_proj`` is one, whose
    weight its owner reads). ``refuse`` gives a mode's own reason against a layer, or ""; ``islands`` are those of the
    options. Raises ``UnknownNameError`` for an entry of ``ignore_modules`` or ``islands`` that matches nothing at all.
    """
    kinds, ignore_modules = tuple(kinds), tuple(ignore_modules)
    names = dict(root.named_modules())
    unmatched = [p for p in ignore_modules if not any(fnmatch.fnmatchcase(n, p) for n in names)]
    if unmatched:
        raise unknown_names("module", unmatched, [n for n in names if n], "ignore_modules")
    kept = list(named_islands(root, islands))
    found = []
    for name, layer in names.items():
        if type(layer) in kinds:
            island = island_around(name, kept)
            reason = _ignored(name, ignore_modules) or (f"an FP32 island: {island.reason}" if island else "")
            found.append(Swap(name, layer, reason or refuse(name, layer)))
        elif isinstance(layer, kinds):
            found.append(Swap(name, layer, f"{type(layer).__name__} is a subclass with a behaviour of its own"))
    return found


def matching(root: nn.Module, patterns: Iterable[str]) -> tuple[str, ...]:
    """Those of ``patterns`` that match a module of ``root``: a pattern is about a model of which it may be a part."""
    names = [name for name, _ in root.named_modules()]
    return tuple(p for p in patterns if any(fnmatch.fnmatchcase(name, p) for name in names))


def _ignored(name: str, patterns: tuple[str, ...]) -> str:
    """The sentence for a module that matches, or lies inside one that matches; whole names only, no prefixes."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        path = ".".join(parts[:end])
        for pattern in patterns:
            if fnmatch.fnmatchcase(path, pattern):
                return f"ignore_modules has {pattern!r}"
    return ""
