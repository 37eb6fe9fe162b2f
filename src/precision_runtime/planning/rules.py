"""How a plan is made: the rules of ``setup`` applied to a model that stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from precision_runtime.casting import FLOATING
from precision_runtime.float8.layers import LAYERS
from precision_runtime.layers import QuantizedLayer
from precision_runtime.planning.plan import Plan, Row
from precision_runtime.planning.targets import Place, Targets, places
from precision_runtime.planning.toll import changed, is_readable, toll
from precision_runtime.setup import forwarding
from precision_runtime.setup.islands import island_around, islands_in, plan_islands
from precision_runtime.setup.keeping import Island
from precision_runtime.setup.swapping import Swap
from precision_runtime.setup.tables import law_of
from precision_runtime.setup.unwrapping import inside
from precision_runtime.stepping.optimizers import hazards
from precision_runtime.strategies import Strategy

# Layers whose parameters autocast brings to half, on every accelerator: they go into products and nothing else.
_PRODUCTS = (nn.Linear, nn.Bilinear, _ConvNd, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)


def plan_for(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    strategy: Strategy,
    lane: tuple[str, str],
    *,
    scaled: bool = False,
    wide: bool = False,
) -> Plan:
    """The plan of ``setup(model, *optimizers)``; ``lane`` is mode and accelerator, for people.

    Of a framework's wrapper the plan is that of the model inside.

    ``scaled``: the loss is scaled; ``wide``: optimizers compute in float32 on half weights. Raises as ``setup`` does
    for names that match nothing and for a model that is set up in another mode.
    """
    model = inside(model)
    forwarding.check(model, strategy)
    islands = islands_in(model) or plan_islands(model, strategy)
    swaps = strategy.swaps(model)
    targets = Targets(model, strategy, islands, swaps)
    held = places(model)
    shared = _shared(held)
    rows: list[Row] = []
    for place in held:
        rows += _tensor(place, targets, strategy, islands, shared)
    rows += [_layer(row, strategy) for row in swaps]
    rows += [Row(i.path, "island", "", i.dtype, notes=(i.reason,)) for i in islands]
    rows += _nothing(model, strategy, swaps)
    after = {id(place.tensor): targets(place) for place in held}
    for name, optimizer in _named(optimizers):
        rows += _optimizer(name, optimizer, strategy, after, scaled, wide)
    return Plan(type(model).__name__, *lane, tuple(rows))


def _tensor(
    place: Place, targets: Targets, strategy: Strategy, islands: Sequence[Island], shared: dict[int, str]
) -> Iterator[Row]:
    tensor, target = place.tensor, targets(place)
    elements = 0 if is_lazy(tensor) else tensor.numel()
    before = _name(tensor.dtype)
    if isinstance(place.owner, QuantizedLayer) and not tensor.is_floating_point():
        before = str(target) if isinstance(target, str) else before
    after = target if isinstance(target, str) else _name(target)
    dtype = target if isinstance(target, torch.dtype) else strategy.compute  # codes are dequantised into that
    cast = _autocast(place, strategy, islands) if after == before else None
    counted = cast or dtype
    narrows = tensor.dtype in FLOATING and counted in FLOATING and (before != after or cast is not None)
    paid = toll(tensor, counted) if narrows else None
    unknown = narrows and paid is None
    risks: list[str] = []
    notes: list[str] = []
    inf = zero = whole = 0
    if paid is not None:
        inf = paid.inf
        if isinstance(target, torch.dtype):  # how codes round is the format's price
            zero, whole = paid.zero, paid.whole
        heavy = zero and (paid.heavy or place.kind == "buffer" or not tensor.dim())
        if inf:
            risks.append(f"{inf} of {elements} values become inf in {_name(counted)}")
        if heavy:
            risks.append(f"{zero} of {elements} values become 0 in {_name(counted)}")
        if whole:
            risks.append(f"{whole} whole numbers become others in {_name(counted)}")
        if zero and not heavy:
            notes.append(f"{zero} of {elements} become 0, which weighs less than the roundings of their neighbours")
    if before != after:
        risks += _table_risks(place, dtype)
        other = shared.get(id(tensor))
        if other:
            risks.append(f"it shares memory with {other!r}; the cast gives each a copy of its own")
    if len(place.names) > 1:
        notes.append(f"tied: it is also {', '.join(map(repr, place.names[1:]))}")
    if unknown:
        notes.append(f"its values are unknown ({_whereabouts(tensor)})")
    if tensor.is_complex() and strategy.mode.low:
        notes.append("complex: kept whole, for a cast to a real format would drop the imaginary part")
    island = island_around(place.name, islands)
    if island is not None:
        notes.append(f"an island in {island.dtype}")
    counts: tuple[int | None, ...] = (None, None, None) if unknown else (inf, zero, whole)
    yield Row(
        place.name, place.kind, before, after, elements, _name(cast) if cast else "", counts[0], counts[1],
        counts[2], tuple(risks), tuple(notes), place.names[1:],
    )  # fmt: skip
    if place.kind == "parameter" and tensor.grad is not None and not isinstance(target, str):
        yield from _gradient(place, tensor.grad, targets)


def _whereabouts(tensor: torch.Tensor) -> str:
    if is_lazy(tensor):
        return "made at the first forward"
    if tensor.is_meta:
        return "on the meta device"
    return str(tensor.layout) if tensor.layout is not torch.strided else f"held by a {type(tensor.data).__name__}"


def _gradient(place: Place, gradient: torch.Tensor, targets: Targets) -> Iterator[Row]:
    """A gradient that is there already is cast with its parameter."""
    target = targets.cast(gradient.dtype, id(place.tensor), place.name)
    if target is gradient.dtype:
        return
    paid = toll(gradient, target)
    name = f"{place.name}.grad"
    before, after = _name(gradient.dtype), _name(target)
    if paid is None:
        yield Row(name, "gradient", before, after, gradient.numel(), "", None, None, None, (), ("values unknown",))
        return
    risks = [f"{paid.inf} values become inf"] if paid.inf else []
    risks += [f"{paid.zero} of {gradient.numel()} values become 0"] if paid.zero and paid.heavy else []
    yield Row(name, "gradient", before, after, gradient.numel(), "", paid.inf, paid.zero, 0, tuple(risks))


def _table_risks(place: Place, dtype: torch.dtype) -> Iterator[str]:
    tensor = place.tensor
    if not is_readable(tensor) or tensor.dtype not in FLOATING or isinstance(place.owner, _NormBase):
        return
    if tensor.dtype is torch.float64 and dtype is not torch.float64:
        number = changed(tensor, dtype)
        if number:
            yield f"{number} of its float64 values are not kept: whoever made it float64 chose that"
    if place.kind == "buffer" and torch.finfo(dtype).bits < torch.finfo(torch.float32).bits:
        law = law_of(tensor)
        if law and changed(tensor, dtype):
            yield f"it holds {law}; a large factor multiplies their roundings, and islands='auto' keeps it wide"


def _autocast(place: Place, strategy: Strategy, islands: Sequence[Island]) -> torch.dtype | None:
    """The dtype that autocast makes of this parameter at each call; None where it makes none."""
    if not strategy.mode.autocast or place.kind != "parameter" or place.tensor.dtype is not torch.float32:
        return None
    uses = zip(place.names, place.owners, strict=True)
    cast = any(isinstance(owner, _PRODUCTS) and island_around(name, islands) is None for name, owner in uses)
    return strategy.compute if cast else None


def _shared(held: Sequence[Place]) -> dict[int, str]:
    """For each tensor over the memory of another one: the other's name."""
    found: dict[int, list[Place]] = {}
    for place in held:
        if is_readable(place.tensor) and place.tensor.numel():
            with torch._C.DisableTorchFunction():
                found.setdefault(place.tensor.untyped_storage()._cdata, []).append(place)
    return {
        id(place.tensor): next(other.name for other in group if other is not place)
        for group in found.values() if len(group) > 1
        for place in group
    }  # fmt: skip


