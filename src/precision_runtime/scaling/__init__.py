"""Loss scaling: keep small float16 gradients from vanishing, and skip the steps whose gradients overflowed."""

from __future__ import annotations

import torch

from precision_runtime.errors import ConfigurationError
from precision_runtime.scaling.adopted import AdoptedScaler
from precision_runtime.scaling.contract import Inspection, NullScaler, Scaler
from precision_runtime.scaling.dynamic import DynamicScaler
from precision_runtime.scaling.history import Change, StalledError, StallWarning
from precision_runtime.scaling.static import StaticScaler

__all__ = [
    "AdoptedScaler",
    "Change",
    "DynamicScaler",
    "Inspection",
    "NullScaler",
    "Scaler",
    "StallWarning",
    "StalledError",
    "StaticScaler",
    "scaler_from",
]


def scaler_from(given: object, device: torch.device | None = None) -> Scaler:
    """The scaler behind the argument ``scaler``: None for the default, one of ours, or torch's ``GradScaler`` or
    ``ShardedGradScaler``.

    Torch's scalers switch themselves off where the device that they were made for (cuda, unless told otherwise) is
    missing, and training then goes on unscaled. Such a scaler is refused where it is to serve another ``device``.
    Raises ``ConfigurationError`` for it, and for anything that is no scaler.
    """
    if given is None:
        return DynamicScaler()
    if isinstance(given, Scaler):
        return given
    if not isinstance(given, torch.amp.GradScaler):
        raise ConfigurationError(
            f"scaler={given!r} is no scaler: give a DynamicScaler or StaticScaler of precision_runtime.scaling, or a "
            "torch.amp.GradScaler"
        )
    if given.is_enabled():
        return AdoptedScaler(given)
    if device is not None and given._device != device.type:
        raise ConfigurationError(
            f"scaler={type(given).__name__}: it is inactive, for it was made for {given._device!r} and would leave "
            f"every loss on {device.type!r} unscaled. Make it with device={device.type!r}; one that is to be inactive "
            f"takes enabled=False as well."
        )
    return NullScaler()
