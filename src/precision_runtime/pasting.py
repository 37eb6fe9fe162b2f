"""Inputs as source text: what a user pastes into a test."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from precision_runtime.errors import ConfigurationError
from precision_runtime.record import Report
from precision_runtime.tree import leaves

# With more elements than this, a tensor is written as the bytes that it is made of.
LITERAL = 256


@dataclass(frozen=True)
class Draw:
    """A tensor that a seed draws: normal values, in FP64 on the CPU, then cast."""

    seed: int
    mean: float
    deviation: float
    shape: tuple[int, ...]
    dtype: torch.dtype

    def tensor(self) -> torch.Tensor:
        """Draw it; torch's generators stay as they are."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randn(self.shape, generator=generator, dtype=torch.float64, device="cpu")
        return (drawn * self.deviation + self.mean).to(self.dtype)

    def source(self) -> str:
        """The same as source text."""
        generator = f"torch.Generator().manual_seed({self.seed})"
        drawn = f"torch.randn({self.shape}, generator={generator}, dtype=torch.float64)"
        return f"({drawn} * {self.deviation!r} + {self.mean!r}).to({self.dtype})"


def source_of_test(
    subject: str, mode: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], draws: Mapping[str, Draw],
    report: Report, options: Mapping[str, Any], seed: int,
) -> str:  # fmt: skip
    """A test that audits ``subject`` on these inputs; it fails as ``report`` does, until the code is repaired.

    ``draws`` are tensors that a seed draws, by their path in ``(args, kwargs)``. ``options`` are the audit's, those
    that have their default left out. Raises ``ConfigurationError`` for inputs that no source text can make.
    """
    drawn = {id(t): draws[path] for path, t in leaves((args, kwargs)) if path in draws}
    writer = _Writer(drawn)
    lines = [f"args = {writer(args)}"]
    call = [f'*args, mode="{mode}"']
    if kwargs:
        lines.append(f"kwargs = {{{', '.join(f'{k!r}: {writer(v)}' for k, v in kwargs.items())}}}")
        call.append("kwargs=kwargs")
    defaults = {"accelerator": "cpu", "gradients": True, "budget": 2.0, "seed": 0}
    given = {**options, "seed": seed}
    call += [f"{k}={v!r}" for k, v in given.items() if v != defaults.get(k)]
    lines += [f"report = audit({subject}, {', '.join(call)})", "assert report.ok, str(report)"]
    told = [f"# {f.title()}" for f in report.findings[:1]]
    name = "".join(c if c.isalnum() else "_" for c in f"test_{subject}_holds_in_{mode}").lower()
    imports = [*writer.imports(), "import torch", "", "from precision_runtime import audit"]
    body = "\n".join(f"    {line}" for line in [*told, *lines])
    return "\n".join([*imports, "", "", f"def {name}():", body, ""])


class _Writer:
    def __init__(self, draws: Mapping[int, Draw]) -> None:
        self._draws = draws
        self._base64 = False
        self._math: set[str] = set()

    def imports(self) -> list[str]:
        """What the text needs beside torch, in the order in which tools sort it."""
        lines = ["import base64"] if self._base64 else []
        lines += [f"from math import {', '.join(sorted(self._math))}"] if self._math else []
        return [*lines, ""] if lines else []

    def __call__(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return self._draws[id(value)].source() if id(value) in self._draws else self._tensor(value)
        if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
            inner = ", ".join(self(v) for v in value)
            return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
        if type(value) is dict:
            return f"{{{', '.join(f'{k!r}: {self(v)}' for k, v in value.items())}}}"
        if value is None or isinstance(value, (bool, int, str, bytes, complex, torch.dtype)):
            return repr(value)
        if isinstance(value, float):
            return self._number(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = ", ".join(f"{f.name}={self(getattr(value, f.name))}" for f in dataclasses.fields(value) if f.init)
            return f"{type(value).__name__}({fields})"
        raise ConfigurationError(
            f"a test cannot be written for an input of type {type(value).__name__}: pass tensors, numbers, strings, "
            "lists, tuples, dicts and dataclasses to the function, and make the rest inside it"
        )

    def _tensor(self, t: torch.Tensor) -> str:
        t = t.detach().resolve_conj().resolve_neg().cpu()
        if t.layout is not torch.strided or t.is_nested:
            raise ConfigurationError(f"a test cannot be written for a tensor of layout {t.layout}: pass a strided one")
        text = self._values(t)
        # A clone, which is what the audit makes, keeps strides only where every element has a place of its own.
        if t.clone().stride() != t.contiguous().stride():
            return f"torch.empty_strided({tuple(t.shape)}, {t.stride()}, dtype={t.dtype}).copy_({text})"
        return text

    def _values(self, t: torch.Tensor) -> str:
        if t.numel() == 0:
            return f"torch.empty({tuple(t.shape)}, dtype={t.dtype})"
        flat = t.reshape(-1)
        if t.numel() > 1 and bool((flat == flat[0]).all()):
            return f"torch.full({tuple(t.shape)}, {self._nested(flat[0])}, dtype={t.dtype})"
        if t.numel() <= LITERAL:
            return f"torch.tensor({self._nested(t)}, dtype={t.dtype})"
        self._base64 = True
        raw = (flat.view(torch.int16) if t.dtype is torch.bfloat16 else flat).numpy().tobytes()
        text = base64.b64encode(raw).decode()
        return f'torch.frombuffer(bytearray(base64.b64decode("{text}")), dtype={t.dtype}).reshape({tuple(t.shape)})'

    def _nested(self, t: torch.Tensor) -> str:
        if t.dim():
            return f"[{', '.join(self._nested(row) for row in t)}]"
        value = t.item()
        if isinstance(value, float):
            # The shortest decimal that comes back as the same number of the tensor's own dtype, or of float32.
            single = t.dtype is not torch.float64
            return self._number(float(str(np.float32(value))) if single else value)
        return repr(value) if not isinstance(value, complex) else f"complex({value.real!r}, {value.imag!r})"

    def _number(self, value: float) -> str:
        text = repr(value)
        if text.lstrip("-") in ("inf", "nan"):
            self._math.add(text.lstrip("-"))
        return text
