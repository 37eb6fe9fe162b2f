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
