"""What a marker asks of the runtime beside the mode: ``runtime={...}``, checked at collection. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from precision_runtime.errors import PrecisionError, did_you_mean
from precision_runtime.modes import ALIASES, AUTO, GROUPS, MODES
from precision_runtime.options import islands_of, names_of, recipe_of, with_dtypes
from pytest_precision.lanes import mode_names
from pytest_precision.problems import Problems

# What PrecisionRuntime takes, without what the lane decides: the mode, its old names, and the accelerator.
KEYS = ("ignore_modules", "compute_dtype", "quantize_embeddings", "weights_dtype", "recipe", "updates", "islands",
        "inputs", "scaler")  # fmt: skip


@dataclass(frozen=True)
class Choices:
    """Arguments of ``PrecisionRuntime``: those for every mode, and those for some."""

    common: tuple[tuple[str, Any], ...] = ()
    special: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = ()  # by mode

    def of(self, mode: str) -> dict[str, Any]:
        """The arguments for the mode."""
        return {**dict(self.common), **dict(dict(self.special).get(mode, ()))}


def parse_choices(given: object, modes: Iterable[str], where: str, problems: Problems) -> Choices:
    """Parse ``{"islands": "auto", "nf4": {"compute_dtype": "float16"}}``: arguments, and modes or groups with theirs.

    What is wrong goes to ``problems``: unknown keys, and values that ``modes`` (those that the marker names) do not
    take. An exact mode counts before a group, a group before what is said for all.
    """
    if given is None:
        return Choices()
    if not isinstance(given, Mapping):
        problems.add(f"{where} is {given!r}; it is a dict of what PrecisionRuntime takes: {', '.join(KEYS)}")
        return Choices()
    common: dict[str, Any] = {}
    asked: list[tuple[tuple[str, ...], dict[str, Any]]] = []
    for key, value in given.items():
        if key in KEYS:
            common[key] = value
        elif isinstance(value, Mapping) and _is_mode(key):
            named = mode_names([key], where, problems)
            asked.append((named, _known(value, f"{where}, {key!r}", problems)))
        else:
            _unknown(key, where, problems)
    special: dict[str, dict[str, Any]] = {}
    for named, arguments in sorted(asked, key=lambda pair: -len(pair[0])):
        for mode in named:
            special.setdefault(mode, {}).update(arguments)
    choices = Choices(tuple(common.items()), tuple((mode, tuple(own.items())) for mode, own in special.items()))
    _try(choices, list(modes), where, problems)
    return choices


def _is_mode(key: object) -> bool:
    known = {*MODES, *ALIASES, *GROUPS, AUTO.name}
    return str(key).strip().lower() in {name.lower() for name in known}


def _known(arguments: Mapping[Any, Any], where: str, problems: Problems) -> dict[str, Any]:
    for key in arguments:
        if key not in KEYS:
            _unknown(key, where, problems)
    return {key: value for key, value in arguments.items() if key in KEYS}


def _unknown(key: object, where: str, problems: Problems) -> None:
    near = did_you_mean(str(key), [*KEYS, *MODES, *GROUPS])
    problems.add(f"{where} has no {key!r}.{near} It takes {', '.join(KEYS)}, and modes or groups with a dict of these")


def _try(choices: Choices, modes: list[str], where: str, problems: Problems) -> None:
    """Try what can be tried without torch, in each mode once; the rest is tried when the lane is set up."""
    told: set[str] = set()
    for mode in modes or [""]:
        for text in _complaints(mode, choices.of(mode)):
            if text not in told:
                told.add(text)
                problems.add(f"{where}: {text}")


def _complaints(mode: str, arguments: Mapping[str, Any]) -> Iterable[str]:
    tries: list[Callable[[], object]] = [
        lambda: names_of(arguments.get("ignore_modules", ()), "ignore_modules"),
        lambda: islands_of(arguments.get("islands", ())),
    ]
    if mode in MODES:
        parsed = MODES[mode]
        tries += [
            lambda: with_dtypes(parsed, arguments.get("compute_dtype"), arguments.get("weights_dtype")),
            lambda: recipe_of(parsed, arguments.get("recipe")),
        ]
    for attempt in tries:
        try:
            attempt()
        except (PrecisionError, TypeError) as error:
            yield str(error)
