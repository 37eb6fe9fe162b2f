"""Moving a model to its device without losing what points at its parameters.

On most devices ``model.to`` gives every parameter new memory and keeps the object. On XLA it cannot, and makes new
parameters: tied weights come apart, and an optimizer made before goes on updating the old ones, silently.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from precision_runtime.errors import ConfigurationError


def refuse_meta(model: nn.Module, device: torch.device) -> None:
    """Raise ``ConfigurationError`` where ``model`` has tensors on the meta device, and so no values to move."""
    if device.type == "meta":
        return
    tensors = (*model.named_parameters(), *model.named_buffers())
    empty = [name for name, tensor in tensors if tensor.is_meta]
    if empty:
        more = f" and {len(empty) - _SHOWN} more" if len(empty) > _SHOWN else ""
        raise ConfigurationError(
            f"{type(model).__name__} has tensors on the meta device, which have no values that setup could cast or "
            f"move to {device}: {', '.join(map(repr, empty[:_SHOWN]))}{more}. Load its weights first "
            "(load_state_dict(state, assign=True)), or make it inside runtime.init_module(); runtime.plan(model) takes "
            "it as it is"
        )


_SHOWN = 3


def move(model: nn.Module, device: torch.device, optimizers: Iterable[Optimizer]) -> None:
    """Put ``model`` on ``device``; tied parameters stay tied, and ``optimizers`` hold the parameters that it has then.

    What the optimizers have collected for a parameter stays with it.
    """
    if all(t.device == device for t in (*model.parameters(), *model.buffers())):
        return
    places = [(part, name, p) for part in model.modules() for name, p in part._parameters.items() if p is not None]
    model.to(device)
    moved: dict[int, Any] = {}
    for part, name, before in places:
        now = part._parameters[name]
        if now is not None and now is not before:
            part._parameters[name] = moved.setdefault(id(before), now)
    for optimizer in optimizers if moved else ():
        for group in optimizer.param_groups:
            group["params"][:] = [moved.get(id(p), p) for p in group["params"]]
        for old in [p for p in optimizer.state if id(p) in moved]:
            optimizer.state[moved[id(old)]] = optimizer.state.pop(old)