def _layer(swap: Swap, strategy: Strategy) -> Row:
    kind = type(swap.layer)
    if not swap.swapped:
        return Row(swap.name, "layer", kind.__name__, kind.__name__, notes=(swap.reason,))
    if strategy.mode.weights:
        return Row(swap.name, "layer", kind.__name__, f"{kind.__name__} in {strategy.mode.weights}")
    recipe = type(strategy.options.recipe).__name__
    return Row(swap.name, "layer", kind.__name__, LAYERS[kind].__name__, notes=(f"recipe {recipe}",))


def _nothing(model: nn.Module, strategy: Strategy, swaps: Sequence[Swap]) -> Iterator[Row]:
    taken = any(isinstance(part, QuantizedLayer) or _is_foreign(part) for part in model.modules())
    if strategy.mode.weights and not taken and not any(row.swapped for row in swaps):
        why = "none of its layers can be swapped" if swaps else "it has no nn.Linear"
        notes = (f"nothing would be quantised: {why}",)
        yield Row("", "refusal", type(model).__name__, strategy.mode.name, notes=notes)


def _is_foreign(part: nn.Module) -> bool:
    return any(kind.__module__.partition(".")[0] == "bitsandbytes" for kind in type(part).__mro__)


def _named(optimizers: Sequence[Optimizer]) -> Iterator[tuple[str, Optimizer]]:
    seen: dict[str, int] = {}
    for optimizer in optimizers:
        name = type(optimizer).__name__
        number = seen[name] = seen.get(name, -1) + 1
        yield f"{name}{number or ''}", optimizer


