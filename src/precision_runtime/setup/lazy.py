"""Layers that have no weights before their first call (``nn.LazyLinear``), in modes that must see weights."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from precision_runtime.errors import ConfigurationError
from precision_runtime.modes import Mode


def lazy_layers(model: nn.Module) -> dict[str, str]:
    """The layers of ``model`` that have no weights yet: their kinds by their paths."""
    return {
        path or "the model itself": type(part).__name__
        for path, part in model.named_modules()
        if isinstance(part, LazyModuleMixin) and part.has_uninitialized_params()  # type: ignore[misc]
    }


def refuse_lazy(model: nn.Module, mode: Mode) -> None:
    """Raise ``ConfigurationError`` where ``model`` has lazy layers without weights and ``mode`` needs these.

    Modes that only cast do not: torch remembers the dtype. Layers that are not there cannot be swapped, and would run
    as they are from the first call on; master weights have nothing to begin with.
    """
    if not mode.masters and mode.family not in ("quantized", "float8"):
        return
    lazy = lazy_layers(model)
    if lazy:
        what = "keeps float32 masters of weights" if mode.masters else "puts other layers in the place of nn.Linear"
        raise ConfigurationError(
            f"{mode} {what}, and {type(model).__name__} has lazy layers without weights: "
            f"{', '.join(f'{path!r} ({kind})' for path, kind in lazy.items())}. Call the model once on a real input, "
            "under torch.no_grad(), and set it up then, its optimizer too"
        )
