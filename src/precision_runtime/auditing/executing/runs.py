"""Execute a function once, forward and (where asked) backward, under a recorder."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from precision_runtime.auditing.executing.graph import gradients
from precision_runtime.auditing.executing.recorder import Call, Recorder
from precision_runtime.auditing.executing.results import drained, flat, results
from precision_runtime.auditing.executing.roundings import Roundings
from precision_runtime.tree import leaves, map_tensors

Gradients = Sequence["torch.Tensor | None"]
Cotangent = Callable[[str, torch.Tensor], "torch.Tensor | None"]


@dataclass(eq=False)
class Run:
    """The results of one execution. Gradients are those of the loss, unscaled by whoever reads ``scale``."""

    outputs: list[tuple[str, torch.Tensor]]
    gave: str = ""  # the type of the result
    calls: list[Call] = field(default_factory=list)
    input_grads: dict[str, torch.Tensor] = field(default_factory=dict)
    parameter_grads: dict[int, torch.Tensor] = field(default_factory=dict)
    scale: float = 1.0
    differentiable: bool = False
    recomputed: frozenset[str] = frozenset()  # modules that ran again during backward
    leaky: frozenset[str] = frozenset()  # modules whose earlier calls get a gradient through a cache
    uses: dict[int, set[tuple[str, int] | None]] = field(default_factory=dict)  # calls by the parameter that they read
    roundings: Roundings | None = None  # what autocast has rounded of what calls are given and give
    takes: dict[str, int] = field(default_factory=dict)  # what the function is given, by the numbers it has there
    second_order: bool = False  # the code differentiates by itself: borders see gradients of two orders

    def spared(self, call: Call | None = None) -> frozenset[str]:
        """The paths of the inputs, of a call or of the whole function, that the mode has left in float32."""
        if self.roundings is None:
            return frozenset()
        takes, until = (self.takes, self.roundings.now) if call is None else (call.takes, call.until)
        return self.roundings.spared(takes, until)

    def left(self) -> tuple[tuple[str, int, frozenset[str]], ...]:
        """By call, the paths of the results that the mode has left in float32, where there are any."""
        if self.roundings is None:
            return ()
        found = ((c.name, c.index, self.roundings.spared(c.gives, math.inf)) for c in self.calls)
        return tuple(entry for entry in found if entry[2])


def execute(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    recorder: Recorder,
    *,
    cotangent: Cotangent | None = None,
    parameters: Iterable[nn.Parameter] = (),
    scales: Sequence[float] = (1.0,),
    forward_context: Callable[[], Any] = contextlib.nullcontext,
    backward_context: Callable[[], Any] = contextlib.nullcontext,
    graph: bool = False,
) -> Run:
    """Run ``function``; with ``cotangent``, differentiate its outputs with respect to floating inputs and parameters.

    ``cotangent(path, output)`` gives each output's incoming gradient, or None to leave it out. ``scales`` are loss
    scales in the order in which a dynamic scaler would come to them: the first that keeps every gradient finite counts,
    or one between it and the one before; where none does, the one that loses the fewest. ``graph``: gradients
    are enabled all the same where there is no ``cotangent``.
    The inputs are copied, so that in-place code changes copies only.
    """
    sources: list[tuple[str, torch.Tensor]] = []
    paths = {id(t): path for path, t in leaves((args, kwargs), objects=False)}

    def leaf(t: torch.Tensor) -> torch.Tensor:
        new = t.detach().clone()
        # FP8 has no arithmetic, so there are no gradients in it.
        differentiable = (t.is_floating_point() and t.itemsize > 1) or t.is_complex()
        if cotangent is None or id(t) not in paths or not differentiable:
            return new
        new.requires_grad_(True)
        sources.append((paths[id(t)], new))
        return new.clone()  # not a leaf, so that in-place code still works

    grad = graph or cotangent is not None or recorder.worlds.grad
    with torch.set_grad_enabled(grad):
        args, kwargs = map_tensors(leaf, (tuple(args), dict(kwargs)))
    recorder.given(args, kwargs)
    try:
        with recorder:
            with torch.set_grad_enabled(grad), _quiet(grad), forward_context():
                result = drained(function(*args, **kwargs))
            recorder.rest()
            with backward_context():
                run = Run([], type(result).__name__, recorder.calls, roundings=recorder.roundings, takes=recorder.takes)
                return differentiate(run, result, sources, recorder, cotangent, parameters, scales)
    finally:
        recorder.rest()


@contextlib.contextmanager
def _quiet(grad: bool) -> Iterator[None]:
    """Checkpoints warn where nothing requires a gradient: without ``grad`` that is the audit's own doing."""
    if grad:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
        yield


