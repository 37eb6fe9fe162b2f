"""What a user asks of a mode beside its name: parsed once, checked against the mode. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from precision_runtime.environment import chosen_mode
from precision_runtime.errors import ConfigurationError, unknown_names
from precision_runtime.float8.recipes import Recipe, parse_recipe
from precision_runtime.modes import MODES, Mode, parse_mode


@dataclass(frozen=True)
class Options:
    """What strategies read beside the mode and the device.

    ``ignore_modules``: exact names or globs of modules that are not swapped. ``recipe``: the FP8 recipe, as the float8
    strategy parsed it; None is the library's default. ``islands``: exact names or globs of parts that are kept wide,
    each with the dtype's name; ``auto_islands``: tables are kept wide, too, where a cast would harm them.
    ``quantize_embeddings``: quantised modes swap nn.Embedding, too.
    """

    ignore_modules: tuple[str, ...] = ()
    recipe: Any = None
    islands: tuple[tuple[str, str], ...] = ()
    auto_islands: bool = False
    quantize_embeddings: bool = False


def names_of(value: str | Iterable[str], where: str) -> tuple[str, ...]:
    """One name or several, as a sorted tuple. Raises ``ConfigurationError`` for anything but strings."""
    names = (value,) if isinstance(value, str) else tuple(value)
    wrong = [n for n in names if not isinstance(n, str) or not n]
    if wrong:
        raise ConfigurationError(
            f"{where} takes names or globs of modules, such as 'lm_head' or 'blocks.*.norm'; got {wrong}"
        )
    return tuple(sorted(set(names)))


def islands_of(value: object) -> tuple[tuple[tuple[str, str], ...], bool]:
    """``islands`` as the user gave it, parsed: pairs of pattern and dtype name, sorted, and whether "auto" was asked.

    A mapping from names or globs to "32" or "64" (or that dtype), or names alone, which means "32"; "auto" alone or
    among names. Raises ``ConfigurationError`` for anything else.
    """
    if not isinstance(value, Mapping):
        given: Any = value if isinstance(value, (str, Iterable)) else (value,)
        names = names_of(given, "islands")
        return tuple((name, "float32") for name in names if name != "auto"), "auto" in names
    names = names_of(value, "islands")
    wrong = {name: value[name] for name in names if _island_dtype(value[name]) not in ISLAND_DTYPES.values()}
    if wrong:
        shown = ", ".join(f"{name!r}: {width!r}" for name, width in wrong.items())
        raise ConfigurationError(
            f"an island is kept in '32' or '64', as in islands={{'blocks.3.norm': '32'}}; got {{{shown}}}"
        )
    return tuple((name, _island_dtype(value[name])) for name in names), False


ISLAND_DTYPES = MappingProxyType({"32": "float32", "64": "float64"})


def _island_dtype(value: object) -> str:
    text = str(value).removeprefix("torch.").removesuffix("-true")
    return ISLAND_DTYPES.get(text, text)


def with_dtypes(mode: Mode, compute_dtype: object = None, weights_dtype: object = None) -> Mode:
    """``mode`` with the dtype that the user chose for it: ``compute_dtype`` for bitsandbytes layers, ``weights_dtype``
    for transformer-engine.

    Dtypes are torch dtypes or their names. Raises ``ConfigurationError`` where the mode takes no such choice, and
    ``UnknownNameError`` for what is no dtype that it can compute in.
    """
    for given, name, family in (
        (compute_dtype, "compute_dtype", "quantized"),
        (weights_dtype, "weights_dtype", "float8"),
    ):
        if given is None:
            continue
        if mode.family != family:
            takes = ", ".join(m.name for m in MODES.values() if m.family == family)
            raise ConfigurationError(f"{mode} takes no {name}; these modes do: {takes}")
        text = str(given).removeprefix("torch.")
        if text not in _DTYPES:
            raise unknown_names("dtype", [text], list(_DTYPES), f"{name} of {mode}")
        mode = replace(mode, params=text, compute=text)
    return mode


def recipe_of(mode: Mode, recipe: object) -> Recipe | None:
    """The FP8 recipe that ``recipe`` means in an FP8 mode, None in others.

    Raises ``ConfigurationError`` where a mode takes none, and as ``parse_recipe`` does.
    """
    if mode.family == "float8":
        return parse_recipe(recipe)
    if recipe is not None:
        takes = ", ".join(m.name for m in MODES.values() if m.family == "float8")
        raise ConfigurationError(f"{mode} takes no recipe; these modes do: {takes}")
    return None


_DTYPES = ("float16", "bfloat16", "float32")


def mode_of(mode: object, amp_backend: object = None, amp_level: object = None) -> Mode:
    """The mode that the arguments of ``PrecisionRuntime`` name; ``amp_backend`` and ``amp_level`` as the old Trainer
    took them: ``amp_backend="apex", amp_level="O2"`` is the mode apex-O2. Without a mode it is the environment's, or
    32-true.

    Raises ``ConfigurationError`` where they contradict each other or the environment (``environment``).
    """
    return chosen_mode(_named(mode, amp_backend, amp_level))


def _named(mode: object, amp_backend: object, amp_level: object) -> Mode | None:
    if amp_backend is None and amp_level is None:
        return None if mode is None else parse_mode(mode)
    if amp_backend not in ("apex", "native", None):
        raise unknown_names("amp_backend", [amp_backend], ["apex", "native"])
    if amp_backend == "native" or (amp_backend is None and amp_level is not None):
        if amp_level is not None:
            raise ConfigurationError(f"amp_level={amp_level!r} belongs to amp_backend='apex'")
        return parse_mode("16-mixed" if mode is None else mode)
    level = "O2" if amp_level is None else str(amp_level).strip()  # the old Trainer's default
    if level not in _LEVELS:
        hint = " (the prefix is the letter O, not the digit zero)" if level.startswith("0") else ""
        raise unknown_names("amp_level" + hint, [level], list(_LEVELS), plural="amp_levels")
    found = MODES[f"apex-{level}"]
    # With apex, precision=16 was what switched it on.
    if mode is not None and parse_mode(mode).name not in (found.name, "16-mixed"):
        raise ConfigurationError(f"mode {mode!r} contradicts amp_backend='apex', amp_level={level!r}")
    return found


_LEVELS = ("O0", "O1", "O2", "O3")
