"""Settings of an optimizer that its parameters' format cannot hold: found before a step, and told in a sentence."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch.optim import Optimizer

from precision_runtime.formats import FORMATS
from precision_runtime.planning.toll import is_readable, pieces
from precision_runtime.pointing import users_line


class OptimizerWarning(UserWarning):
    """An optimizer will write NaN or inf into weights."""


@dataclass(frozen=True)
class Hazard:
    """One setting of one group of parameters, and what it becomes in ``dtype``, the format of parameters and state.

    ``severity``: "fatal" writes NaN or inf into weights; "loss" loses updates.
    """

    optimizer: str
    group: int
    setting: str
    value: float
    becomes: float
    dtype: str
    severity: Literal["fatal", "loss"]
    message: str

    def __str__(self) -> str:
        return f"{self.optimizer}, group {self.group}, {self.setting}={self.value:g} in {self.dtype}: {self.message}"


def _own(parameter: torch.Tensor) -> str:
    return str(parameter.dtype).removeprefix("torch.")


def hazards(optimizer: Optimizer, dtype_of: Callable[[torch.Tensor], str] = _own) -> list[Hazard]:
    """Every setting that half parameters turn into another one. Changes nothing; reads each weight once.

    ``dtype_of``: the dtype that counts for a parameter, where it is going to be cast. Only torch's own optimizers keep
    their state in the parameter's dtype and compute in it; others are not judged.
    """
    if not type(optimizer).__module__.startswith("torch.optim."):
        return []
    return [
        hazard
        for number, group in enumerate(optimizer.param_groups)
        for dtype in sorted({dtype_of(p) for p in group["params"]} & {"float16", "bfloat16"})
        for rule in (_eps, _betas, partial(_steps, dtype_of))
        for hazard in rule(type(optimizer).__name__, number, group, dtype)
    ]


def warn_of_fatal(optimizer: Optimizer) -> None:
    """Warn (``OptimizerWarning``) of every fatal hazard. Reads settings only, no weights."""
    for number, group in enumerate(optimizer.param_groups):
        half = {str(p.dtype).removeprefix("torch.") for p in group["params"]} & {"float16", "bfloat16"}
        if half and type(optimizer).__module__.startswith("torch.optim."):
            for dtype in sorted(half):
                for hazard in _eps(type(optimizer).__name__, number, group, dtype):
                    warnings.warn(str(hazard), OptimizerWarning, stacklevel=users_line())


def _eps(name: str, number: int, group: dict[str, Any], dtype: str) -> Iterator[Hazard]:
    eps = group.get("eps")
    if not isinstance(eps, float) or eps == 0.0 or group.get("fused"):  # fused kernels add eps in float32
        return
    if eps <= FORMATS[dtype].smallest_subnormal / 2:
        yield Hazard(
            name, number, "eps", eps, 0.0, dtype, "fatal",
            "it is 0 there, and a weight whose gradient is 0, or so small that its square is, becomes NaN or inf. Give "
            f"eps={_safe_eps(dtype):g}, or run the optimizer in float32: updates='stochastic' or 'kahan', or a mixed "
            "mode",
        )  # fmt: skip


def _safe_eps(dtype: str) -> float:
    """The smallest power of ten that is a normal number: with fewer digits eps itself would be rounded."""
    exponent = -1
    while 10.0 ** (exponent - 1) >= FORMATS[dtype].smallest_normal:
        exponent -= 1
    return float(f"1e{exponent}")


def _betas(name: str, number: int, group: dict[str, Any], dtype: str) -> Iterator[Hazard]:
    betas = group.get("betas")
    if not isinstance(betas, tuple):
        return
    for index, beta in enumerate(betas):
        # For v in [1, 2) the product v * beta rounds to v where v * (1 - beta) is below u, half the gap between
        # neighbours (u/2 at v = 1, whose lower gap is half as wide): for every v where 1 - beta < u/2.
        if isinstance(beta, float) and beta < 1.0 and 1.0 - beta < FORMATS[dtype].unit_roundoff / 2:
            yield Hazard(
                name, number, f"betas[{index}]", beta, 1.0, dtype, "loss",
                "a running average times it rounds to itself, so that it never falls. Keep the state in float32: "
                "updates='stochastic' or 'kahan', or a mixed mode",
            )  # fmt: skip


def _steps(
    dtype_of: Callable[[torch.Tensor], str], name: str, number: int, group: dict[str, Any], dtype: str
) -> Iterator[Hazard]:
    """Updates below half a unit in the last place: of optimizers of Adam's kind, which move each weight by about the
    learning rate whatever the gradient, and of SGD by the gradients that are there.
    """
    weights = [p for p in group["params"] if dtype_of(p) == dtype and is_readable(p) and p.numel()]
    if "betas" in group:
        step, what = float(group["lr"]), "a step of this size"
    elif "nesterov" in group and not group.get("dampening"):
        step, what = float(group["lr"]), "the present gradient times this"
        gradients = [(w, w.grad) for w in weights if w.grad is not None and is_readable(w.grad)]
    else:
        return
    half = getattr(torch, dtype)
    with torch.no_grad():
        if "betas" in group:
            still, meant = _still(weights, step, half), sum(w.numel() for w in weights)
        else:
            still, meant = _still_under(gradients, step, half)
    if still:
        yield Hazard(
            name, number, "lr", step, 0.0, dtype, "loss",
            f"{what} is below half a unit in the last place of {still:,} of {meant:,} weights, which do not move. "
            "updates='stochastic' or 'kahan' keeps such steps",
        )  # fmt: skip


def _still(weights: list[torch.Tensor], step: float, half: torch.dtype) -> int:
    """How many weights, once they are ``half``, a step moves neither up nor down."""
    # All magnitudes of a half format, ascending: nearly always a step is lost from one of them on.
    values = torch.arange(1 << 15, dtype=torch.int16).view(half)
    values = values[values < torch.inf]
    lost = (_moved(values, step) == values) & (_moved(values, -step) == values)
    if not step or not lost.any():
        return 0
    still, least = 0, float(values[lost][0])
    throughout = bool(lost[values >= least].all())
    for piece in (p.to(half) for w in weights for p in pieces(w)):
        if throughout:
            still += int(torch.count_nonzero(piece.abs() >= least))
        else:  # a step of just half a unit moves every other weight
            still += int(torch.count_nonzero((_moved(piece, step) == piece) & (_moved(piece, -step) == piece)))
    return still


def _still_under(gradients: list[tuple[torch.Tensor, torch.Tensor]], step: float, half: torch.dtype) -> tuple[int, int]:
    """How many weights ``step`` times their gradient does not move, and how many it is meant to move."""
    still = meant = 0
    for weight, gradient in gradients:
        for piece, slope in zip(pieces(weight), pieces(gradient), strict=True):
            narrow, moves = piece.to(half), slope.float() * step
            still += int(torch.count_nonzero(((narrow.float() - moves).to(half) == narrow) & (moves != 0)))
            meant += int(torch.count_nonzero(moves))
    return still, meant


def _moved(weight: torch.Tensor, step: float) -> torch.Tensor:
    return (weight.float() + step).to(weight.dtype)
