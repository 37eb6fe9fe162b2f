"""Headroom: scale inputs and activations by powers of two, audit, and say how far it is to the first failure."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from precision_runtime.asked import budget_of, check_subject, seed_of, whole
from precision_runtime.auditing import Originals, References
from precision_runtime.auditing.executing.discover import find_modules, name_of
from precision_runtime.auditing.executing.references import Reference
from precision_runtime.errors import unknown_names
from precision_runtime.formats import FORMATS, Format
from precision_runtime.modes import parse_mode
from precision_runtime.options import Options, names_of
from precision_runtime.ranging.grid import doublings, halvings
from precision_runtime.ranging.quickly import verdict
from precision_runtime.ranging.room import Axis, Headroom, Room
from precision_runtime.record import Report
from precision_runtime.tree import leaves, map_tensors

Key = tuple[str, str]  # module, where
Failures = Mapping[Key, tuple[str, str]]  # what fails: module type and kind

# What the edge of the range, or of stability, looks like in a report. Findings of other kinds do not go by scale.
_KINDS = frozenset(("range", "underflow", "instability", "amplification", "kernel"))
TRIED = 16
MOST = 64  # float32 inputs have some 2^±126


def headroom(
    function: Callable[..., Any],
    *args: Any,
    mode: object,
    kwargs: Mapping[str, Any] | None = None,
    accelerator: object = "cpu",
    gradients: bool = True,
    budget: float = 2.0,
    seed: int = 0,
    limit: int = TRIED,
    activations: str | Iterable[str] = (),
    originals: Originals | None = None,
    name: str | None = None,
    options: Options | None = None,
) -> Headroom:
    """Measure how many bits of scale are left until the first overflow, underflow or instability.

    Three ways, each a part of the result's ``rows``:

    - "inputs": floating inputs are multiplied by 2^k, up and down, and audited: per module and direction the last k
      that holds. Powers of two cost no precision by themselves.
    - "values": what each module returns, and the gradient that comes back to it, as the FP64 run has them: how often
      they may be doubled before the largest overflows, and halved before subnormal rounding (or zero) costs more than
      ``budget`` bits beyond one rounding. Where a scaler works, gradients are measured under the largest loss scale
      that keeps all of them finite (``figures["loss_scale"]``), which is where a scaler settles.
    - "activations": the results of each module that ``activations`` names (exact names or globs) are multiplied by
      2^k, and the whole is audited: what that does to everything that follows.

    At most ``limit`` powers of two are tried in each direction: 1, 2, 4 … first, then bisection, so a failure in a
    narrow band between two that hold may be missed. ``mode``, ``budget``, ``seed`` and the rest are ``audit``'s, and
    so are the errors; ``ConfigurationError`` for a limit out of 1 … 64.
    """
    check_subject(function, "headroom")
    budget, seed = budget_of(budget), seed_of(seed)
    limit = limit_of(limit)
    kwargs = dict(kwargs or {})
    parsed = parse_mode(mode, "headroom(mode=...)")
    originals = originals or Originals()
    modules = _modules(function, args, kwargs)
    chosen = _chosen(activations, modules)
    cost = 0

    def judged(inputs: tuple[Any, Any], references: References | None = None) -> Report:
        nonlocal cost
        cost += 1
        return verdict(
            function, *inputs, mode, accelerator, gradients=gradients, budget=budget, seed=seed, originals=originals,
            references=references, name=name, options=options,
        )  # fmt: skip

    kept = _Kept()
    with _dtypes(modules) as dtypes:
        base = judged((args, kwargs), kept)
    rows: list[Room] = []
    notes: list[str] = []
    if _scalable((args, kwargs)):
        sweep = _Sweep(lambda k: _failures(base if k == 0 else judged(_scaled((args, kwargs), k))), limit)
        rows += sweep.rows("inputs")
    else:
        notes.append("no floating input: nothing to scale there")
    figures: dict[str, float] = {}
    if kept.entry is not None:
        scaled = parsed.scaled or base.figures.get("loss_scale") is not None
        found, scale = _values(kept.entry, modules, dtypes, parsed.format, scaled, 2.0**budget, limit)
        rows += found
        if scale is not None:
            figures["loss_scale"] = scale
    for path in chosen:

        def fails(k: int, path: str = path) -> Failures:
            if k == 0:
                found = _failures(base)
            else:
                with _louder(modules[path], k):
                    found = _failures(judged((args, kwargs)))
            # Whatever fails is the consequence of this one's scale.
            return {(path, where): (type(modules[path]).__name__, kind) for (_, where), (_, kind) in found.items()}

        rows += _Sweep(fails, limit).rows("activations")
        if not any(r.axis == "activations" and r.module == path for r in rows):
            rows.append(Room("activations", path, type(modules[path]).__name__, "forward"))
    return Headroom(
        subject=name or name_of(function), mode=base.mode, accelerator=base.accelerator, status=base.status,
        limit=limit, rows=tuple(rows), notes=tuple(notes), audits=cost, figures=figures,
    )  # fmt: skip


def limit_of(value: object) -> int:
    """The powers of two that are tried each way; raises ``ConfigurationError`` for what is no number of them."""
    return whole("limit", value, 1, MOST, f"headroom() tries 1 to {MOST} powers of two each way")


class _Sweep:
    """Looks for the first failure of each module, upwards and downwards, by as few audits as bisection needs."""

    def __init__(self, judge: Callable[[int], Failures], limit: int) -> None:
        self._judge, self._limit = judge, limit
        self._seen: dict[int, Failures] = {}

    def rows(self, axis: Axis) -> list[Room]:
        edges = {sign: self._edges(sign) for sign in (1, -1)}
        found: dict[Key, Room] = {}
        for key in dict.fromkeys([*edges[1], *edges[-1]]):
            up, down = edges[1].get(key), edges[-1].get(key)
            some = up or down
            assert some is not None
            found[key] = Room(
                axis, key[0], some[1][0], key[1],
                up=None if up is None else up[0], above="" if up is None else up[1][1],
                down=None if down is None else down[0], below="" if down is None else down[1][1],
            )  # fmt: skip
        return list(found.values())

    def _edges(self, sign: int) -> dict[Key, tuple[int, tuple[str, str]]]:
        """For each module that fails on the way: the last power that holds, and what fails at the next."""
        edges = {key: (-1, what) for key, what in self._at(0).items()}
        good, step = 0, 1
        while True:
            step = min(step, self._limit)
            for key in self._at(sign * step):
                if key not in edges:
                    edges[key] = self._between(key, sign, good, step)
            if step == self._limit:
                return edges
            good, step = step, 2 * step

    def _between(self, key: Key, sign: int, good: int, bad: int) -> tuple[int, tuple[str, str]]:
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (good, middle) if key in self._at(sign * middle) else (middle, bad)
        return good, self._at(sign * bad)[key]

    def _at(self, power: int) -> Failures:
        if power not in self._seen:
            self._seen[power] = self._judge(power)
        return self._seen[power]


class _Kept(References):
    """Keeps the FP64 run of an audit for whoever wants to see its values."""

    def __init__(self) -> None:
        super().__init__(1)
        self.entry: Reference | None = None

    def keep(self, entry: Reference) -> None:
        self.entry = entry
        super().keep(entry)


def _failures(report: Report) -> Failures:
    found: dict[Key, tuple[str, str]] = {}
    for finding in report.findings:
        if finding.kind in _KINDS:
            found.setdefault((finding.module, finding.where), (finding.module_type, finding.kind))
    return found


# -- values ------------------------------------------------------------------------------------------------------------


def _values(
    entry: Reference, modules: Mapping[str, nn.Module], dtypes: Mapping[str, str], form: Format, scaled: bool,
    factor: float, limit: int,
) -> tuple[list[Room], float | None]:  # fmt: skip
    """Rows for what the FP64 run has at each module's border, and the loss scale that they are measured under."""
    found: dict[Key, list[torch.Tensor]] = {}
    for call in entry.run.calls:
        found.setdefault((call.name, "forward"), []).extend(_real(t for _, t in call.outputs))
        found.setdefault((call.name, "backward"), []).extend(_real(call.output_grads.values()))
    for name, grad in entry.parameter_grads.items():
        owner = name.rpartition(".")[0]
        if owner in modules:
            found.setdefault((owner, "backward"), []).extend(_real([grad]))
    holders = {path: FORMATS.get(dtypes.get(path, ""), form) for path, _ in found}
    scale = None
    if scaled:
        up = [
            doublings(_largest(ts), holders[path])
            for (path, where), ts in found.items() if where == "backward" and _largest(ts) > 0.0
        ]  # fmt: skip
        scale = 2.0 ** min(up) if up else None
    rows = []
    for (path, where), tensors in found.items():
        if not tensors or _largest(tensors) == 0.0:
            continue
        holder = holders[path]
        loss_scale = scale if scale is not None and where == "backward" else 1.0
        up_bits = doublings(_largest(tensors) * loss_scale, holder)
        downs = [halvings(t * loss_scale, holder, factor, limit) for t in tensors]
        follows = where == "backward" and scale is not None  # the scaler: larger gradients get a smaller scale
        up_ = None if follows or up_bits > limit else max(up_bits, -1)
        rows.append(
            Room(
                "values", path, type(modules[path]).__name__ if path in modules else "", where,
                up=up_, above="range" if up_ is not None else "the scaler follows" if follows else "",
                down=min((d for d in downs if d is not None), default=None),
                below="underflow" if any(d is not None for d in downs) else "", format=holder.name,
            )
        )  # fmt: skip
    return rows, scale


