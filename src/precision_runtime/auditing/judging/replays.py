"""Runs of a single call's module, apart from the function: in FP64, perturbed, in FP32, on what the call really got."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from precision_runtime.auditing.executing.calls import moved_weights
from precision_runtime.auditing.executing.dispatch import TrueDouble, plain_double
from precision_runtime.auditing.executing.failing import first_line
from precision_runtime.auditing.executing.masking import Masking
from precision_runtime.auditing.executing.noise import Exact, Noise, Reach
from precision_runtime.auditing.executing.recorder import Call, Exchange, Recorder
from precision_runtime.auditing.executing.recurrent import noisy_states
from precision_runtime.auditing.executing.references import Sample
from precision_runtime.auditing.executing.runs import Run, execute
from precision_runtime.auditing.executing.uses import Place, used_elsewhere
from precision_runtime.auditing.executing.worlds import Worlds, widen, widen_tree
from precision_runtime.auditing.judging.sheet import sample_of
from precision_runtime.setup import forwarding
from precision_runtime.tree import map_tensors


@dataclass
class Yardstick:
    """What the mode may lose: unit roundoff, subnormal step, the limit on excess, and whether islands are free."""

    u: float
    step: float
    limit: float
    mixed: bool
    seed: int
    own_u: Callable[[Call | None, str], float]
    exact: Exact
    alike: frozenset[str]  # modules that run again during backward
    full: bool  # a mode without a wider format to compute in: tables (buffers), too, are operands that it rounds
    masking: Masking
    products: float = 0.0  # unit roundoff of the operands of matrix products, where it is a coarser one

    def noise(self, u: float, number: int, width: float, reach: Reach = Reach.ALL) -> Noise:
        """The disturbance of the ``number``-th perturbed run of something that costs ``u``."""
        return Noise(u, self.seed, number, self.step, width, reach)


class Replays:
    """Makes replays of the calls of one low-precision run; ``failed`` says which could not be made, and why."""

    def __init__(self, worlds: Worlds, low: Run, yardstick: Yardstick, uses: Mapping[int, Collection[Place]]) -> None:
        self.worlds, self.low, self.yardstick = worlds, low, yardstick
        self.fallbacks: set[str] = set()
        self.failed: dict[str, str] = {}
        self.owned = _single_use_parameters(worlds, low, uses)  # {id(call): {id(parameter): name}}

    def true(
        self,
        call: Call,
        buffers: dict[tuple[int, str], torch.Tensor] | None = None,
        gradients: bool = True,
        screening: Exchange | None = None,
    ) -> Run | None:
        """Run the call's module in FP64 on the call's actual inputs and (with ``gradients``) incoming gradient.

        What is inside the call is of interest to ``screening`` only.
        """
        try:
            with (
                self.worlds.true(state=call.state, buffers=buffers),
                plain_double(),
                TrueDouble(masking=self.yardstick.masking) as mode,
            ):
                assert call.rng is not None
                call.rng.restore()
                args, kwargs = widen_tree((call.args, call.kwargs))
                backward = gradients and bool(call.output_grads)
                parts = {call.name: call.module} if screening is None else self._parts(call)
                recorder = Recorder(
                    parts, self.worlds, gradients=backward, exchange=screening, snapshots=mode.snapshots
                )  # fmt: skip
                run = execute(
                    call.module, args, kwargs, recorder,
                    cotangent=self._incoming(call) if backward else None, parameters=call.module.parameters(),
                    graph=bool(call.output_grads),
                )  # fmt: skip
            self.fallbacks |= mode.fallbacks
        except Exception as error:
            self.failed[call.name] = (
                f"this call could not be replayed in FP64 on its own inputs ({type(error).__name__}: "
                f"{first_line(error)}); judged within its caller"
            )
            return None
        return run if run.calls else None

    def single(self, call: Call) -> Run | None:
        """Run the call's module in FP32 on the inputs that it really got; None where it cannot."""
        assert call.rng is not None
        parameters = {k: _single(t) for k, t in self.worlds.true_parameters.items()}
        buffers = {k: _single(t) for k, t in self.worlds.true_buffers.items()}
        try:
            with self.worlds.true(parameters, buffers, call.state), forwarding.suspended():
                call.rng.restore()
                args, kwargs = map_tensors(_single, widen_tree((call.args, call.kwargs)))
                return execute(call.module, args, kwargs, Recorder({}, self.worlds))
        except Exception:
            return None

    def sample(self, call: Call, number: int, width: float, reach: Reach = Reach.ALL, gradients: bool = True) -> Sample:
        """The call's ``number``-th perturbed run, disturbed by ``width`` times the mode's unit roundoff."""
        noise = self.yardstick.noise(self.yardstick.own_u(call, "forward"), number, width, reach)
        used = {id(p) for p in call.module.parameters()}
        parameters = self.worlds.disturbed(noise, used, moved_weights(call.subtree()))
        tables = {k: b for k, b in self.worlds.true_buffers.items() if k[0] in {id(m) for m in call.module.modules()}}
        buffers = noise.buffers(tables) if self.yardstick.full else None
        with (
            parameters as disturbed,
            self.worlds.true(parameters=disturbed, buffers=buffers, state=call.state),
            plain_double(),
            TrueDouble(noise, masking=self.yardstick.masking, products=self.yardstick.products) as mode,
        ):
            assert call.rng is not None
            call.rng.restore()
            spared = self.low.spared(call)
            args, kwargs = noise.inputs(widen_tree((call.args, call.kwargs)), self.yardstick.exact, spared)
            parts = self._parts(call)
            recorder = Recorder(
                parts, self.worlds, outputs=False, perturb=noise, skip=call.module, alike=self.yardstick.alike,
                marks=mode.marks, twins=call.subtree(), scale=self.low.scale,
                roundings=self.low.roundings, until=call.until,
            )  # fmt: skip
            with noisy_states(parts.values(), noise):
                run = execute(
                    call.module, args, kwargs, recorder,
                    cotangent=self._incoming(call, noise) if gradients else None,
                    parameters=call.module.parameters(), graph=bool(call.output_grads),
                )  # fmt: skip
        names = self.owned.get(id(call), {})
        return sample_of(run, dict(names.items()))

    def _incoming(
        self, call: Call, noise: Noise | None = None
    ) -> Callable[[str, torch.Tensor], torch.Tensor | None] | None:
        if not call.output_grads:
            return None
        scale = self.low.scale

        def cotangent(path: str, output: torch.Tensor) -> torch.Tensor | None:
            grad = call.output_grads.get(path)
            if grad is None or grad.shape != output.shape:
                return None
            grad = widen(grad) / scale
            return noise(grad) if noise is not None else grad

        return cotangent

    def _parts(self, call: Call) -> dict[str, nn.Module]:
        """The call's module and what is inside it, by the names of the whole function."""
        inside = {id(m) for m in call.module.modules()} | {id(c.module) for c in call.subtree()}
        return {n: m for n, m in self.worlds.names.items() if id(m) in inside}


