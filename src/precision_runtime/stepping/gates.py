"""A gate in front of a scheduler: it steps when the optimizer has."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from precision_runtime.errors import ConfigurationError


class Gate:
    """Stands where ``scheduler`` stood: ``step`` is passed on only if its optimizer has stepped since the last time.

    So a step that a loss scaler skipped moves no learning rate, whether the scheduler steps with every batch or, as
    ``ReduceLROnPlateau`` does, once for many. Everything else (``state_dict``, ``get_last_lr`` …) is the scheduler's.
    It watches the optimizer itself: who called its ``step`` makes no difference.
    """

    def __init__(self, scheduler: Any) -> None:
        optimizer = getattr(scheduler, "optimizer", None)
        if not isinstance(optimizer, Optimizer) or not callable(getattr(scheduler, "step", None)):
            raise ConfigurationError(
                f"a gate goes before a scheduler of torch.optim.lr_scheduler's kind, which has an optimizer and a "
                f"step(); got {type(scheduler).__name__}"
            )
        self.scheduler = scheduler
        self._stepped = False
        self._handle = optimizer.register_step_post_hook(self._opened)

    def _opened(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._stepped = True

    def step(self, *args: Any, **kwargs: Any) -> bool:
        """Step the scheduler, with ``args`` (a metric, an epoch), or do nothing; return whether it stepped."""
        if not self._stepped:
            return False
        self.scheduler.step(*args, **kwargs)
        self._stepped = False
        return True

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.scheduler,)  # a copy watches the optimizer of its own scheduler

    def remove(self) -> None:
        """Stop watching the optimizer."""
        self._handle.remove()

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler":  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self.scheduler, name)

    def __repr__(self) -> str:
        return f"Gate({self.scheduler!r})"
