"""What a command is to work on, named as ``package.module:factory``: a callable that makes a model and its inputs.

Imports torch only to call the factory and to make inputs.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from precision_runtime.asked import seed_of
from precision_runtime.errors import ConfigurationError, unknown_names

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Made:
    """What a factory made: ``function`` is a module or another callable, the rest are its inputs."""

    function: Any
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def find_factory(name: str) -> Callable[[], Any]:
    """The callable behind ``package.module:factory`` or ``folder/file.py:factory``; attributes may be nested.

    Modules are looked for from the current folder on, as ``python -m`` does. Raises ``ConfigurationError`` for another
    form, a module or file that does not exist, and for what is not callable, ``UnknownNameError`` for an attribute
    that is not there. What the module's own code raises comes through.
    """
    place, colon, path = name.partition(":")
    if not (place and colon and path):
        raise ConfigurationError(f"{name!r} names no factory: write package.module:factory or file.py:factory")
    found: Any = _module(place)
    for part in path.split("."):
        if not hasattr(found, part):
            raise unknown_names("attribute", [part], _callables(found), name)
        found = getattr(found, part)
    if not callable(found):
        raise ConfigurationError(f"{name} is {_kind(found)} and cannot be called: name a function that makes the model")
    factory: Callable[[], Any] = found
    return factory


def _callables(owner: object) -> list[str]:
    return [n for n, value in vars(owner).items() if callable(value) and not n.startswith("_")]


def _module(place: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            # A module that is missing inside of theirs is not what was named.
            if error.name is None or not (place == error.name or place.startswith(f"{error.name}.")):
                raise
            raise ConfigurationError(f"no module {place!r} can be found from {Path.cwd()}") from error
    path = Path(place)
    if not path.is_file():
        raise ConfigurationError(f"no file {place!r} can be found from {Path.cwd()}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses and pickles look their module up
    spec.loader.exec_module(module)
    return module


def make(name: str, inputs: Sequence[str] = (), seed: int = 0) -> Made:
    """Call the factory: it returns a model, or ``(model, args)`` or ``(model, args, kwargs)``.

    ``inputs`` are made where it returns a model alone (see ``parse_input``), drawn after ``seed``, as the model's first
    values are. Raises ``ConfigurationError`` for anything else, for a model instead of a factory, for a factory that
    needs arguments, and for inputs given twice. What the factory itself raises comes through.
    """
    import torch

    factory = find_factory(name)
    if isinstance(factory, torch.nn.Module):
        raise ConfigurationError(
            f"{name} is a model that is made already ({_kind(factory)}); name what makes it, a function or class, so "
            "that its first values are drawn after the seed"
        )
    _check_call(name, factory)
    torch.manual_seed(seed_of(seed))
    made = _made(name, factory())
    if inputs and (made.args or made.kwargs):
        raise ConfigurationError(f"{name} makes its inputs itself; leave --input out")
    if not inputs:
        return made
    args: list[torch.Tensor] = []
    kwargs: dict[str, torch.Tensor] = {}
    for text in inputs:
        key, tensor = parse_input(text)
        if key:
            kwargs[key] = tensor
        else:
            args.append(tensor)
    return Made(made.function, tuple(args), kwargs)


def _check_call(name: str, factory: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(factory)
    except ValueError:  # of some builtins nobody knows
        return
    try:
        signature.bind()
    except TypeError as error:
        raise ConfigurationError(
            f"{name} cannot be called without arguments ({error}); name a function that takes none and makes the model"
        ) from None


def _made(name: str, value: Any) -> Made:
    several = value if isinstance(value, tuple) and value else (value,)
    function, args, kwargs = (*several, *((), {})[len(several) - 1 :])[:3]
    if len(several) == 2 and isinstance(args, Mapping):
        args, kwargs = (), args
    if (
        not callable(function)
        or len(several) > 3
        or not isinstance(args, (tuple, list))
        or not isinstance(kwargs, Mapping)
    ):
        shown = ", ".join(map(_kind, several))
        raise ConfigurationError(
            f"{name} is to return a model, (model, args) or (model, args, kwargs), where args is a tuple and kwargs a "
            f"dict; it returned {shown}"
        )
    return Made(function, tuple(args), dict(kwargs))


_INPUT = re.compile(r"(?:([A-Za-z_]\w*)=)?(\d+(?:[x,]\d+)*|scalar)(?::([a-z]\w*))?(?:<(\d+))?")


def parse_input(text: str) -> tuple[str, torch.Tensor]:
    """The name ("" for a positional one) and the tensor behind ``[NAME=]SHAPE[:DTYPE][<HIGH]``.

    ``2x16x64`` is normal float32 values, ``ids=2x16:int64<1000`` whole numbers from 0 to 999. Raises
    ``ConfigurationError`` for another form and for whole numbers without a limit, ``UnknownNameError`` for a dtype that
    does not exist.
    """
    import torch

    match = _INPUT.fullmatch(text.replace(" ", ""))
    if match is None:
        raise ConfigurationError(
            f"--input {text!r} is no shape: write 2x16x64, mask=2x16:bool or ids=2x16:int64<1000 (whole numbers below)"
        )
    key, shape, dtype_name, high = match.group(1) or "", match.group(2), match.group(3) or "float32", match.group(4)
    sizes = [] if shape == "scalar" else [int(n) for n in re.split("[x,]", shape)]
    dtype = getattr(torch, dtype_name, None)
    if not isinstance(dtype, torch.dtype):
        raise unknown_names("dtype", [dtype_name], _DTYPES, f"--input {text}")
    if dtype is torch.bool:
        return key, torch.randint(2, sizes).bool()
    if dtype.is_floating_point or dtype.is_complex:
        return key, torch.randn(sizes, dtype=dtype)
    if high is None or int(high) < 1:
        raise ConfigurationError(f"--input {text!r}: whole numbers need a limit, as in {text.partition('<')[0]}<1000")
    return key, torch.randint(int(high), sizes, dtype=dtype)


_DTYPES = ("float32", "float64", "float16", "bfloat16", "complex64", "complex128", "int64", "int32", "uint8", "bool")


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__
