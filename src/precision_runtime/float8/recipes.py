"""FP8 recipes as values: how tensors are scaled before they are rounded to 8 or 4 bits. Imports no torch.

Names, fields and defaults are those that NVIDIA publishes for its transformer_engine (``common.recipe``), so that a
recipe means the same wherever the mode runs; switches that only choose a GPU kernel are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from precision_runtime.errors import ConfigurationError, UnknownNameError, did_you_mean

E4M3, E5M2, E2M1 = "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"


@dataclass(frozen=True)
class Recipe:
    """Base of the recipes.

    ``aligned``: what the features of a layer, and the rows of its input, have to be multiples of for NVIDIA's kernels.
    """

    aligned: ClassVar[int] = 16
    allowed: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType({})  # values of fields with a fixed choice

    @property
    def formats(self) -> tuple[str, str]:
        """The formats of the forward pass and of gradients, by their names in ``formats.FORMATS``."""
        return E4M3, (E5M2 if getattr(self, "fp8_format", "E4M3") == "HYBRID" else E4M3)

    def problems(self) -> list[str]:
        """What contradicts itself in fields that are allowed one by one."""
        return []

    def to_dict(self) -> dict[str, Any]:
        """The recipe as builtins, with its name under ``recipe``: what ``parse_recipe`` takes."""
        return {"recipe": type(self).__name__, **dataclasses.asdict(self)}


_FP8 = ("HYBRID", "E4M3")


@dataclass(frozen=True)
class DelayedScaling(Recipe):
    """One scale per tensor, taken from the largest magnitudes of the steps before: no second look at the tensor.

    scale = (largest FP8 value / amax) / 2^``margin``; ``amax`` is the largest of the last ``amax_history_len`` steps
    ("max") or the last one ("most_recent"). ``reduce_amax``: processes of a group agree on it. There is no history in
    the first step: its scale is 1, so that small weights and gradients lose bits or vanish, as with NVIDIA's library.
    """

    margin: int = 0
    fp8_format: str = "HYBRID"
    amax_history_len: int = 1024
    amax_compute_algo: str = "max"
    reduce_amax: bool = True

    allowed: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
        {"fp8_format": _FP8, "amax_compute_algo": ("max", "most_recent")}
    )

    def problems(self) -> list[str]:
        """See ``Recipe.problems``."""
        return [] if self.amax_history_len >= 1 else [f"amax_history_len is at least 1, got {self.amax_history_len}"]


@dataclass(frozen=True)
class Float8CurrentScaling(Recipe):
    """One scale per tensor, from its own largest magnitude."""

    use_power_2_scales: bool = False
    fp8_format: str = "HYBRID"

    allowed: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType({"fp8_format": _FP8})


@dataclass(frozen=True)
class Float8BlockScaling(Recipe):
    """One scale per 128 values along a product's sum (dimension 1), or per tile of 128 by 128 (dimension 2).

    Scales are powers of two unless ``use_f32_scales``. At most one operand of a product can have tiles.
    """

    use_f32_scales: bool = False
    fp8_format: str = "E4M3"
    x_block_scaling_dim: int = 1
    w_block_scaling_dim: int = 2
    grad_block_scaling_dim: int = 1

    aligned: ClassVar[int] = 128
    allowed: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
        {
            "fp8_format": _FP8,
            "x_block_scaling_dim": (1, 2),
            "w_block_scaling_dim": (1, 2),
            "grad_block_scaling_dim": (1, 2),
        }
    )

    def problems(self) -> list[str]:
        """See ``Recipe.problems``."""
        tiled = [name for name in ("x", "w", "grad") if getattr(self, f"{name}_block_scaling_dim") == 2]
        if len(tiled) < 2:
            return []
        names = " and ".join(f"{name}_block_scaling_dim" for name in tiled)
        return [f"{names} are both 2, but no product has tiles in both operands"]


@dataclass(frozen=True)
class MXFP8BlockScaling(Recipe):
    """One power of two (E8M0) per 32 values along a product's sum: the Microscaling format.

    ``enable_2d_quantization``: one per tile of 32 by 32 in weights.
    """

    fp8_format: str = "E4M3"
    enable_2d_quantization: bool = False

    aligned: ClassVar[int] = 32
    allowed: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType({"fp8_format": _FP8})


@dataclass(frozen=True)
class NVFP4BlockScaling(Recipe):
    """4-bit values (E2M1); one E4M3 scale per 16 values, or per tile of 16 by 16 in weights, and one for the tensor.

    Gradients are rounded up or down by chance (stochastic rounding), and the operands of the weights' gradient are
    rotated by a Hadamard matrix with signs; each can be disabled.
    """

    disable_rht: bool = False
    disable_stochastic_rounding: bool = False
    disable_2d_quantization: bool = False

    aligned: ClassVar[int] = 32

    @property
    def formats(self) -> tuple[str, str]:
        """See ``Recipe.formats``."""
        return E2M1, E2M1


RECIPES: Mapping[str, type[Recipe]] = MappingProxyType(
    {
        kind.__name__: kind
        for kind in (DelayedScaling, Float8CurrentScaling, Float8BlockScaling, MXFP8BlockScaling, NVFP4BlockScaling)
    }
)

# Fields of NVIDIA's objects that only choose a kernel, or are worked out from others. Whatever else such an object has
# must hold the value that means "off": silently leaving it away would run another recipe than was asked for.
_IRRELEVANT = frozenset(
    {
        "fp8_gemm_fprop", "fp8_gemm_dgrad", "fp8_gemm_wgrad", "fp8_quant_fwd_inp", "fp8_quant_fwd_weight",
        "fp8_quant_bwd_grad", "fp4_quant_fwd_inp", "fp4_quant_fwd_weight", "fp4_quant_bwd_grad",
        "nvfp4_4over6_e4m3_use_256", "nvfp4_4over6_err_mode",
    }
)  # fmt: skip
_OFF: Mapping[str, Any] = MappingProxyType(
    {
        "scaling_factor_compute_algo": None, "fp8_dpa": False, "fp8_mha": False, "backward_override": None,
        "row_scaled_activation": False, "nvfp4_4over6": "none", "fp4_format": "E2M1", "margin": 0,
    }
)  # fmt: skip


def parse_recipe(given: object = None, where: str = "recipe") -> Recipe:
    """The recipe that a user means: one of ours, one of NVIDIA's, a class or its name, a dict of its fields, or None.

    A dict names its class under ``recipe``; without it, it is a ``DelayedScaling``, as None is. Raises
    ``UnknownNameError`` for a name or field that does not exist, ``ConfigurationError`` for a value that the field does
    not take; each lists everything that is wrong, with the nearest right name.
    """
    if given is None:
        return DelayedScaling()
    if isinstance(given, Recipe):
        return _checked(given, where)
    if isinstance(given, type):
        given = given.__name__
    if isinstance(given, str):
        return _class(given, where)()
    if isinstance(given, Mapping):
        fields = dict(given)
        kind = _class(fields.pop("recipe", "DelayedScaling"), where)
        return _made(kind, fields, where)
    name = type(given).__name__
    if name not in RECIPES:
        raise ConfigurationError(
            f"{where} takes a dict such as {{'fp8_format': 'HYBRID'}}, or one of {', '.join(RECIPES)}; got {given!r}"
        )
    return _made(RECIPES[name], _foreign(given, RECIPES[name]), where)


def _class(name: object, where: str) -> type[Recipe]:
    if isinstance(name, str) and name in RECIPES:
        return RECIPES[name]
    raise UnknownNameError(f"{where} {name!r} is unknown.{_hint(name, RECIPES)}\nKnown recipes: {', '.join(RECIPES)}")


def _made(kind: type[Recipe], fields: Mapping[object, object], where: str) -> Recipe:
    known = [f.name for f in dataclasses.fields(kind)]
    values, unknown, wrong = {}, [], []
    for name, value in fields.items():
        plain = _plain(value)
        if name in known:
            values[str(name)] = plain
        elif name in _IRRELEVANT and isinstance(name, str):
            continue
        elif name in _OFF and isinstance(name, str):
            if plain != _OFF[name]:
                wrong.append(f"{name}={value!r} is not available here; leave it at {_OFF[name]!r}")
        else:
            unknown.append(f"{where} has a field {name!r}, which {kind.__name__} does not know.{_hint(name, known)}")
    wrong += _wrong(kind, values)
    if unknown:
        lines = [*unknown, *(f"{where}: {w}" for w in wrong)]
        raise UnknownNameError("\n".join([*lines, f"Known fields of {kind.__name__}: {', '.join(known)}"]))
    if wrong:
        raise ConfigurationError("\n".join(f"{where}: {w}" for w in wrong))
    return _checked(kind(**values), where)


def _checked(recipe: Recipe, where: str) -> Recipe:
    values = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)}
    wrong = _wrong(type(recipe), values) or recipe.problems()
    if wrong:
        raise ConfigurationError("\n".join(f"{where}: {w}" for w in wrong))
    return recipe


def _wrong(kind: type[Recipe], values: Mapping[str, Any]) -> list[str]:
    """One sentence for each value that its field does not take."""
    defaults = {f.name: f.default for f in dataclasses.fields(kind)}
    found = []
    for name, value in values.items():
        expected = type(defaults[name])
        if name in kind.allowed:
            if value not in kind.allowed[name] or type(value) is not expected:
                choices = " or ".join(map(repr, kind.allowed[name]))
                hint = _hint(value, kind.allowed[name])
                found.append(f"{name} of {kind.__name__} is {choices}, got {value!r}.{hint}")
        elif type(value) is not expected:
            found.append(f"{name} of {kind.__name__} is of type {expected.__name__}, got {value!r}")
    return found


def _hint(name: object, known: Iterable[object]) -> str:
    """``did_you_mean`` where capital letters carry no meaning."""
    if not isinstance(name, str):
        return ""
    spelled = {k.lower(): k for k in known if isinstance(k, str)}
    hint = did_you_mean(name, spelled)
    return next((hint.replace(repr(low), repr(right)) for low, right in spelled.items() if repr(low) in hint), hint)


def _plain(value: object) -> object:
    """An enum member (NVIDIA's ``Format.HYBRID``) by its name."""
    name = getattr(value, "name", None)
    return name if isinstance(name, str) and not callable(value) else value


def _foreign(given: object, kind: type[Recipe]) -> dict[object, object]:
    """The fields of one of NVIDIA's recipe objects, told by its class's name. Formats that are fixed are checked."""
    names = [f.name for f in dataclasses.fields(given)] if dataclasses.is_dataclass(given) else list(vars(given))
    fields: dict[object, object] = {name: getattr(given, name) for name in names if not name.startswith("_")}
    known = {f.name for f in dataclasses.fields(kind)}
    if "fp8_format" not in known and _plain(fields.get("fp8_format", "E4M3")) == "E4M3":
        fields.pop("fp8_format", None)  # NVFP4's scales, which are E4M3 always
    return fields
