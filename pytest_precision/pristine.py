"""A set-up model as it was before ``setup``, for as long as a repair is looked for; then everything is put back.

Islands are made before a mode's cast. A model that a test has set up is cast already: the search for a repair has to
start from before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from precision_runtime.auditing import Originals

_HELD = ("_parameters", "_buffers", "_modules")


class Picture:
    """What a model's modules held at one moment: classes, attributes, tensors by reference; no value is copied."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._modules = [(part, type(part), _attributes(part)) for part in model.modules()]
        parameters = {id(p): p for part in model.modules() for p in part._parameters.values() if p is not None}
        self._tensors = [(p, p.data, p.grad) for p in parameters.values()]

    def show(self, values: Mapping[tuple[int, str], torch.Tensor] | None = None) -> None:
        """Make the model as it was; ``values`` replace those of single tensors, by module and name."""
        for part, kind, attributes in self._modules:
            part.__class__ = kind
            vars(part).clear()
            vars(part).update(_copied(attributes))
        for parameter, data, grad in self._tensors:
            parameter.grad = None  # of the other moment's dtype, perhaps
            parameter.data = data
            parameter.grad = grad
        for part, _, _ in self._modules if values else ():
            for name, tensor in [*part._parameters.items(), *part._buffers.items()]:
                value = values.get((id(part), name)) if values else None
                if value is None or tensor is None or value.shape != tensor.shape:
                    continue  # of packed codes the weights from before are the truth: they are frozen
                if isinstance(tensor, nn.Parameter):
                    tensor.grad = None
                    tensor.data = value.detach().to(tensor.dtype)
                else:
                    part._buffers[name] = value.detach().to(tensor.dtype)

    @contextmanager
    def shown(self, originals: Originals) -> Iterator[None]:
        """Inside, the model is as it was, but tensors that were trained since have their present values, widened."""
        now = Picture(self.model)
        values = {
            (id(part), name): originals.truth(part, name, tensor.detach())  # detached: its data is exchanged below
            for part in self.model.modules()
            for name, tensor in [*part._parameters.items(), *part._buffers.items()]
            if tensor is not None
        }
        try:
            self.show(values)
            yield
        finally:
            now.show()


def _attributes(part: nn.Module) -> dict[str, Any]:
    return _copied(vars(part))


def _copied(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes, with copies of the tables that torch keeps a module's content in."""
    return {key: dict(value) if key in _HELD else value for key, value in attributes.items()}
