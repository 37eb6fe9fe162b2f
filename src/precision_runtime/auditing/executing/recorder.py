"""Records every module call of one run: inputs, outputs, gradients at its border, random state, own state."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from precision_runtime import operands
from precision_runtime.auditing.executing.dispatch import Trace
from precision_runtime.auditing.executing.hooks import on_gradient
from precision_runtime.auditing.executing.noise import Noise, Reach
from precision_runtime.auditing.executing.provenance import Provenance
from precision_runtime.auditing.executing.randomness import RandomState
from precision_runtime.auditing.executing.roundings import Roundings
from precision_runtime.auditing.executing.snapshots import Snapshots
from precision_runtime.auditing.executing.unseen import transformed, unseen
from precision_runtime.auditing.executing.worlds import Worlds
from precision_runtime.tree import leaves, map_tensors
from precision_runtime.uncompiled import uncompiled

if TYPE_CHECKING:
    from precision_runtime.auditing.judging.screened import Screened


@dataclass(eq=False)
class Call:
    """One call of one module. Tensors are detached snapshots; gradients are those of this call alone."""

    name: str
    module: nn.Module
    parent: Call | None
    start: int  # order in which calls began
    index: int  # which call of this module in the run, from 0
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    rng: RandomState | None = None
    state: dict[tuple[int, str], Any] = field(default_factory=dict)
    outputs: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    input_grads: dict[str, torch.Tensor] = field(default_factory=dict)
    output_grads: dict[str, torch.Tensor] = field(default_factory=dict)
    children: list[Call] = field(default_factory=list)
    trace: Trace = field(default_factory=Trace)  # what its ops did
    moved: dict[str, torch.Tensor] = field(default_factory=dict)  # how far the layer's own rounding moved its operands
    anchors: list[torch.Tensor] | None = None  # the inputs, where none of them is floating
    tables: frozenset[str] = frozenset()  # paths of the results that are made of constants only
    takes: dict[str, int] = field(default_factory=dict)  # the inputs that ``Roundings`` follows, by its numbers
    gives: dict[str, int] = field(default_factory=dict)  # the results that it follows
    until: int = 0  # how many ops it had seen when the call was over
    screened: Screened | None = None  # what an FP64 run found of it as it went, where that is all that is kept
    end: int = -1  # order in which calls ended; -1 while open, or when the call raised

    def subtree(self) -> list[Call]:
        """This call and every call inside it, in the order in which they began."""
        out = [self]
        for child in self.children:
            out += child.subtree()
        return out


class Exchange(Protocol):
    """Sees a run's values and gradients at the borders of its calls, and may put others in their place."""

    def keeps(self, call: Call) -> bool:
        """Whether the call's results are to be kept all the same."""

    def values(self, call: Call, output: Any) -> Any:
        """What the call's result is from now on."""

    def arrive(self, call: Call, path: str, grad: torch.Tensor, inside: bool) -> torch.Tensor | None:
        """What to go on with instead of a gradient that arrives at an input (``inside``) or output; None: itself."""


