"""The dispatch mode below every search for a guilty op: numbers the ops of one run, and knows where they come from.

An op of the backward pass has the line, and the name, of the forward op whose derivative it computes.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
from torch._ops import HigherOrderOperator

from precision_runtime.auditing.blaming.shadow import Shadows, own
from precision_runtime.auditing.executing.dispatch import PRODUCTS, Trace, TrueDouble
from precision_runtime.auditing.executing.places import tensors_of
from precision_runtime.auditing.executing.randomness import draw_of
from precision_runtime.auditing.executing.unseen import made_of_others, traced
from precision_runtime.dispatching import OwnMode, opened

# Ops whose result holds whatever was in memory.
_GARBAGE = frozenset(f"aten::{n}" for n in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"))
# Operands that hold codes, not values: a layer's packed weights.
_PACKED = (torch.uint8, torch.int8)
# Below these functions runs what is judged, or autograd's engine; what is above them is not the code's own line.
_ENTRIES = frozenset(("execute", "differentiate", "_engine_run_backward"))


@dataclass(frozen=True)
class Site:
    """Where ops come from: an op ('aten::log'), the user's line, and whether a module inside the judged one runs it."""

    op: str
    line: str  # "file.py:12: code", '' where no user code is on the stack
    inner: bool = False


@dataclass(frozen=True)
class Step:
    """One op of one run: its number, its site, its own name."""

    number: int
    site: Site
    backward: bool
    name: str


@dataclass
class Plan:
    """What must be known of an op, read once from its schema."""

    name: str
    fixed: bool  # random: the result is what it is in the actual run
    foreign: bool  # no op of torch's own
    views: bool  # aliases an argument and writes nothing
    writes: bool
    product: bool
    copies: bool  # a cast
    garbage: bool


class Observer(OwnMode):
    """Numbers the ops of one run and knows their sites; subclasses say in ``follow`` what to do with them.

    Inactive until ``begin``. ``double`` computes ops in FP64. ``frames`` is the stack of the run's ``LowWatch``: as
    deep as module calls are nested. Ops deeper than ``depth`` are inner ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self.active = False
        self.frames: Sequence[Trace] = ()
        self.depth = 1
        self.count = 0
        self.shadows = Shadows()
        self.double: TrueDouble | None = None
        self._plans: dict[Any, Plan] = {}
        self._by_node: dict[int, Site] = {}  # sites of forward ops by autograd's sequence number
        self._lines: dict[tuple[str, int], str] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if types and made_of_others(types):
            return NotImplemented
        kwargs = dict(kwargs or {})
        if traced():
            return func(*args, **kwargs)
        if not self.active:
            return func(*args, **kwargs)
        plan = self._plans.get(func)
        if plan is None:
            if isinstance(func, HigherOrderOperator):
                return opened(self, func, args, kwargs)
            plan = self._plans[func] = plan_of(func)
        site, backward = self._site(plan.name)
        if plan.views or _shapes_only(args):
            return func(*args, **kwargs)
        if plan.foreign and any(t.dtype in _PACKED for t in tensors_of((args, kwargs))):
            plan = replace(plan, fixed=True)  # scales in FP64 would mean other values to it
        number = self.count
        self.count += 1
        return self.follow(func, plan, Step(number, site, backward, plan.name), args, kwargs)

    def begin(self, frames: Sequence[Trace], double: TrueDouble) -> None:
        """From here on ops are those of the judged code."""
        self.frames, self.double, self.active = frames, double, True

    def follow(self, func: Any, plan: Plan, step: Step, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run one op that makes or writes values."""
        raise NotImplementedError

    # -- FP64 -------------------------------------------------------------------------------------------------------

    def wide(self, t: torch.Tensor) -> torch.Tensor:
        """The FP64 values of an operand: its shadow, or its own values."""
        shadow = self.shadows.get(t)
        return own(t) if shadow is None else shadow

    def compute(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run the op on FP64 operands; None where it has neither an FP64 nor an FP32 kernel."""
        assert self.double is not None
        with torch._C._DisableTorchDispatch():
            try:
                return self.double.__torch_dispatch__(func, (), args, kwargs)
            except (RuntimeError, NotImplementedError, TypeError, IndexError):
                return None

    def dropped_out(self, plan: Plan, args: Sequence[Any], result: Any) -> torch.Tensor | None:
        """A dropout's FP64 result with the mask that was drawn; None for every other op."""
        if plan.name != "aten::native_dropout" or len(args) < 2 or not 0.0 < args[1] < 1.0:
            return None
        scaled: torch.Tensor = self.wide(args[0]) * result[1] / (1.0 - args[1])
        return scaled

    # -- where ------------------------------------------------------------------------------------------------------

    def _site(self, op: str) -> tuple[Site, bool]:
        line = self._line()
        node = torch._C._current_autograd_node()
        if node is None or line:  # forward code, also that which runs again during backward
            site = Site(op, line, len(self.frames) > self.depth)
            if torch.is_grad_enabled() or node is None:
                self._by_node.setdefault(torch.autograd._get_sequence_nr() - 1, site)  # type: ignore[attr-defined]
            return site, node is not None
        return self._by_node.get(node._sequence_nr(), Site(op, "")), True

    def _line(self) -> str:
        """The innermost frame of code that is neither torch's nor ours, up to autograd's engine."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            code = frame.f_code
            key = (code.co_filename, frame.f_lineno)
            text = self._lines.get(key)
            if text is None:
                text = self._lines[key] = _text_of(*key)
            if text:
                return text
            if code.co_name in _ENTRIES:
                return ""
            frame = frame.f_back
        return ""


def plan_of(func: Any) -> Plan:
    """Read the op's schema."""
    name = func._schema.name
    aliases = [a.alias_info for a in func._schema.arguments if a.alias_info is not None]
    writes = any(a.is_write for a in aliases)
    return Plan(
        name=name,
        fixed=draw_of(func) is not None or name in ("aten::randperm", "aten::randint"),
        foreign=not name.startswith("aten::"),
        views=bool(aliases) and not writes,
        writes=writes,
        product=name in PRODUCTS,
        copies=name in ("aten::_to_copy", "aten::to"),
        garbage=name in _GARBAGE,
    )


def _text_of(filename: str, number: int) -> str:
    """``file.py:12: code`` for user code, '' for torch's, this package's and code without a file."""
    path = filename.replace("\\", "/")
    if "/torch/" in path or "/precision_runtime/" in path or path.startswith("<"):
        return ""
    return f"{path.rpartition('/')[2]}:{number}: {linecache.getline(filename, number).strip()}"


def _shapes_only(args: Sequence[Any]) -> bool:
    """Whether an op works out a result's shape only, as torch's own decompositions do of forward-mode derivatives."""
    return any(isinstance(a, torch.Tensor) and a.is_meta for a in args)
