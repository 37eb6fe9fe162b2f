"""The probe: a batch whose outputs go into checkpoints, and must come out again where one is loaded.

Across modes the outputs cannot be equal, and nobody chooses how different they may be: as in an audit, the loaded
weights are run in FP64, once truly and a few times disturbed by the rounding of the coarser of the two modes, and the
saved outputs, like those of the present mode, must lie as near to the true ones as those runs do.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from precision_runtime.auditing.executing.dispatch import TrueDouble, plain_double
from precision_runtime.auditing.executing.noise import Exact, Noise
from precision_runtime.auditing.executing.originals import Originals
from precision_runtime.auditing.executing.randomness import seeded
from precision_runtime.auditing.executing.unseen import transformed
from precision_runtime.auditing.executing.worlds import Worlds, widen_tree
from precision_runtime.auditing.judging.excess import flatten_sample, pair
from precision_runtime.checkpoints.changes import ProbeResult
from precision_runtime.errors import ConfigurationError
from precision_runtime.float8.recipes import parse_recipe
from precision_runtime.formats import FORMATS
from precision_runtime.modes import Mode
from precision_runtime.record import lost_bits
from precision_runtime.tree import leaves, map_tensors

SAMPLES = 6  # disturbed runs; a single output of few numbers needs that many for a spread
BUDGET = 2.0  # bits, as in an audit

_SEED = 0
# int8 rounds a row of inputs to 127 steps of its largest value, which is about 3.5 times its rms: half a step is
# 3.5 / 254 = 2^-6.2 of a typical value.
_INT8 = 2.0**-6


class Probe:
    """A batch for one model, kept on the CPU. The model is only referred to."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.name = type(model).__name__
        self.args, self.kwargs = map_tensors(lambda t: t.detach().cpu().clone(), (tuple(args), dict(kwargs)), False)
        self._model = weakref.ref(model)

    @property
    def model(self) -> nn.Module | None:
        """The model, while it lives."""
        return self._model()

    def state(self, device: torch.device) -> dict[str, Any]:
        """Inputs, and the outputs of the present weights."""
        model = self.model
        if model is None:
            raise ConfigurationError(f"the {self.name} that the probe was recorded with is gone; record it again")
        outputs = dict(run(model, self.args, self.kwargs, device))
        return {"model": self.name, "args": self.args, "kwargs": self.kwargs, "outputs": outputs}


def run(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], device: torch.device
) -> list[tuple[str, torch.Tensor]]:
    """The outputs of ``model`` in ``eval()``, without gradients, on the CPU. Training flags and draws stay as they are.

    Raises ``ConfigurationError`` where there is no tensor among them.
    """
    args, kwargs = map_tensors(lambda t: t.to(device, copy=True), (tuple(args), dict(kwargs)), False)
    with evaluating(model), torch.no_grad(), seeded(_SEED, device):
        result = model(*args, **kwargs)
    outputs = [(path, t.detach().cpu()) for path, t in leaves(result, objects=False)]
    if not outputs:
        raise ConfigurationError(
            f"{type(model).__name__} returned no tensor for the probe, but {type(result).__name__}"
        )
    return outputs


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model.eval()`` inside; each part's flag is put back."""
    flags = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, flag in flags:
            part.training = flag


def roundoff(mode: Mode, recipe: object) -> float:
    """The unit roundoff of the coarsest operands that a mode's forward has."""
    formats = [mode.compute]
    if mode.family == "float8":
        formats.append(parse_recipe(recipe).formats[0])
    elif mode.products:
        formats.append(mode.products)
    u = max(FORMATS[name].unit_roundoff for name in formats)
    return max(u, _INT8) if mode.weights.startswith("int8") else u