def differentiate(
    run: Run, result: Any, sources: list[tuple[str, torch.Tensor]], recorder: Recorder, cotangent: Cotangent | None,
    parameters: Iterable[nn.Parameter], scales: Sequence[float],
) -> Run:  # fmt: skip
    """Complete ``run`` with the results' values and, where ``cotangent`` is given, with gradients."""
    outputs = results(result)
    run.outputs = [(path, recorder.keep(t)) for path, t in outputs]
    if cotangent is None:
        return run
    # What a cache object holds is no result that a loss is made of; and a replay could not see a gradient that comes in
    # through one.
    direct = {path for path, _ in leaves(result, objects=False)}
    incoming = [
        (t, c) for path, t in outputs if t.requires_grad and path in direct
        for c in (cotangent(path, t),) if c is not None
    ]  # fmt: skip
    wanted = list({id(p): p for p in parameters if p.requires_grad}.values())
    targets = [t for _, t in sources] + wanted
    if not incoming or not targets:
        return run
    run.differentiable = True

    lost: dict[float, int] = {}  # by scale, how many gradients are not finite

    def backward(scale: float) -> Gradients:
        found = gradients(
            [t for t, _ in incoming], targets, [_scaled(c, scale, t) for t, c in incoming], retain=len(scales) > 1
        )
        lost[scale] = sum(not _finite(g) for g in found if g is not None) if len(scales) > 1 else 0
        return found

    made = _largest_finite(backward, lost, scales)
    if made is None:  # where none keeps all of them finite, the one that loses the fewest
        scale = min(scales, key=lambda scale: (lost[scale], -scale))
        made = scale, backward(scale)
    run.scale, found = made
    run.recomputed, run.leaky = frozenset(recorder.recomputed), frozenset(recorder.leaky)
    run.second_order = recorder.second_order
    found = [g if g is None else flat(g) for g in found]
    found = [g if g is None or g.layout is torch.strided else _dense(g) for g in found]
    for (path, _), g in zip(sources, found[: len(sources)], strict=True):
        if g is not None:
            run.input_grads[path] = g.detach()
    for p, g in zip(wanted, found[len(sources) :], strict=True):
        if g is not None:
            run.parameter_grads[id(p)] = g.detach()
    return run


def _largest_finite(
    backward: Callable[[float], Gradients], lost: Mapping[float, int], scales: Sequence[float]
) -> tuple[float, Gradients] | None:
    """The loss scale that a dynamic scaler comes to, and the gradients at it: those of the last backward pass made.

    ``scales`` are powers of two; between one that keeps all gradients finite and the one before, which does not,
    halvings are made up for. ``lost`` says how many a backward pass has lost. None where no scale keeps all.
    """
    beyond = scales[0]
    for scale in scales:
        found = backward(scale)
        if not lost[scale]:
            break
        beyond = scale
    else:
        return None
    least = last = scale
    while beyond > 2.0 * least:
        last = least * 2.0 ** (math.log2(beyond / least) // 2)
        found = backward(last)
        least, beyond = (least, last) if lost[last] else (last, beyond)
    return least, found if last == least else backward(least)


def loss_gradient(seed: int) -> Cotangent:
    """The incoming gradient that stands for a user's loss: 1 for a scalar, values from 0.75 to 1.25 otherwise.

    Coherent in sign, as the gradient of a mean is, but not constant: a constant is exactly what softmax and norms
    cancel. The values are multiples of 2^-6, exact in every format from bfloat16 on.
    """

    def cotangent(path: str, output: torch.Tensor) -> torch.Tensor | None:
        if output.numel() == 0:
            return None
        if output.numel() == 1:
            return torch.ones(output.shape, dtype=torch.float64, device=output.device)
        generator = torch.Generator().manual_seed(seed + sum(map(ord, path)))
        steps = torch.randint(0, 33, tuple(output.shape), generator=generator)
        return ((steps + 48).to(torch.float64) / 64).to(output.device)

    return cotangent


def _finite(gradient: torch.Tensor) -> bool:
    """Whether a gradient of any layout is finite."""
    with _disable_current_modes():  # a question of the audit's own, and no decision of the judged code
        plain = flat(gradient)
        plain = plain if plain.layout is torch.strided else plain.to_dense()
        return bool(torch.isfinite(plain).all())


def _dense(gradient: torch.Tensor) -> torch.Tensor:
    """A sparse gradient as one that can be judged; what it holds for one place is summed exactly, and rounded once."""
    with torch._C._DisableTorchDispatch():  # an optimizer's affair, and no op of the judged code
        return gradient.detach().to(torch.float64).to_dense().to(gradient.dtype)


def _scaled(cotangent: torch.Tensor, scale: float, output: torch.Tensor) -> torch.Tensor:
    return (cotangent * scale).to(output.dtype) if scale != 1.0 else cotangent.to(output.dtype)
