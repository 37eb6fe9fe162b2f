"""Recipes: what a user may write, and what is said to what is wrong."""

import enum
import types
from dataclasses import dataclass, field, make_dataclass

import pytest

from precision_runtime.errors import ConfigurationError, UnknownNameError
from precision_runtime.float8 import (
    DelayedScaling,
    Float8BlockScaling,
    Float8CurrentScaling,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
    parse_recipe,
)
from precision_runtime.float8.recipes import RECIPES


class Format(enum.Enum):
    """NVIDIA's, as far as it matters."""

    E4M3 = (448, 448)
    HYBRID = (448, 57344)


def foreign(name, **fields):
    """An object as NVIDIA's library makes them: known by the name of its class."""
    return make_dataclass(name, [(k, object, field(default=v)) for k, v in fields.items()])()


def test_nothing_is_delayed_scaling_with_the_published_defaults():
    recipe = parse_recipe()
    assert recipe == DelayedScaling(0, "HYBRID", 1024, "max", True)
    assert recipe.formats == ("float8_e4m3fn", "float8_e5m2")


def test_the_documents_example_is_read():
    given = {"fp8_format": "HYBRID", "amax_history_len": 16, "amax_compute_algo": "max"}
    assert parse_recipe(given) == DelayedScaling(amax_history_len=16)


@pytest.mark.parametrize("kind", RECIPES.values(), ids=RECIPES)
def test_a_class_its_name_and_its_dict_are_the_same_recipe(kind):
    assert parse_recipe(kind) == parse_recipe(kind.__name__) == parse_recipe({"recipe": kind.__name__}) == kind()
    assert parse_recipe(kind().to_dict()) == kind()
    assert hash(parse_recipe(kind())) == hash(kind())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            foreign(
                "DelayedScaling", margin=1, fp8_format=Format.E4M3, amax_history_len=4, amax_compute_algo="most_recent",
                scaling_factor_compute_algo=None, reduce_amax=False, fp8_dpa=False, fp8_mha=False,
            ),
            DelayedScaling(1, "E4M3", 4, "most_recent", False),
        ),
        (
            foreign("Float8CurrentScaling", fp8_format=Format.HYBRID, fp8_gemm_fprop=object(), backward_override=None),
            Float8CurrentScaling(),
        ),
        (foreign("MXFP8BlockScaling", margin=0, fp8_format=Format.E4M3), MXFP8BlockScaling()),
        (foreign("Float8BlockScaling", w_block_scaling_dim=1), Float8BlockScaling(w_block_scaling_dim=1)),
        (
            foreign("NVFP4BlockScaling", disable_rht=True, fp4_format="E2M1", fp8_format=Format.E4M3),
            NVFP4BlockScaling(disable_rht=True),
        ),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_objects_of_nvidia_s_library_are_read_by_name_and_fields(given, expected):
    assert parse_recipe(given) == expected


def test_plain_objects_are_read_by_their_attributes():
    kind = type("MXFP8BlockScaling", (types.SimpleNamespace,), {})
    assert parse_recipe(kind(fp8_format=Format.HYBRID)) == MXFP8BlockScaling("HYBRID")


def test_every_wrong_field_and_value_is_named_at_once_with_the_nearest_right_one():
    with pytest.raises(UnknownNameError) as caught:
        parse_recipe({"fp8_fromat": "HYBRID", "amax_histori_len": 3, "amax_compute_algo": "maxx"})
    text = str(caught.value)
    assert "'fp8_fromat', which DelayedScaling does not know. Did you mean 'fp8_format'?" in text
    assert "Did you mean 'amax_history_len'?" in text
    assert "amax_compute_algo of DelayedScaling is 'max' or 'most_recent', got 'maxx'. Did you mean 'max'?" in text
    assert "Known fields of DelayedScaling: margin, fp8_format" in text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fp8_format": "hybird"}, "'HYBRID' or 'E4M3', got 'hybird'. Did you mean 'HYBRID'?"),
        ({"amax_history_len": 0}, "amax_history_len is at least 1, got 0"),
        ({"amax_history_len": True}, "of type int, got True"),
        ({"margin": 1.5}, "of type int, got 1.5"),
        ({"fp8_dpa": True}, "fp8_dpa=True is not available here; leave it at False"),
        ({"amax_compute_algo": len}, "amax_compute_algo of DelayedScaling is 'max' or 'most_recent'"),
        ({"recipe": "MXFP8BlockScaling", "margin": 3}, "margin=3 is not available here; leave it at 0"),
        ({"recipe": "Float8BlockScaling", "x_block_scaling_dim": 2}, "x_block_scaling_dim and w_block_scaling_dim"),
        ({"recipe": "Float8BlockScaling", "x_block_scaling_dim": 3}, "is 1 or 2, got 3"),
        (DelayedScaling(fp8_format="E5M2"), "got 'E5M2'"),
        (42, "recipe takes a dict"),
        (object(), "one of DelayedScaling, Float8CurrentScaling"),
    ],
)
def test_a_value_that_a_field_does_not_take_says_so(given, message):
    with pytest.raises(ConfigurationError) as caught:
        parse_recipe(given)
    assert message in str(caught.value)


def test_an_unknown_recipe_has_the_nearest_name():
    with pytest.raises(UnknownNameError, match="Did you mean 'MXFP8BlockScaling'"):
        parse_recipe({"recipe": "mxfp8blockscale"})
    with pytest.raises(UnknownNameError, match="Did you mean 'DelayedScaling'"):
        parse_recipe("DelayedScalin")


def test_a_recipe_of_another_library_that_computes_by_a_function_is_refused_not_changed():
    @dataclass
    class DelayedScaling:
        scaling_factor_compute_algo: object

    with pytest.raises(ConfigurationError, match=r"scaling_factor_compute_algo=.* is not available here"):
        parse_recipe(DelayedScaling(scaling_factor_compute_algo=max))
