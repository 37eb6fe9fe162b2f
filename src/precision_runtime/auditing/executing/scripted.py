"""What a module of torch.jit keeps in C++, beside parameters, buffers and submodules: ``vars()`` does not show it."""

from __future__ import annotations

from typing import Any

from torch import nn

_OWN = frozenset(("training", "_is_full_backward_hook"))  # torch's, in every module


def script_attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes of a TorchScript module, by name: tensors as they are, containers as copies; else nothing."""
    kinds = vars(module).get("_concrete_type")
    if kinds is None:
        return {}
    hidden = _OWN | set(module._buffers.keys())
    return {name: getattr(module, name) for name in kinds.get_attributes() if name not in hidden}


def set_script_attribute(module: nn.Module, name: str, value: Any) -> None:
    """Give a TorchScript module's attribute another value of its type."""
    vars(module)["_c"].setattr(name, value)
