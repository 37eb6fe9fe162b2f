"""Scalers of torch, taken over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from precision_runtime.errors import ConfigurationError
from precision_runtime.scaling.dynamic import DynamicScaler
from precision_runtime.scaling.rounds import LARGEST

_PLAIN = (torch.amp.GradScaler, torch.cuda.amp.GradScaler, torch.cpu.amp.grad_scaler.GradScaler)


class AdoptedScaler(DynamicScaler):
    """Takes the settings and the state of a ``torch.amp.GradScaler``, and keeps its ``state_dict()`` true.

    The floor is added, at 1 or at the scale that it comes with. A ``ShardedGradScaler`` brings the process group whose
    processes decide together. Raises ``ConfigurationError`` for other subclasses.
    """

    alone = False  # the source has the same scale, and its owner may have scaled the loss with it

    def __init__(self, source: torch.amp.GradScaler) -> None:
        if type(source) not in _PLAIN and not _is_sharded(source):
            raise ConfigurationError(
                f"scaler={type(source).__name__}: a subclass of GradScaler may do more than its settings say, and that "
                "would be lost. Give a torch.amp.GradScaler, or a precision_runtime.scaling.DynamicScaler."
            )
        state = source.state_dict()
        super().__init__(
            init_scale=state["scale"],
            growth_factor=state["growth_factor"],
            backoff_factor=state["backoff_factor"],
            growth_interval=state["growth_interval"],
            floor=min(1.0, state["scale"]),
            ceiling=max(LARGEST, state["scale"]),
            process_group=_group_of(source),
        )
        self._reset(self._now.counted(int(state["_growth_tracker"]), 0, 0))
        self._source = source

    def close(self, optimizer: Optimizer, culprits: tuple[str, ...] = ()) -> None:
        """Count the step, and tell the source."""
        super().close(optimizer, culprits)
        self._publish()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As saved, and tell the source."""
        super().load_state_dict(state)
        self._publish()

    def _publish(self) -> None:
        self._source.load_state_dict(
            {
                "scale": self.scale,
                "growth_factor": self.growth_factor,
                "backoff_factor": self.backoff_factor,
                "growth_interval": self.growth_interval,
                "_growth_tracker": self._next.good,
            }
        )


def _is_sharded(source: torch.amp.GradScaler) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    return type(source) is ShardedGradScaler


def _group_of(source: torch.amp.GradScaler) -> Any:
    """The group of a sharded scaler; one made without a group means every process."""
    if not _is_sharded(source):
        return None
    given = getattr(source, "process_group", None)
    return torch.distributed.group.WORLD if given is None else given
