"""The intrinsic error's source: FP64 values disturbed by one unit roundoff."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Collection, Mapping
from enum import Enum
from typing import Any

import torch

from precision_runtime.formats import FORMATS
from precision_runtime.tree import leaves, map_tensors

# Every half format is exact for whole numbers up to bfloat16's 256. Larger ones in a floating tensor are positions,
# counts or ids: code that casts them makes an error of its own, which noise on them would excuse.
EXACT_INTEGERS = 256.0


# Fresh draws would take longer than everything else in a perturbed run. So xi is read from one table, from a random
# place for each tensor; its length is a prime, so that no shape of a longer tensor falls in step with it.
_PERIOD = 1_048_583

# Unit roundoffs from here on are half formats' (float16: 2^-11), also when disturbed by less.
_HALF = 2.0**-20

SINGLE = FORMATS["float32"].unit_roundoff

# Beside a tensor whose largest value costs this many steps, half a step is nothing.
_FINE = 64.0


@functools.cache
def _table() -> torch.Tensor:
    """Uniform in [-1, 1], twice in a row, so that every stretch of one period is a slice."""
    with torch.inference_mode(False):
        xi = torch.empty(_PERIOD, dtype=torch.float64, device="cpu")
        xi.uniform_(-1.0, 1.0, generator=torch.Generator().manual_seed(0))
        return torch.cat((xi, xi))


def _uniform(start: int, count: int) -> torch.Tensor:
    """``count`` values of the table from ``start`` on, around its end where they are more than it holds."""
    table = _table()
    if count <= _PERIOD:
        return table[start : start + count]
    turn = table[start : start + _PERIOD]
    out = turn.new_empty(count)  # filled stretch by stretch: no second copy of what may be a large weight
    for stretch in out.split(_PERIOD):
        stretch.copy_(turn[: len(stretch)])
    return out


def _xi(start: int, t: torch.Tensor) -> torch.Tensor:
    """The table's values from ``start`` on, in the shape, dtype and place of ``t``."""
    return _uniform(start, t.numel()).view(t.shape).to(t.device, t.dtype)


class _Relative(torch.autograd.Function):
    """``t (1 + u xi)`` of a tensor longer than the table, whose backward pass reads xi again instead of keeping it.

    ``addcmul`` would keep xi, which is a copy here and as large as ``t``, until the backward pass.
    """

    @staticmethod
    def forward(t: torch.Tensor, u: float, start: int) -> torch.Tensor:
        xi = _xi(start, t)
        return torch.addcmul(t, t, xi, value=u, out=xi)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, float, int], output: torch.Tensor) -> None:
        _, ctx.u, ctx.start = inputs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad,) = grads
        with torch._C._DisableTorchDispatch():
            return _Relative.apply(grad, ctx.u, ctx.start), None, None


class Reach(Enum):
    """What of a run is disturbed besides the inputs and weights, as the mode rounds it, too."""

    ALL = "results of modules and norms, and operands of decisions"
    RESULTS = "results of modules, norms and products, and no operand of a decision"
    OUTSIDE = "operands of decisions"