def _optimizer(
    name: str, optimizer: Optimizer, strategy: Strategy, after: dict[int, Any], scaled: bool, wide: bool
) -> Iterator[Row]:
    dtype_of = _in_step(after, strategy, wide)
    for hazard in hazards(optimizer, dtype_of):
        yield Row(
            f"{name}.{hazard.group}.{hazard.setting}", "optimizer", f"{hazard.value:g}", f"{hazard.becomes:g}",
            risks=(f"in {hazard.dtype}: {hazard.message}",),
        )  # fmt: skip
    groups = optimizer.param_groups
    parameters = [p for group in groups for p in group["params"]]
    codes = sum(isinstance(after.get(id(p)), str) for p in parameters)
    if codes:
        yield _remark(name, "params", f"{codes} of its weights are stored as codes, frozen, and taken out of it")
    foreign = sum(id(p) not in after for p in parameters)
    if foreign:
        yield _remark(name, "params", f"{foreign} of its parameters are not this model's: they are not cast or moved")
    if any(group.get("fused") for group in groups) and scaled:
        yield _remark(
            name, "fused",
            "gradients are unscaled by the runtime, not inside the fused kernel: clip with runtime.clip_gradients, for "
            "clipping by hand before runtime.step would clip gradients that are still scaled",
        )  # fmt: skip
    if isinstance(optimizer, torch.optim.LBFGS):
        if strategy.mode.masters:
            yield Row(
                f"{name}.closure", "refusal", name, strategy.mode.name,
                notes=("it evaluates a closure during its step, which master weights do not allow",),
            )  # fmt: skip
        else:
            yield _remark(name, "closure", "it needs a closure, which computes the loss: step(optimizer, closure)")
    half = sum(dtype_of(p) == "float16" for p in parameters)
    if half and scaled:
        yield Row(
            f"{name}.params", "refusal", "float16", strategy.mode.name,
            notes=(f"{half} parameters are float16, whose gradients cannot be unscaled without loss",),
        )  # fmt: skip


def _remark(name: str, setting: str, text: str) -> Row:
    return Row(f"{name}.{setting}", "optimizer", "", "", notes=(text,))


def _in_step(after: dict[int, Any], strategy: Strategy, wide: bool) -> Callable[[torch.Tensor], str]:
    """The dtype in which an optimizer would meet a parameter after ``setup``; "" for codes, which it does not meet."""

    def dtype_of(parameter: torch.Tensor) -> str:
        target = after.get(id(parameter), parameter.dtype)
        if isinstance(target, str):
            return ""
        half = target in (torch.float16, torch.bfloat16)
        return "float32" if half and (wide or (strategy.mode.masters and parameter.requires_grad)) else _name(target)

    return dtype_of


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