class Recorder:
    """Hooks on every module for the time of one run.

    ``inputs`` keeps what a later replay of a call needs; ``outputs`` keeps results; ``gradients`` keeps gradients at
    each call's border, apart for each use of a tensor: inputs and outputs are replaced by views of their own.
    ``perturb`` is applied to the output of every call but the outermost ``skip`` ones, and to gradients there.
    ``alike`` are modules that run again during backward (recomputed or reversible segments): both times their outputs
    must be disturbed alike, or the disturbed run would contradict itself. ``recomputed`` collects them.
    ``leaky`` collects modules that are called again with what an earlier call left in a cache, gradient and all: that
    gradient is none that comes in through an output, so such calls are not judged backward.
    ``marks`` is the stack of a ``TrueDouble``, filled from the decisions of ``twins``, the low-precision run's calls.
    ``frames`` is the stack of a ``LowWatch``, which notes there what the ops of the open call do.
    ``exchange`` is asked at each border; then gradients are not kept, and results only where it says so.
    ``provenance`` says which results are tables; where a twin's is one, ``perturb`` leaves it as it is.
    ``roundings`` follows what calls are given and give; with ``perturb`` it says what is spared as far as ``until``.
    ``snapshots`` are those of the dispatch mode that the run is under; without them all that is kept is copied.
    Layers that round the operands of their products to a grid of their own (``operands``) are listened to with
    ``inputs``; with ``perturb`` the operands are moved as far in either direction, as the ``twins`` say.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], worlds: Worlds, *, inputs: bool = False, outputs: bool = True,
        gradients: bool = False, perturb: Noise | None = None, skip: nn.Module | None = None,
        frames: list[Trace] | None = None, alike: frozenset[str] = frozenset(),
        marks: list[Iterator[bool]] | None = None, twins: Sequence[Call] = (), scale: float = 1.0,
        exchange: Exchange | None = None, snapshots: Snapshots | None = None, provenance: Provenance | None = None,
        roundings: Roundings | None = None, until: float = math.inf,
    ) -> None:  # fmt: skip
        self.roundings, self._until = roundings, until
        self.takes: dict[str, int] = {}  # what the whole function was given, as ``roundings`` knows it
        self._provenance = provenance
        self.snapshots = snapshots or Snapshots(copying=True)
        self._exchange = exchange
        self.scale = scale  # of the loss in the run of the twins
        self.modules, self.worlds = modules, worlds
        self.alike = alike
        self._marks = marks
        self._twins: dict[str, list[Call]] = {}
        for call in twins:
            self._twins.setdefault(call.name, []).append(call)
        self.recomputed: set[str] = set()
        self.leaky: set[str] = set()
        self.second_order = False  # whether the code itself differentiated during the forward pass
        self.inputs, self.outputs, self.gradients = inputs, outputs, gradients
        self.perturb, self.skip, self.frames = perturb, skip, frames
        self.calls: list[Call] = []
        self.active = True  # off while backward runs: recomputed segments would be recorded twice
        self._open: list[Call] = []
        self._counts: dict[int, int] = {}
        self._ends = 0
        self._listening: Any = None
        self._handles: list[Any] = []
        self._names = {id(m): n for n, m in modules.items()}
        self._parts = {id(m): list(m.modules()) for m in modules.values()} if inputs else {}

    def __enter__(self) -> Recorder:
        for module in self.modules.values():
            if type(module).register_forward_pre_hook is not nn.Module.register_forward_pre_hook:
                continue  # scripted by torch.jit, which lets nobody listen: part of what calls it
            self._handles.append(module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True))
            # Before the hooks of others: what they collect of a result has to be the view of it whose gradient is kept.
            self._handles.append(module.register_forward_hook(self._leave, prepend=True, with_kwargs=True))
        if self.inputs:
            self._listening = operands.listening(self)
            self._listening.__enter__()
        return self

    def rounded(
        self, layer: nn.Module, role: str, before: torch.Tensor, after: torch.Tensor, clamped: torch.Tensor | None
    ) -> None:
        """Note how far a layer's own rounding moved an operand; what it clamped is no rounding and excused by none."""
        calls = [c for c in self.calls if c.module is layer]
        if not calls or (role != "gradient" and not self.active):  # a recomputed segment rounds as it did before
            return
        if role == "gradient":  # backward goes through the calls in reverse; it may be run again with another scale
            waiting = [c for c in calls if role not in c.moved]
            if not waiting:
                for call in calls:
                    del call.moved[role]
                waiting = calls
            call = waiting[-1]
        else:
            call = calls[-1]
        with torch._C._DisableTorchDispatch():
            moved = (after.detach().double() - before.detach().double()).abs_()
            if clamped is not None:
                moved.masked_fill_(clamped, 0.0)
            call.moved[role] = moved

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        if self._listening is not None:
            self._listening.__exit__(None, None, None)
        self._drop_overwritten()

    def rest(self) -> None:
        """The forward pass is over."""
        self.active = False
        if self._provenance is not None:
            self._provenance.close()
        if self.roundings is not None:
            self.roundings.close()

    def given(self, args: Any, kwargs: Any) -> None:
        """What the whole function is about to be given."""
        if self.roundings is not None and self.perturb is None:
            self.takes = self.roundings.admit(leaves((args, kwargs), objects=False))

    @property
    def innermost(self) -> Call | None:
        """The call that is open and has no open call inside it."""
        return self._open[-1] if self._open else None

    @uncompiled
    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if transformed():
            return None
        with unseen(args, kwargs):
            return self._before(module, args, kwargs)

    @uncompiled
    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if transformed():
            return None
        with unseen(args, kwargs, output):
            return self._after(module, args, kwargs, output)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.active:
            self.recomputed.add(self._names[id(module)])
            return None
        index = self._counts.get(id(module), 0)
        self._counts[id(module)] = index + 1
        call = Call(self._names[id(module)], module, self._open[-1] if self._open else None, len(self.calls), index)
        self.calls.append(call)
        if call.parent is not None:
            call.parent.children.append(call)
        self._open.append(call)
        if self.frames is not None:
            self.frames.append(call.trace)
        twin = self._twin(call)
        if self._marks is not None:
            self._marks.append(iter(twin.trace.decisions if twin is not None else ()))
        given = [t for _, t in leaves((args, kwargs))]
        if not any(t.is_floating_point() or t.is_complex() for t in given):
            call.anchors = [t.detach().clone() for t in given]
        if self.roundings is not None and self.perturb is None:
            call.takes = self.roundings.admit(leaves((args, kwargs), objects=False))
        if self.inputs:
            call.args, call.kwargs = map_tensors(self.keep, (args, kwargs))
            call.rng = RandomState.capture()
            call.state = self.worlds.changed_state(self._parts[id(module)])
        if self.gradients and torch.is_grad_enabled():
            if index > 0 and self._inherits((args, kwargs)):
                self.leaky.add(call.name)
            return self._with_own_views((args, kwargs), call, inside=True)
        if self.perturb is not None and twin is not None and "input" in twin.moved:
            return self._moved_input((args, kwargs), self.perturb, twin.moved["input"])
        return None

    def _twin(self, call: Call) -> Call | None:
        twins = self._twins.get(call.name, ())
        return twins[call.index] if call.index < len(twins) else None

    @staticmethod
    def _moved_input(given: Any, noise: Noise, moved: torch.Tensor) -> Any:
        """The call's arguments with the first floating one moved as the layer's own rounding would."""
        first = next((t for _, t in leaves(given, objects=False) if t.is_floating_point()), None)
        return map_tensors(lambda t: noise.within(t, moved) if t is first else t, given, objects=False)

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not self.active:
            if self.perturb is not None and self._names[id(module)] in self.alike:
                return self._disturbed(module, output, None)
            return None
        if not any(call.module is module for call in self._open):
            return None
        while True:  # calls that raised, and whose caller caught it, are still open
            call = self._open.pop()
            if self._marks is not None:
                self._marks.pop()
            if self.frames is not None:
                self.frames.pop()
                self.frames[-1].include(call.trace)
            if call.module is module:
                break
        call.end = self._ends
        self._ends += 1
        changed = False
        if self._provenance is not None:
            tables = (path for path, t in leaves(output, objects=False) if self._provenance.is_table(t))
            call.tables = frozenset(tables)
        if self.roundings is not None and self.perturb is None:
            call.until = self.roundings.now
            call.gives = self.roundings.admit(leaves(output, objects=False))
        if self.perturb is not None and not (call.parent is None and module is self.skip):
            if call.anchors is not None:
                call.outputs = self._results(call, output)
            twin = self._twin(call)
            output = self._disturbed(module, output, twin)
            changed = True
        elif self._exchange is not None:
            if self._exchange.keeps(call):
                call.outputs = self._results(call, output)
            output = self._exchange.values(call, output)
            changed = True
        elif self.outputs:
            call.outputs = self._results(call, output)
        if self.gradients and torch.is_grad_enabled():
            output = self._with_own_views(output, call, inside=False)
            changed = True
        if self.perturb is not None:
            self._move_gradient(call, output)
        return output if changed else None

    def _move_gradient(self, call: Call, output: Any) -> None:
        """Let the gradient that comes in be moved as the layer's own rounding would."""
        twin, noise = self._twin(call), self.perturb
        if twin is None or noise is None or "gradient" not in twin.moved:
            return
        moved = twin.moved["gradient"] / self.scale
        for _, t in leaves(output, objects=False):
            if t.requires_grad and t.numel() == moved.numel():
                on_gradient(t, lambda grad: noise.within(grad, moved))

    def keep(self, t: torch.Tensor) -> torch.Tensor:
        """The value that ``t`` has now, detached, for good."""
        return t.detach().clone() if self.worlds.is_state(t) else self.snapshots.take(t)

    def _results(self, call: Call, output: Any) -> list[tuple[str, torch.Tensor]]:
        return [(path, self.keep(t)) for path, t in leaves(output)]

    def _drop_overwritten(self) -> None:
        """Forget results that something unseen wrote to after their call.

        A call without results here has no twin, and is judged by a replay of its own.
        """
        lost = self.snapshots.lost()
        for call in self.calls if lost else ():
            if any(id(t) in lost for _, t in call.outputs):
                call.outputs = []

    @staticmethod
    def _inherits(given: Any) -> bool:
        """Whether a cache object among the inputs holds results that carry a gradient."""
        plain = {id(t) for _, t in leaves(given, objects=False)}
        return any(t.grad_fn is not None for _, t in leaves(given) if id(t) not in plain)

    def _disturbed(self, module: nn.Module, output: Any, twin: Call | None) -> Any:
        assert self.perturb is not None
        if self.perturb.reach is Reach.OUTSIDE:
            return output
        name = self._names[id(module)]
        noise = self.perturb.fixed(name) if name in self.alike else self.perturb
        constant, spared = _by_id(output, twin.tables if twin is not None else frozenset()), set[int]()
        if twin is not None and self.roundings is not None:
            spared = _by_id(output, self.roundings.spared(twin.gives, self._until))

        def disturb(t: torch.Tensor) -> torch.Tensor:
            if id(t) in constant:
                return t
            new = noise.result(t, single=id(t) in spared)
            if new is not t and new.requires_grad:
                on_gradient(new, noise)
            return new

        return map_tensors(disturb, output, objects=False)

    def _with_own_views(self, value: Any, call: Call, inside: bool) -> Any:
        """Replace each tensor that carries a gradient by a view of itself whose gradient is kept in ``call`` by path.

        A tensor used in two places has one gradient, the sum; its views have one each. ``inside``: these are inputs.
        """
        paths = {id(t): path for path, t in leaves(value, objects=False)}
        grads = call.input_grads if inside else call.output_grads

        def view(t: torch.Tensor) -> torch.Tensor:
            if not t.requires_grad or not (t.is_floating_point() or t.is_complex()) or t.layout is not torch.strided:
                return t
            if t.is_nested:
                return t
            own = t.view_as(t)
            path = paths.get(id(t), "")

            def keep(grad: torch.Tensor) -> torch.Tensor | None:
                if self.active:
                    self.second_order = True
                if self._exchange is not None:
                    return self._exchange.arrive(call, path, grad, inside)
                with unseen(grad):
                    grads[path] = self.snapshots.take(grad)
                return None

            on_gradient(own, keep)
            return own

        return map_tensors(view, value, objects=False)


def _by_id(value: Any, paths: Collection[str]) -> set[int]:
    return {id(t) for path, t in leaves(value, objects=False) if path in paths} if paths else set()
