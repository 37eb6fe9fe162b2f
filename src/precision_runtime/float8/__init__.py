"""FP8 and FP4 layers: recipes, an emulation that runs everywhere, and NVIDIA's library where a GPU has the kernels.

Importing this package imports no torch; its names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from precision_runtime.float8.layers import Float8LayerNorm as Float8LayerNorm
    from precision_runtime.float8.layers import Float8Linear as Float8Linear
    from precision_runtime.float8.layers import without_scales as without_scales
    from precision_runtime.float8.recipes import DelayedScaling as DelayedScaling
    from precision_runtime.float8.recipes import Float8BlockScaling as Float8BlockScaling
    from precision_runtime.float8.recipes import Float8CurrentScaling as Float8CurrentScaling
    from precision_runtime.float8.recipes import MXFP8BlockScaling as MXFP8BlockScaling
    from precision_runtime.float8.recipes import NVFP4BlockScaling as NVFP4BlockScaling
    from precision_runtime.float8.recipes import parse_recipe as parse_recipe
    from precision_runtime.float8.shares import Share as Share
    from precision_runtime.float8.shares import watching as watching

_HOME = {
    "DelayedScaling": "recipes",
    "Float8BlockScaling": "recipes",
    "Float8CurrentScaling": "recipes",
    "Float8LayerNorm": "layers",
    "Float8Linear": "layers",
    "MXFP8BlockScaling": "recipes",
    "NVFP4BlockScaling": "recipes",
    "Share": "shares",
    "parse_recipe": "recipes",
    "watching": "shares",
    "without_scales": "layers",
}

__all__ = sorted(_HOME)  # noqa: PLE0605 # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(
            f"module 'precision_runtime.float8' has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    value = getattr(importlib.import_module(f"precision_runtime.float8.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
