"""The user's own model inside the wrappers and patched forwards of frameworks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import nn

M = TypeVar("M")

# Attributes under which wrappers keep what they wrap: Fabric; DDP, DataParallel and FSDP1; torch.compile.
_FRAMEWORKS = (
    ("_FabricModule", "_original_module"),
    ("DistributedDataParallel", "module"),
    ("DataParallel", "module"),
    ("FullyShardedDataParallel", "module"),
)
_COMPILED = (("OptimizedModule", "_orig_mod"),)
_ORIGINAL = "_original_forward"  # where accelerate keeps the forward that it has replaced


def plain(model: M) -> M:
    """The model as its author wrote it: out of Fabric's, torch.compile's and DDP's wrappers, without the forward that
    accelerate put on it (which is taken off). What its parameters are stays.
    """
    found = _followed(model, (*_FRAMEWORKS, *_COMPILED))
    if hasattr(found, "__dict__"):
        own = _without_accelerate(found)
        vars(found).pop(_ORIGINAL, None)
        vars(found).update(own)
    return found


def inside(model: M) -> M:
    """The model out of the wrappers of frameworks: a compiled one stays compiled, and nothing is changed."""
    return _followed(model, _FRAMEWORKS)


@contextmanager
def bare(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Context in which these modules run as their authors wrote them, wherever they are called from.

    A wrapper calls what it wraps and nothing else, and the forward that accelerate put on a module is off. The audit
    runs a model in one mode and in FP64, and a framework that goes on casting spoils both.
    """
    before: list[tuple[dict[str, Any], dict[str, Any]]] = []
    try:
        for module in modules:
            found = inside(module)
            for each in {id(m): m for m in (module, found)}.values():
                before.append((vars(each), {k: vars(each)[k] for k in ("forward", _ORIGINAL) if k in vars(each)}))
            own = _without_accelerate(found)
            vars(found).update(own)
            if found is not module:
                vars(module)["forward"] = _Through(found)
        yield
    finally:
        for state, entries in reversed(before):
            state.pop("forward", None)
            state.update(entries)


class _Through:
    """The forward of a wrapper that only calls what it wraps."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def _followed(model: M, known: tuple[tuple[str, str], ...]) -> M:
    found: Any = model
    seen: set[int] = set()
    while id(found) not in seen:
        seen.add(id(found))
        kinds = {kind.__name__ for kind in type(found).__mro__}
        found = next((getattr(found, attribute) for kind, attribute in known if kind in kinds), found)
    result: M = found
    return result


def _without_accelerate(module: Any) -> dict[str, Any]:
    """Take the forward that accelerate put there away; return the one that somebody had put there before, if any."""
    original = vars(module).get(_ORIGINAL)
    if original is None:
        return {}
    vars(module).pop("forward", None)
    return {} if getattr(original, "__func__", None) is type(module).forward else {"forward": original}
