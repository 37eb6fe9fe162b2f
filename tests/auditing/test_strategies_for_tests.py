"""Awkward tensors: within their range, reproducible, and as awkward as they say."""

from __future__ import annotations

import math
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from precision_runtime.errors import ConfigurationError, UnknownNameError
from precision_runtime.formats import FORMATS
from precision_runtime.strategies_for_tests import KINDS, LAYOUTS, Recipe, shapes, tensors


def recipe(**changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "shape": (4, 6), "kind": "normal", "exponent": 0, "seed": 1, "layout": "contiguous", "dtype": torch.float32,
        "form": "float16", "low": -3e38, "high": 3e38,
    }  # fmt: skip
    return Recipe(**{**values, **changes})


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_values_stay_in_their_range_and_shapes_are_what_was_asked_for(data: st.DataObject) -> None:
    low = data.draw(st.floats(-100, 100, width=32))
    high = data.draw(st.floats(low, 1e4, width=32))
    shape = data.draw(shapes())
    t = data.draw(tensors(shape, low=low, high=high))
    assert tuple(t.shape) == shape
    assert t.dtype is torch.float32
    assert bool(((t >= low) & (t <= high)).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_recipe_gives_the_same_tensor_again_and_leaves_torch_s_generator_alone(kind: str, layout: str) -> None:
    state = torch.get_rng_state()
    a, b = (recipe(kind=kind, layout=layout, shape=(2, 3, 4, 5)).make() for _ in range(2))
    assert torch.equal(a, b)
    assert a.stride() == b.stride()
    assert torch.equal(state, torch.get_rng_state())
    for shape in ((), (0,), (3, 0, 2), (1,)):
        assert tuple(recipe(kind=kind, layout=layout, shape=shape).make().shape) == shape


def test_each_kind_is_what_it_says_for_its_format() -> None:
    half = FORMATS["float16"]

    def made(kind: str) -> torch.Tensor:
        return recipe(kind=kind, shape=(1000,), dtype=torch.float64).make()

    near = made("near max").abs()
    assert bool(((near >= half.max / 2) & (near <= half.max)).all())
    small = made("subnormal").abs()
    assert bool((small < half.smallest_normal).all())
    assert bool((small < half.smallest_subnormal / 2).any())  # flushed to zero
    assert bool((small.half() != 0).any())
    spread = made("wide").abs()
    assert math.log2(float(spread.max() / spread.min())) > 35
    assert bool((spread <= half.max).all())
    equal = made("near equal")
    assert float(equal.std() / equal.mean()) < 8 * half.unit_roundoff
    whole = made("whole")
    assert bool((whole == whole.round()).all())
    assert bool((whole.half().double() != whole).any())
    outlier = made("outlier").abs().sort().values
    assert float(outlier[-1]) > 100 * float(outlier[-2])
    assert bool((made("zeros") == 0).all())
    assert bool(made("zeros").signbit().any())
    assert 300 < int((made("some zeros") == 0).sum()) < 700
    assert bool(made("confident").exp().half().isinf().any())
    assert len(made("constant").unique()) == 1
    assert float(made("offset").mean()) > 5


def test_each_layout_is_what_it_says() -> None:
    shape = (2, 3, 4, 5)
    flat = recipe(shape=shape).make()
    made = {layout: recipe(shape=shape, layout=layout).make() for layout in LAYOUTS}
    assert all(torch.equal(t, flat) for layout, t in made.items() if layout != "expanded")
    assert made["contiguous"].is_contiguous()
    assert made["channels last"].is_contiguous(memory_format=torch.channels_last)
    assert made["transposed"].mT.is_contiguous()
    assert made["strided"].stride(-1) == 2
    assert made["shifted"].storage_offset() == 1
    assert made["expanded"].stride(0) == 0


def test_a_search_reaches_every_kind_and_the_simplest_example_is_simple() -> None:
    simple = hypothesis.find(
        tensors((3,)), lambda t: True, settings=settings(database=None, max_examples=50, deadline=None)
    )
    assert simple.is_contiguous()
    for wanted in (
        lambda t: bool((t.abs() > 3e4).any()),
        lambda t: bool((t.half() == 0).all()),
        lambda t: not t.numel(),
    ):
        hypothesis.find(tensors(), wanted, settings=settings(database=None, max_examples=2000, deadline=None))


def test_positive_and_negative_ranges_take_one_sign() -> None:
    assert bool((recipe(low=0.5, high=9.0).make() >= 0.5).all())
    assert bool((recipe(low=-9.0, high=-0.5).make() <= -0.5).all())


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"kinds": ["normals"]}, UnknownNameError, "did you mean 'normal'"),
        ({"layouts": "channels_last"}, UnknownNameError, "channels last"),
        ({"form": "fp16"}, UnknownNameError, "float16"),
        ({"kinds": []}, UnknownNameError, "kind"),
        ({"low": 2.0, "high": 1.0}, ConfigurationError, "no value"),
        ({"dtype": torch.int64}, ConfigurationError, "floating"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"(?i){text}"):
        tensors((2,), **options)