def check(
    model: nn.Module,
    state: Mapping[str, Any],
    device: torch.device,
    u: float,
    step: float,
    moved: Mapping[int, torch.Tensor],
) -> list[ProbeResult]:
    """Run the probe in ``state`` again, and judge both what was saved and what comes out now.

    ``u`` and ``step`` are unit roundoff and smallest subnormal number of the coarser mode; ``moved``: by the id of a
    weight, how far quantising it just now has moved each value.
    """
    now = run(model, state["args"], state["kwargs"], device)
    saved = state["outputs"]
    if [path for path, _ in now] != list(saved):
        raise ConfigurationError(
            f"the probe's outputs were saved as {[p or 'one tensor' for p in saved]} and are now "
            f"{[p or 'one tensor' for p, _ in now]}: this is another model's forward"
        )
    if all(_same(t, saved[path]) for path, t in now):
        return [ProbeResult(path, 0.0, 0.0, BUDGET) for path, _ in now]
    references, samples = _doubles(model, state, device, u, step, moved)
    results = []
    for (path, present), reference in zip(now, references, strict=True):
        worst, message = 0.0, ""
        gone = int((torch.isfinite(saved[path]) & ~torch.isfinite(present)).sum()) if _fits(present, saved[path]) else 0
        if gone:  # FP64 runs of weights that became inf are no better
            note = f"{gone} values are not finite any more"
            results.append(ProbeResult(path, math.inf, math.inf, BUDGET, note))
            continue
        for who, observed in (("what was saved", saved[path]), ("what comes out now", present)):
            made = pair(f"probe{path}", observed, reference, u, step)
            if isinstance(made, str):
                raise ConfigurationError(f"the probe cannot be judged: {made}")
            flat = [s for s in (flatten_sample(sample[path], made) for sample in samples) if s is not None]
            judged = made.judge(flat)
            if judged.score > worst:
                worst = judged.score
                message = f"{who} is {judged.score:.3g} times as far from FP64 as the modes' roundings explain"
        results.append(ProbeResult(path, _difference(present, saved[path]), lost_bits(worst), BUDGET, message))
    return results


def _doubles(
    model: nn.Module,
    state: Mapping[str, Any],
    device: torch.device,
    u: float,
    step: float,
    moved: Mapping[int, torch.Tensor],
) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """The outputs of the loaded weights in FP64, truly and disturbed."""
    given = map_tensors(lambda t: t.to(device), (state["args"], state["kwargs"]), False)
    inputs = widen_tree(given)
    parts = [part for part in model.modules() if part is not model]
    worlds = Worlds({"": model}, Originals())
    try:
        worlds.note_low()
        used = set(worlds.true_parameters)

        def outputs(noise: Noise | None) -> dict[str, torch.Tensor]:
            args, kwargs = inputs if noise is None else noise.inputs(inputs, Exact(inputs, torch.float32))
            parameters = None if noise is None else noise.parameters(worlds.true_parameters, used, moved)
            with ExitStack() as stack:
                stack.enter_context(worlds.true(parameters))
                if noise is not None:
                    for part in parts:
                        stack.callback(part.register_forward_hook(_disturbing(noise)).remove)
                for context in (
                    evaluating(model),
                    torch.no_grad(),
                    seeded(_SEED, device),
                    plain_double(),
                    TrueDouble(),
                ):
                    stack.enter_context(context)
                result = model(*args, **kwargs)
            return {path: t.detach().cpu() for path, t in leaves(result, objects=False)}

        true = outputs(None)
        samples = [outputs(Noise(u, _SEED, number, step)) for number in range(SAMPLES)]
    finally:
        worlds.restore()
    return list(true.values()), samples


def _disturbing(noise: Noise) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(module: nn.Module, args: Any, result: Any) -> Any:
        return None if transformed() else map_tensors(noise.rounded, result, objects=False)

    return hook


def _fits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.is_floating_point() == b.is_floating_point()


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())  # noqa: PLR0124


def _difference(now: torch.Tensor, saved: torch.Tensor) -> float:
    kind = torch.complex128 if now.is_complex() else torch.float64
    new, old = now.to(kind), saved.to(kind)
    size = float(torch.linalg.vector_norm(old))
    error = float(torch.linalg.vector_norm(new - old))
    return error / size if size else error
