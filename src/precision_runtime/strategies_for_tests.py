"""Hypothesis strategies for tensors that are hard on a precision: awkward magnitudes, shapes and layouts.

Each value is made from a few small numbers (a kind of values, an exponent, a seed, a layout), so that an example is
reproducible, and Hypothesis shrinks it in few steps. Hypothesis itself is imported when a strategy is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from precision_runtime.errors import ConfigurationError, UnsupportedError, unknown_names
from precision_runtime.formats import FORMATS, Format

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

# Values of the kinds below are made for a format: what is near *its* largest value, what is subnormal in *it*.
Maker = Callable[[int, float, Format, torch.Generator], torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """All that an awkward tensor is made from: the same recipe gives the same tensor."""

    shape: tuple[int, ...]
    kind: str
    exponent: int
    seed: int
    layout: str
    dtype: torch.dtype
    form: str
    low: float
    high: float

    def make(self) -> torch.Tensor:
        """The tensor. torch's own generators are left alone."""
        generator = torch.Generator().manual_seed(self.seed)
        count = math.prod(self.shape)
        values = KINDS[self.kind](count, 2.0**self.exponent, FORMATS[self.form], generator)
        if self.low >= 0.0:
            values = values.abs()
        elif self.high <= 0.0:
            values = -values.abs()
        values = values.clamp(self.low, self.high).to(self.dtype)
        return LAYOUTS[self.layout](values.reshape(self.shape))


def tensors(
    shape: Any = None,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    dtype: torch.dtype = torch.float32,
    form: str = "float16",
    kinds: Iterable[str] | None = None,
    layouts: Iterable[str] | None = None,
) -> SearchStrategy[torch.Tensor]:
    """A strategy for tensors with values in ``low`` … ``high``.

    ``shape``: a tuple of sizes, or a strategy for such (default ``shapes()``). ``form``: the format that the values are
    awkward for, a name of ``formats.FORMATS``. ``kinds``: names of ``KINDS``, ``layouts``: of ``LAYOUTS``; all by
    default. The simplest example comes first: normal values of size 1, contiguous.

    Raises ``UnsupportedError`` where Hypothesis is not installed, ``UnknownNameError`` and ``ConfigurationError`` for
    names and ranges that do not exist.
    """
    st = strategies()
    chosen = _names("kind of values", "kinds of values", kinds, KINDS)
    laid = _names("layout", "layouts", layouts, LAYOUTS)
    if form not in FORMATS:
        raise unknown_names("format", [form], list(FORMATS), "tensors(form=...)")
    if not dtype.is_floating_point:
        raise ConfigurationError(f"tensors(dtype={dtype}) is not allowed: magnitudes are those of floating dtypes")
    if not low <= high:
        raise ConfigurationError(f"tensors(low={low!r}, high={high!r}) has no value in it")
    info = torch.finfo(dtype)
    low, high = max(low, info.min), min(high, info.max)
    near, far = _exponents(low, high, FORMATS[form])
    if shape is None:
        sizes = shapes()
    elif isinstance(shape, (tuple, list)):
        sizes = st.just(tuple(shape))
    else:
        sizes = shape
    made: SearchStrategy[torch.Tensor] = st.builds(
        Recipe, shape=sizes, kind=st.sampled_from(chosen), exponent=st.integers(near, far),
        seed=st.integers(0, 2**16 - 1), layout=st.sampled_from(laid), dtype=st.just(dtype), form=st.just(form),
        low=st.just(low), high=st.just(high),
    ).map(Recipe.make)  # fmt: skip
    return made


def shapes(dims: tuple[int, int] = (0, 4), sizes: tuple[int, int] = (0, 8)) -> SearchStrategy[tuple[int, ...]]:
    """A strategy for shapes with ``dims`` axes (smallest and largest number) of ``sizes``; also () and empty ones."""
    st = strategies()
    made: SearchStrategy[tuple[int, ...]] = st.lists(st.integers(*sizes), min_size=dims[0], max_size=dims[1]).map(tuple)
    return made


def strategies() -> Any:
    """``hypothesis.strategies``. Raises ``UnsupportedError`` with what to install where there is none."""
    try:
        from hypothesis import strategies as st
    except ImportError as error:
        raise UnsupportedError(
            "searching for failing inputs needs Hypothesis: pip install hypothesis, or pytest-precision[explore]"
        ) from error
    return st


# -- values ------------------------------------------------------------------------------------------------------------