def _single_use_parameters(
    worlds: Worlds, low: Run, uses: Mapping[int, Collection[Place]]
) -> dict[int, dict[int, str]]:
    """Parameters by the one call that uses them: {id(call): {id(parameter): name}}.

    Tied ones are left out, and those that code beside the call uses (``uses``), too.
    """
    calls: dict[int, list[Call]] = {}
    for call in low.calls:
        calls.setdefault(id(call.module), []).append(call)
    owners: dict[int, set[int]] = {}
    names: dict[int, str] = {}
    where: dict[int, Call] = {}
    by_path = dict(worlds.names.items())
    for path, module in by_path.items():
        for name, p in module._parameters.items():
            if p is None:
                continue
            holder, full = path, name
            while id(by_path.get(holder)) not in calls and holder:
                holder, _, last = holder.rpartition(".")
                full = f"{last}.{full}"
            users = calls.get(id(by_path.get(holder)), [])
            owners.setdefault(id(p), set()).update(id(c) for c in users)
            names[id(p)] = full
            if len(users) == 1:
                where[id(p)] = users[0]
    out: dict[int, dict[int, str]] = {}
    for key, ids in owners.items():
        if len(ids) == 1 and key in where and not used_elsewhere(where[key], uses.get(key, ())):
            out.setdefault(id(where[key]), {})[key] = names[key]
    return out


def _single(t: torch.Tensor) -> torch.Tensor:
    """FP64 becomes FP32; everything else is as it was."""
    return t.to({torch.float64: torch.float32, torch.complex128: torch.complex64}.get(t.dtype, t.dtype))
