"""FP32 islands: parts of a model, named by the user or found, that a mode leaves wide.

An island holds in every mode: its tensors stay wide through the mode's casts, ``.to()``, ``.half()`` and checkpoints,
its forward runs wide with autocast off, and no layer in it is swapped. A mode that is wider already stays as it is.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from precision_runtime.errors import ConfigurationError, UnknownNameError, unknown_names
from precision_runtime.setup.forwarding import patch_of
from precision_runtime.setup.keeping import Island, IslandForward, Keeper, wider
from precision_runtime.setup.tables import find_tables

if TYPE_CHECKING:
    from precision_runtime.strategies import Strategy

_log = logging.getLogger(__name__)

Kind = Literal["module", "parameter", "buffer"]
Pairs = tuple[tuple[str, str], ...]  # pattern and dtype name


def plan_islands(root: nn.Module, strategy: Strategy, partly: bool = False) -> list[Island]:
    """What ``keep`` would keep in ``root``, outermost first; changes nothing.

    Raises ``UnknownNameError`` for a pattern that matches no module, parameter or buffer of ``root`` (not with
    ``partly``), and ``ConfigurationError`` where a tensor would have to be wide in one place and narrow in another, or
    where the mode cannot have the island.
    """
    pairs, automatic = strategy.options.islands, strategy.options.auto_islands
    if not pairs and not automatic:
        return []
    _check_products(pairs, strategy)
    found = list(named_islands(root, _matched(root, pairs) if partly else pairs))
    if automatic and strategy.mode.low:
        found += find_tables(root, strategy.compute)
    elif automatic and strategy.mode.products:
        found += find_tables(root, torch.float16, "float64")  # TF32 has float16's significand; float64 it leaves alone
    islands = _outermost(found)
    _check_shared(root, islands, strategy)
    return islands


def keep(root: nn.Module, strategy: Strategy, partly: bool = False) -> None:
    """Make the parts of ``root`` that the strategy's options name islands; to be called before the mode's cast.

    Again: nothing happens. Raises as ``plan_islands`` does.
    """
    islands = plan_islands(root, strategy, partly)
    modules = dict(root.named_modules(remove_duplicate=False)) if islands else {}
    for island in islands:
        path, _, name = island.path.rpartition(".")
        owner = modules[island.path if island.kind == "module" else path]
        keeper = patch_of(owner, Keeper) or Keeper(owner)
        if island.kind != "module":
            keeper.parts[name] = island
        elif keeper.whole is None:
            keeper.whole = island
            IslandForward(owner, _in_mode(island, strategy), _outer(island, islands, strategy), strategy.device.type)
        owner._apply(lambda tensor: tensor)  # widens what is narrow now
        _log.info("%s: %s", type(root).__name__, island)


def keep_built(roots: Iterable[nn.Module], strategy: Strategy) -> None:
    """``keep`` for several modules made at once: each pattern is to match in one of them at least."""
    roots = list(roots)
    matched = {pair for root in roots for pair in _matched(root, strategy.options.islands)}
    unmatched = [pattern for pattern, dtype in strategy.options.islands if (pattern, dtype) not in matched]
    if unmatched and roots:
        raise _unmatched(unmatched, [name for root in roots for name in _kinds(root)])
    for root in roots:
        keep(root, strategy, partly=True)


def islands_in(root: nn.Module) -> list[Island]:
    """The islands that ``root`` has, in the order of its modules, by their paths in it."""
    found = []
    for path, part in root.named_modules():
        keeper = patch_of(part, Keeper)
        if keeper is not None:
            found += [] if keeper.whole is None else [replace(keeper.whole, path=path)]
            found += [replace(i, path=f"{path}.{name}" if path else name) for name, i in keeper.parts.items()]
    return found


def island_around(path: str, islands: Iterable[Island]) -> Island | None:
    """The innermost of ``islands`` that is, or has inside, the module, parameter or buffer at ``path``."""
    return _innermost(path, {island.path: island for island in islands})


def _innermost(path: str, islands: Mapping[str, Island]) -> Island | None:
    return next((islands[p] for p in (path, *(path[:i] for i in reversed(_dots(path)))) if p in islands), None)


def named_islands(root: nn.Module, pairs: Pairs) -> Iterator[Island]:
    """One island for each module, parameter or buffer that a pattern matches; an exact name counts before any glob,
    and of several globs the widest.
    """
    kinds = _kinds(root) if pairs else {}
    unmatched = [pattern for pattern, dtype in pairs if (pattern, dtype) not in _matched(root, pairs)]
    if unmatched:
        raise _unmatched(unmatched, list(kinds))
    asked: dict[str, list[tuple[str, str]]] = {}
    for pattern, dtype in pairs:
        for name in _topmost(kinds, pattern):
            asked.setdefault(name, []).append((pattern, dtype))
    for name, matching in asked.items():
        chosen = [(p, d) for p, d in matching if p == name] or matching
        pattern, dtype = max(chosen, key=lambda pair: _bits(pair[1]))
        for path, part in _callable_parts(root, name, kinds[name]):
            yield Island(path, part, dtype, f"islands has {pattern!r}")


def _topmost(names: Iterable[str], pattern: str) -> list[str]:
    """The names that match; not those inside one that matches, because a ``*`` stands for dots, too."""
    matching = {name for name in names if fnmatch.fnmatchcase(name, pattern)}
    return [name for name in names if name in matching and not any(name[:i] in matching for i in _dots(name))]


def _dots(name: str) -> list[int]:
    return [i for i, letter in enumerate(name) if letter == "."]


def _matched(root: nn.Module, pairs: Pairs) -> Pairs:
    names = _kinds(root) if pairs else {}
    return tuple((p, d) for p, d in pairs if any(fnmatch.fnmatchcase(name, p) for name in names))


def _unmatched(patterns: list[str], names: list[str]) -> UnknownNameError:
    plural = "modules, parameters and buffers"
    return unknown_names("module, parameter or buffer", patterns, names, "islands", plural=plural)


def _kinds(root: nn.Module) -> dict[str, Kind]:
    """Every name below the root itself: a root that is an island as a whole would be another mode."""
    names: dict[str, Kind] = {n: "module" for n, _ in root.named_modules(remove_duplicate=False) if n}
    names.update((n, "parameter") for n, _ in root.named_parameters(remove_duplicate=False))
    names.update((n, "buffer") for n, _ in root.named_buffers(remove_duplicate=False))
    return names


def _callable_parts(root: nn.Module, path: str, kind: Kind) -> Iterator[tuple[str, Kind]]:
    """``path`` itself; for a container that is never called (a ModuleList) what it contains."""
    module = root.get_submodule(path) if kind == "module" else None
    if module is None or "forward" in vars(module) or type(module).forward is not nn.Module.forward:
        yield path, kind
        return
    yield from ((f"{path}.{name}", "parameter") for name in module._parameters)
    yield from ((f"{path}.{name}", "buffer") for name in module._buffers)
    for name in module._modules:
        yield from _callable_parts(root, f"{path}.{name}", "module")


def _outermost(found: list[Island]) -> list[Island]:
    """Without those that lie in an island at least as wide; an island inside a narrower one is kept."""
    kept: dict[str, Island] = {}
    for island in sorted(found, key=lambda i: (i.path.count("."), i.path, -_bits(i.dtype))):
        around = _innermost(island.path, kept)
        if around is None or _bits(island.dtype) > _bits(around.dtype):
            kept[island.path] = island
    return list(kept.values())


def _bits(dtype: str) -> int:
    return torch.finfo(getattr(torch, dtype)).bits


def _width(island: Island | None, strategy: Strategy) -> torch.dtype:
    """The dtype of tensors in the island, or outside of any; a mode that is wider stays so."""
    return strategy.dtype if island is None else wider(getattr(torch, island.dtype), strategy.dtype)


def _in_mode(island: Island, strategy: Strategy) -> Island:
    return replace(island, dtype=str(_width(island, strategy)).removeprefix("torch."))


def _outer(island: Island, islands: list[Island], strategy: Strategy) -> torch.dtype:
    return _width(island_around(island.path.rpartition(".")[0], islands), strategy)


def _check_products(pairs: Pairs, strategy: Strategy) -> None:
    """Raise where float32 does not escape the mode: TF32's switch holds for every float32 product, in backward too."""
    narrow = [pattern for pattern, dtype in pairs if dtype == "float32"]
    if narrow and strategy.mode.family == "tf32":
        raise ConfigurationError(
            f"{strategy.mode} rounds the operands of every float32 product, forward and backward, in islands as well. "
            f"Ask for '64', which TF32 leaves alone: islands={dict.fromkeys(narrow, '64')}"
        )


def _check_shared(root: nn.Module, islands: list[Island], strategy: Strategy) -> None:
    """Raise where a tensor is in an island and elsewhere, too, and the mode makes it narrow there."""
    by_path = {island.path: island for island in islands}
    places: dict[int, dict[str, torch.dtype]] = {}
    for name, tensor in (
        *root.named_parameters(remove_duplicate=False),
        *root.named_buffers(remove_duplicate=False),
    ):
        places.setdefault(id(tensor), {})[name] = _width(_innermost(name, by_path), strategy)
    for widths in places.values():
        if len(set(widths.values())) > 1:
            text = ", ".join(f"{name!r} in {str(width).removeprefix('torch.')}" for name, width in widths.items())
            raise ConfigurationError(
                f"islands={dict(strategy.options.islands)} asks for one tensor of {type(root).__name__} in two dtypes: "
                f"{text}. It is tied and has one dtype; name all of its places in islands, or none."
            )