class Noise:
    """Multiplies by (1 + u xi), xi uniform in [-1, 1], from a place of its own in the table (seed and sample).

    Where values are small, rounding costs half a ``step`` of the format's subnormal numbers instead: ``rounded`` adds
    step xi / 2. Exact zeros stay. Steps that float32 cannot even resolve are left out. ``width`` multiplies all of it.
    ``reach`` says what is disturbed besides inputs and weights.
    """

    def __init__(
        self, u: float, seed: int, sample: int, step: float = 0.0, width: float = 1.0, reach: Reach = Reach.ALL
    ) -> None:
        self.width, self.reach = width, reach
        self.u, self.step = width * u, width * step if step > FORMATS["float32"].smallest_normal else 0.0
        self._seed = (seed * 1_000_003 + sample * 7919 + 12345) % 2**63
        self._generator = torch.Generator().manual_seed(self._seed)

    def fixed(self, key: str) -> Noise:
        """Noise that starts anew from ``key`` each time: the same key and shapes give the same disturbance."""
        twin = Noise(self.u / self.width, 0, 0, self.step / self.width, self.width, self.reach)
        twin._generator.manual_seed(self._seed ^ zlib.crc32(key.encode()))
        return twin

    def __call__(self, t: torch.Tensor) -> torch.Tensor:
        """Disturb a floating or complex tensor relative to its values; anything else is returned as it is."""
        return self._disturbed(t, self.u, 0.0)

    def shrunk(self, t: torch.Tensor, most: float) -> torch.Tensor:
        """Disturb a tensor, and make all of it smaller by one random factor, by at most ``most`` of its size."""
        with torch._C._DisableTorchDispatch():
            factor = 1.0 - most * float(torch.rand((), dtype=torch.float64, generator=self._generator))
        return self.rounded(t) * factor

    def on_grid(self, t: torch.Tensor) -> torch.Tensor:
        """``t`` (FP64) rounded to the significand of the half format whose unit roundoff this is; counts stay."""
        if not t.is_floating_point() or self.u < _HALF or math.frexp(self.u)[0] != 0.5 or is_count(t):
            return t  # what an op costs in a full mode is no unit roundoff
        significand, exponent = torch.frexp(t)
        return torch.ldexp((significand / self.u).round() * self.u, exponent)

    def by(self, u: float, t: torch.Tensor) -> torch.Tensor:
        """The same with another unit roundoff."""
        return self._disturbed(t, self.width * u, 0.0)

    def rounded(self, t: torch.Tensor) -> torch.Tensor:
        """Disturb an operand of a forward pass as rounding it to the format would, small values included.

        Gradients are not disturbed so: a loss scale would have kept them, and its absence is to be found. Where no
        operand of a decision is disturbed by itself, values lie on the format's grid: that makes some of them equal.
        """
        disturbed = self._disturbed(t, self.u, self.step)
        if self.reach is not Reach.RESULTS or not disturbed.is_floating_point() or disturbed.is_nested:
            return disturbed
        with torch._C._DisableTorchDispatch():
            moved = self.on_grid(disturbed.detach()) - disturbed.detach()
        return disturbed + moved

    def within(self, t: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
        """Move each element as far as ``moved`` says (same number of elements), in either direction by chance."""
        if moved.numel() != t.numel():
            return self(t)
        with torch._C._DisableTorchDispatch():
            start = int(torch.randint(_PERIOD, (), generator=self._generator))
            signs = _uniform(start, t.numel()).view(t.shape).sign()
            return t + (moved.view(t.shape) * signs.to(moved.device)).to(t.dtype) * self.width

    def _disturbed(self, t: torch.Tensor, u: float, step: float) -> torch.Tensor:
        if t.is_nested:
            return _by_parts(t, lambda part: self._disturbed(part, u, step))
        if not (t.is_floating_point() or t.is_complex()) or t.numel() == 0 or t.layout is not torch.strided:
            return t
        with torch._C._DisableTorchDispatch():  # the audit's own draws are none of the judged code's
            start = int(torch.randint(_PERIOD, (), generator=self._generator))
            if t.numel() > _PERIOD:
                disturbed: torch.Tensor = _Relative.apply(t, u, start)
            else:
                disturbed = torch.addcmul(t, t, _xi(start, t), value=u)
            if step and not t.is_complex() and u * largest(t.detach()) < _FINE * step:
                disturbed = torch.addcmul(disturbed, _xi(start, t), (t != 0).to(t.dtype), value=step / 2.0)
            if not math.isfinite(abs(disturbed.detach().sum())):  # a mask of FP64's own largest value is no operand
                disturbed = torch.where(disturbed.isfinite(), disturbed, t)
        return disturbed

    def inputs(self, value: Any, exact: Exact, spared: Collection[str] = ()) -> Any:
        """Disturb inputs: all but those that the mode holds (``exact``) and counts (``EXACT_INTEGERS``).

        Those at the paths ``spared`` stay in float32 in the mode, and cost what float32 rounds. Where decisions are
        to be tipped by inputs alone, exact ones are disturbed, too: what a decision is made by may be rounded once.
        """
        single = {id(t) for path, t in leaves(value, objects=False) if path in spared} if spared else set()

        def disturb(t: torch.Tensor) -> torch.Tensor:
            if is_count(t) or (self.reach is not Reach.RESULTS and exact.holds(t)):
                return t
            return self.result(t, single=id(t) in single)

        return map_tensors(disturb, value)

    def single(self, t: torch.Tensor) -> torch.Tensor:
        """Disturb what the mode keeps in float32 by what that rounds, however narrow the rest."""
        return self._disturbed(t, max(1.0, self.width) * SINGLE, 0.0)

    def result(self, t: torch.Tensor, single: bool = False) -> torch.Tensor:
        """Disturb what a module gave, or is given: as ``rounded`` or ``single``, but a tensor of flags stays as it is.

        Every format holds 0 and 1, and code that multiplies a flag by a mask's constant makes infinity of 1 + u.
        """
        if is_flag(t):
            return t
        return self.single(t) if single else self.rounded(t)

    def parameters(
        self, true: Mapping[int, torch.Tensor], used: set[int], moved: Mapping[int, torch.Tensor]
    ) -> dict[int, torch.Tensor]:
        """Disturbed copies of the parameters in ``used`` (by id); those in ``moved`` also as far as their layer did."""
        out = {key: self.rounded(value) for key, value in true.items() if key in used}
        return out | {key: self.within(out[key], far) for key, far in moved.items() if key in out}

    def buffers(self, true: Mapping[tuple[int, str], torch.Tensor]) -> dict[tuple[int, str], torch.Tensor]:
        """Disturbed copies of the buffers: for full modes only, where a table in the mode's own dtype is an operand.

        In half modes buffers are never disturbed, so that a table which the cast has ruined shows.
        """
        return {key: value if is_count(value) else self.rounded(value) for key, value in true.items()}


class Exact:
    """The whole function's inputs that ``dtype`` holds exactly: casting them costs nothing, and nothing is excused.

    A module that is handed such an input unchanged is treated alike. Results of other modules are never exact: their
    values have been rounded already, and their operands' rounding is what the intrinsic error stands for.
    """

    def __init__(self, inputs: Any, dtype: torch.dtype) -> None:
        plain = [
            t for _, t in leaves(inputs) if t.is_floating_point() and t.layout is torch.strided and not t.is_nested
        ]
        self._tensors = [t for t in plain if torch.equal(t.to(dtype).to(t.dtype), t)]

    @property
    def key(self) -> int:
        """Tells sets of exact inputs of one function apart (a wider format holds what a narrower one holds)."""
        return len(self._tensors)

    def holds(self, t: torch.Tensor) -> bool:
        """Whether ``t`` (FP64) is one of them, value by value."""
        return any(t.shape == e.shape and t.dtype == e.dtype and torch.equal(t, e) for e in self._tensors)


def _by_parts(t: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """A nested tensor with ``function`` applied to its values."""
    if t.layout is torch.jagged:
        jagged: Any = t  # torch's stubs do not know its parts
        return torch.nested.nested_tensor_from_jagged(function(t.values()), jagged.offsets(), jagged.lengths())
    return torch.nested.as_nested_tensor([function(part) for part in t.unbind()])


def largest(t: torch.Tensor) -> float:
    """The largest magnitude of a real tensor, 0 of an empty one, without a copy of it."""
    if t.numel() == 0:
        return 0.0
    low, high = torch.aminmax(t)
    return max(-float(low), float(high))


def is_count(t: torch.Tensor) -> bool:
    """Whether a floating tensor holds whole numbers beyond the range where half formats are exact."""
    if not t.is_floating_point() or t.is_nested or t.numel() == 0:
        return False
    return largest(t.detach()) > EXACT_INTEGERS and bool((t == t.round()).all())


_PEEK = 16  # most tensors show within so many elements that they hold no flags


def is_flag(t: torch.Tensor) -> bool:
    """Whether a floating tensor holds zeros and ones only; a single number, which a mean may be, is no flag."""
    if not t.is_floating_point() or t.numel() < 2 or t.layout is not torch.strided or t.is_nested:
        return False
    with torch._C._DisableTorchDispatch():
        plain = t.detach().reshape(-1)
        return all(bool(((part == 0) | (part == 1)).all()) for part in (plain[:_PEEK], plain))