def _uniform(count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(count, generator=generator, dtype=torch.float64)


def _signs(count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 2, (count,), generator=generator).double() * 2.0 - 1.0


def _normal(count: int, scale: float, form: Format, generator: torch.Generator) -> torch.Tensor:
    return scale * torch.randn(count, generator=generator, dtype=torch.float64)


def _zeros(count: int, scale: float, form: Format, generator: torch.Generator) -> torch.Tensor:
    """Zeros of both signs."""
    return 0.0 * _signs(count, generator)


def _some_zeros(count: int, scale: float, form: Format, generator: torch.Generator) -> torch.Tensor:
    return _normal(count, scale, form, generator) * (_uniform(count, generator) < 0.5)


def _constant(count: int, scale: float, form: Format, generator: torch.Generator) -> torch.Tensor:
    return torch.full((count,), scale, dtype=torch.float64)


def _near_equal(count: int, scale: float, form: Format, generator: torch.Generator) -> torch.Tensor:
    """A few units in the last place around one value: differences cancel."""
    return scale * (1.0 + 4.0 * form.unit_roundoff * torch.randn(count, generator=generator, dtype=torch.float64))


def _offset(count: int, scale: float, form: Format, generator: torch.Generator) -> torch.Tensor:
    """Normal values far from zero, as pixels are, or activations behind a ReLU."""
    return scale * (10.0 + torch.randn(count, generator=generator, dtype=torch.float64))


def _wide(count: int, scale: float, form: Format, generator: torch.Generator) -> torch.Tensor:
    """Magnitudes over the whole range of the format, each power of two as likely."""
    span = math.log2(form.max) - math.log2(form.smallest_subnormal)
    return _signs(count, generator) * form.smallest_subnormal * torch.exp2(span * _uniform(count, generator))


def _outlier(count: int, scale: float, form: Format, generator: torch.Generator) -> torch.Tensor:
    """Normal values, and one that is larger than all of them together can make up for."""
    values = _normal(count, scale, form, generator)
    if count:
        values[int(torch.randint(count, (), generator=generator))] = scale / form.eps
    return values


def _near_max(count: int, scale: float, form: Format, generator: torch.Generator) -> torch.Tensor:
    """Within a factor of two below the largest value."""
    return _signs(count, generator) * form.max * (0.5 + 0.5 * _uniform(count, generator))


def _subnormal(count: int, scale: float, form: Format, generator: torch.Generator) -> torch.Tensor:
    """Below the smallest value of full precision, and some below the smallest of all."""
    return _signs(count, generator) * form.smallest_normal * _uniform(count, generator).pow(4)


def _whole(count: int, scale: float, form: Format, generator: torch.Generator) -> torch.Tensor:
    """Whole numbers around the largest up to which all are exact, as positions and counts are."""
    return torch.randint(0, 4 * form.exact_integers, (count,), generator=generator).double()


def _confident(count: int, scale: float, form: Format, generator: torch.Generator) -> torch.Tensor:
    """Large logits of both signs: exp overflows, and sigmoid saturates."""
    return _signs(count, generator) * (20.0 + 80.0 * _uniform(count, generator))


KINDS: MappingProxyType[str, Maker] = MappingProxyType(
    {
        "normal": _normal,
        "constant": _constant,
        "offset": _offset,
        "near equal": _near_equal,
        "confident": _confident,
        "outlier": _outlier,
        "some zeros": _some_zeros,
        "zeros": _zeros,
        "whole": _whole,
        "wide": _wide,
        "near max": _near_max,
        "subnormal": _subnormal,
    }
)


# -- layouts -----------------------------------------------------------------------------------------------------------


def _transposed(t: torch.Tensor) -> torch.Tensor:
    return t.mT.contiguous().mT if t.dim() >= 2 else t


def _strided(t: torch.Tensor) -> torch.Tensor:
    """Every second element of a tensor twice as long."""
    if t.dim() == 0:
        return t
    long = t.new_zeros((*t.shape[:-1], 2 * t.shape[-1]))
    long[..., ::2] = t
    return long[..., ::2]


def _shifted(t: torch.Tensor) -> torch.Tensor:
    """Begins one element after its storage does."""
    flat = torch.cat((t.new_zeros(1), t.reshape(-1)))
    return flat[1:].view(t.shape)


def _expanded(t: torch.Tensor) -> torch.Tensor:
    """The first row for all rows, without a copy: stride 0."""
    return t[:1].expand(t.shape) if t.dim() and t.shape[0] else t


def _channels_last(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


LAYOUTS: MappingProxyType[str, Callable[[torch.Tensor], torch.Tensor]] = MappingProxyType(
    {
        "contiguous": lambda t: t,
        "transposed": _transposed,
        "strided": _strided,
        "shifted": _shifted,
        "expanded": _expanded,
        "channels last": _channels_last,
    }
)


# -- choices -----------------------------------------------------------------------------------------------------------


def _exponents(low: float, high: float, form: Format) -> tuple[int, int]:
    """The powers of two that sizes are drawn from: those of the format, as far as they lie in the range."""
    largest = max(abs(low), abs(high))
    smallest = 0.0 if low <= 0.0 <= high else min(abs(low), abs(high))
    far = form.emax if largest >= form.max else max(form.emin, math.frexp(largest)[1] - 1)
    near = form.emin if smallest < form.smallest_normal else min(far, math.frexp(smallest)[1] - 1)
    return min(near, far), far


def _names(
    what: str, plural: str, given: Iterable[str] | None, known: Sequence[str] | MappingProxyType[str, Any]
) -> list[str]:
    chosen = list(known if given is None else [given] if isinstance(given, str) else given)
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        raise unknown_names(what, unknown or ["(none)"], list(known), "tensors(...)", plural=plural)
    return chosen
