"""The user's own model inside the wrappers and patched forwards of frameworks."""

from __future__ import annotations

from typing import Any, TypeVar

M = TypeVar("M")

# Attributes under which wrappers keep what they wrap: torch.compile; Fabric; DDP, DataParallel and FSDP1.
_INSIDE = (
    ("OptimizedModule", "_orig_mod"),
    ("_FabricModule", "_original_module"),
    ("DistributedDataParallel", "module"),
    ("DataParallel", "module"),
    ("FullyShardedDataParallel", "module"),
)


def plain(model: M) -> M:
    """The model as its author wrote it: out of Fabric's, torch.compile's and DDP's wrappers, without the forward that
    accelerate put on it (which is taken off). What its parameters are stays.

    The audit runs a model in one mode and in FP64, and a framework that goes on casting spoils both runs.
    """
    found: Any = model
    seen: set[int] = set()
    while id(found) not in seen:
        seen.add(id(found))
        kinds = {kind.__name__ for kind in type(found).__mro__}
        for kind, attribute in _INSIDE:
            if kind in kinds:
                found = getattr(found, attribute)
                break
    original = vars(found).pop("_original_forward", None) if hasattr(found, "__dict__") else None
    if original is not None:
        vars(found).pop("forward", None)
        if getattr(original, "__func__", None) is not type(found).forward:
            found.forward = original  # somebody had replaced it before accelerate did
    result: M = found
    return result
