"""The same random draws in every precision: each draw is made once in FP64, in row-major order, and then cast.

torch draws differently for different dtypes, memory formats and kernels, so a seed alone does not make a dropout mask
in fp16 equal to the one in FP64.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from precision_runtime.auditing.executing.generators import own

aten = torch.ops.aten

Draw = Callable[[Any, Sequence[Any], Mapping[str, Any]], Any]


def _in_place(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    target = args[0]
    if not target.is_floating_point():
        return func(*args, **kwargs)
    drawn = torch.empty(target.shape, dtype=torch.float64, device=target.device)
    func(drawn, *(_wide(a) for a in args[1:]), **kwargs)
    return target.copy_(drawn)


def _like(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """rand_like, randn_like: the source gives the shape, ``dtype`` or the source the result's dtype."""
    like = args[0]
    dtype = kwargs.get("dtype") or like.dtype
    options = {k: v for k, v in kwargs.items() if k not in ("dtype", "memory_format", "layout", "pin_memory")}
    base = torch.empty(like.shape, dtype=torch.float64, device=like.device)
    return func(base, *args[1:], **{**options, "dtype": torch.float64}).to(dtype)


def _factory(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """rand, randn, normal with a size."""
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    if dtype.is_complex:
        return func(*args, **{**kwargs, "dtype": torch.complex128}).to(dtype)
    return func(*args, **{**kwargs, "dtype": torch.float64}).to(dtype)


def _of_values(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """bernoulli(p), multinomial(p), normal(mean, std): computed on FP64 copies of the tensors."""
    dtype = next(a.dtype for a in args if isinstance(a, torch.Tensor))
    drawn = func(*(_wide(a) for a in args), **kwargs)
    return drawn.to(dtype) if drawn.is_floating_point() else drawn


def _dropout(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x, p = args[0], args[1]
    train = args[2] if len(args) > 2 else True
    if not train or p == 0:
        return func(*args, **kwargs)
    mask = torch.rand(x.shape, dtype=torch.float64, device=x.device) >= p
    return x * mask * (0.0 if p == 1 else 1.0 / (1.0 - p)), mask


_DRAWS: dict[str, Draw] = {
    "aten::bernoulli": _of_values,
    "aten::bernoulli_": _in_place,
    "aten::cauchy_": _in_place,
    "aten::exponential_": _in_place,
    "aten::geometric_": _in_place,
    "aten::log_normal_": _in_place,
    "aten::multinomial": _of_values,
    "aten::native_dropout": _dropout,
    "aten::normal_": _in_place,
    "aten::rand": _factory,
    "aten::rand_like": _like,
    "aten::randn": _factory,
    "aten::randn_like": _like,
    "aten::uniform_": _in_place,
}


def draw_of(func: Any) -> Draw | None:
    """The canonical draw for an op, or None when the op is not random in a way that depends on the dtype."""
    schema = func._schema
    if any(argument.is_out for argument in schema.arguments):
        return None
    if schema.name == "aten::normal":
        return _of_values if "Tensor" in str(func._overloadname) else _factory
    return _DRAWS.get(schema.name)


@dataclass(frozen=True)
class RandomState:
    """torch's, Python's and (where loaded) numpy's generators at one moment, and the audited code's own."""

    torch_cpu: torch.Tensor
    torch_cuda: torch.Tensor | None
    python: Any
    numpy: Any
    own: list[Any]  # of the code's own generators

    @classmethod
    def capture(cls) -> RandomState:
        """The state now: torch's generator of the CPU and of the present CUDA device, Python's and numpy's."""
        np = sys.modules.get("numpy")
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        numpy = np.random.get_state() if np is not None else None
        generators = own()
        states = generators.states() if generators is not None else []
        return cls(torch.get_rng_state(), cuda, random.getstate(), numpy, states)

    def restore(self) -> None:
        """Put every generator back."""
        torch.set_rng_state(self.torch_cpu)
        if self.torch_cuda is not None:
            torch.cuda.set_rng_state(self.torch_cuda)
        random.setstate(self.python)
        np = sys.modules.get("numpy")
        if np is not None and self.numpy is not None:
            np.random.set_state(self.numpy)
        generators = own()
        if generators is not None and self.own:
            generators.put(self.own)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Run with every generator seeded, and leave them all as they were."""
    devices = [device.index or 0] if device.type == "cuda" else []
    before = RandomState.capture()
    with torch.random.fork_rng(devices=devices):
        reseed(seed)
        try:
            yield
        finally:
            before.restore()


def reseed(seed: int) -> None:
    """Seed torch, Python and (where loaded) numpy; generators of the audited code's own start as they started."""
    torch.manual_seed(seed)
    random.seed(seed)
    np = sys.modules.get("numpy")
    if np is not None:
        np.random.seed(seed % 2**32)
    generators = own()
    if generators is not None:
        generators.rewind()


def _wide(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.to(torch.float64).contiguous()
    return value
