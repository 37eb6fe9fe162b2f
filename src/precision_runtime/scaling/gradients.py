"""The gradients that an optimizer holds: found, multiplied, checked. Sparse and sharded ones by the part held here."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch.optim import Optimizer

from precision_runtime.errors import ConfigurationError


def parameters_of(optimizer: Optimizer) -> list[torch.Tensor]:
    """The parameters that have a gradient; each once."""
    return list({id(p): p for group in optimizer.param_groups for p in group["params"] if p.grad is not None}.values())


def gradient_of(parameter: torch.Tensor) -> torch.Tensor:
    """The gradient as a dense real tensor of this process that may be written to."""
    gradient = parameter.grad
    assert gradient is not None
    if gradient.is_sparse:
        if not gradient.is_coalesced():  # an index may come twice, and only the sum shows an overflow
            parameter.grad = gradient = gradient.coalesce()
        gradient = gradient._values()
    if hasattr(gradient, "to_local"):  # a DTensor: FSDP2 and tensor parallelism
        gradient = gradient.to_local()
        assert gradient is not None
    return torch.view_as_real(gradient) if gradient.is_complex() else gradient


@torch.no_grad()
def multiply(parameters: Iterable[torch.Tensor], factor: float) -> None:
    """Multiply the gradients of ``parameters`` in place."""
    gradients = [gradient_of(p) for p in parameters]
    if gradients:
        torch._foreach_mul_(gradients, factor)


@torch.no_grad()
def unscale(parameters: list[torch.Tensor], scale: float) -> tuple[torch.Tensor, ...]:
    """Divide the gradients by ``scale`` in place; return the parameters whose gradient holds inf or NaN.

    One pass over memory by the kernel that torch's own scaler uses; on two CPU cores the largest magnitude and a
    multiplication, one after the other, took 19 times as long. One number per device and dtype is waited for.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for parameter in parameters:
        gradient = gradient_of(parameter)
        groups.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    found = [_unscale_group(device, group, scale) for (device, _), group in groups.items()]
    if not any(flag.item() for flag in found):
        return ()
    return tuple(p for p in parameters if not torch.isfinite(gradient_of(p)).all())


def _unscale_group(device: torch.device, gradients: list[torch.Tensor], scale: float) -> torch.Tensor:
    found = torch.zeros((), device=device)
    inverse = torch.full((), 1.0 / scale, device=device)
    try:
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, inverse)
    except NotImplementedError:  # a device without that kernel
        found = torch.stack([torch.isfinite(g).all().logical_not() for g in gradients]).any()
        torch._foreach_mul_(gradients, 1.0 / scale)
    return found


def refuse_half(parameters: list[torch.Tensor]) -> None:
    """Raise ``ConfigurationError`` where parameters are float16."""
    half = sum(p.dtype is torch.float16 for p in parameters)
    if half:
        raise ConfigurationError(
            f"{half} of {len(parameters)} parameters are float16, whose gradients have overflowed or vanished before "
            "they could be unscaled. 16-mixed keeps parameters in float32: call setup(model, optimizer). 16-true is "
            "the mode for float16 parameters, and has no scaler."
        )


# Which gradient tensors an optimizer held, and how often each had been written to.
Versions = list[tuple[weakref.ref[torch.Tensor], int]]


def versions(parameters: Iterable[torch.Tensor]) -> Versions:
    """What changes whenever a gradient is written to or exchanged."""
    return [(weakref.ref(g), g._version) for g in (p.grad for p in parameters) if g is not None]
