"""Models made directly in 64-true: computed in float64 from the first operation on, drawn as in every other mode.

Cast afterwards, a table would keep float32's roundings, and complex tensors that are no parameters or buffers would
stay complex64. So the default dtype is float64 meanwhile, for the whole process. But torch draws other numbers in
float64 than in float32, and with one seed a model would have other weights in 64-true than in the modes that it is to
be compared with: what is drawn into float64 is drawn in the caller's own default dtype, and widened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch._ops import HigherOrderOperator

from precision_runtime.dispatching import OwnMode, opened
from precision_runtime.setup.building import Building


class DoubleBuilding(Building):
    """See ``Building``."""

    def __enter__(self) -> None:
        super().__enter__()
        self._default = torch.get_default_dtype()
        self._draws = Draws(self._default)
        self._draws.__enter__()
        torch.set_default_dtype(torch.float64)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.set_default_dtype(self._default)
        self._draws.__exit__(kind, error, trace)
        super().__exit__(kind, error, trace)


class Draws(OwnMode):
    """Inside, random numbers for float64 tensors are those that ``dtype`` would get: same seed, same numbers.

    A factory that names float64 itself (``torch.randn(3, dtype=torch.float64)``) draws in float64 in every mode.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return opened(self, func, args, kwargs)
        name = func._schema.name
        if name in _FILLING and args[0].dtype is torch.float64:
            drawn = torch.empty_like(args[0], dtype=self.dtype)
            return args[0].copy_(func(drawn, *args[1:], **kwargs))
        if name in _MAKING and kwargs.get("dtype") is None:
            tensors = [a for a in args if isinstance(a, torch.Tensor)]
            if all(t.dtype is torch.float64 for t in tensors):
                narrow = [a.to(self.dtype) if isinstance(a, torch.Tensor) else a for a in args]
                own = {} if tensors and name not in _LIKE else {"dtype": self.dtype}
                return func(*narrow, **{**kwargs, **own}).to(torch.float64)
        return func(*args, **kwargs)


_FILLING = frozenset(
    f"aten::{name}"
    for name in ("bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "normal_", "random_", "uniform_")
)
_LIKE = frozenset(("aten::rand_like", "aten::randn_like"))
_MAKING = _LIKE | {"aten::bernoulli", "aten::normal", "aten::poisson", "aten::rand", "aten::randn"}