def _real(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Floating tensors that are finite and hold something; complex ones as pairs."""
    real = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors if t.layout is torch.strided)
    plain = [t.detach().to(torch.float64) for t in real if t.is_floating_point() and t.numel()]
    # A mask is made of finfo.min or -inf on purpose.
    return [torch.where(t.abs() < _MASK, t, torch.zeros_like(t)) for t in plain]


_MASK = 1e30


def _largest(tensors: Sequence[torch.Tensor]) -> float:
    return max((float(t.abs().max()) for t in tensors), default=0.0)


@contextmanager
def _dtypes(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, str]]:
    """The dtype in which the mode's own run leaves each module's first floating result, by module."""
    found: dict[str, str] = {}

    def note(path: str) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            first = next((t for _, t in leaves(output) if t.is_floating_point()), None)
            if first is not None and first.dtype is not torch.float64:  # FP64 is the reference's
                found.setdefault(path, str(first.dtype).removeprefix("torch."))

        return hook

    handles = [m.register_forward_hook(note(path)) for path, m in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


# -- scaling -----------------------------------------------------------------------------------------------------------


def _scalable(inputs: Any) -> bool:
    return any((t.is_floating_point() or t.is_complex()) and bool((t != 0).any()) for _, t in leaves(inputs))


def _scaled(inputs: Any, power: int) -> Any:
    """The inputs times 2^power, exactly: in float64 where their own dtype would lose something."""

    def scale(t: torch.Tensor) -> torch.Tensor:
        if not (t.is_floating_point() or t.is_complex()):
            return t
        wide = t.detach().to(torch.complex128 if t.is_complex() else torch.float64) * math.ldexp(1.0, power)
        own = wide.to(t.dtype)
        return own if bool((own.to(wide.dtype) == wide).all()) or bool(t.isnan().any()) else wide

    return map_tensors(scale, inputs)


@contextmanager
def _louder(module: nn.Module, power: int) -> Iterator[None]:
    """What the module returns is 2^power times what it would be."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        return map_tensors(lambda t: t * 2.0**power if t.is_floating_point() else t, output, objects=False)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _modules(function: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for root, module in find_modules(function, args, kwargs).items():
        for path, part in module.named_modules():
            found.setdefault(".".join(filter(None, (root, path))), part)
    return found


def _chosen(patterns: str | Iterable[str], modules: Mapping[str, nn.Module]) -> list[str]:
    given = names_of(patterns, "headroom(activations=...)")
    matched = {pattern: [path for path in modules if fnmatch.fnmatchcase(path, pattern)] for pattern in given}
    unknown = [pattern for pattern, paths in matched.items() if not paths]
    if unknown:
        raise unknown_names("module", unknown, [path for path in modules if path], "headroom(activations=...)")
    return list(dict.fromkeys(path for paths in matched.values() for path in paths))
