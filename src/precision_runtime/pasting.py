"""Inputs as source text: what a user pastes into a test."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from precision_runtime.errors import ConfigurationError
from precision_runtime.modes import MODES, Mode, parse_mode
from precision_runtime.options import Options
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
    subject: str, mode: Mode | str, args: tuple[Any, ...], kwargs: Mapping[str, Any], draws: Mapping[str, Draw],
    report: Report, options: Mapping[str, Any], seed: int,
) -> str:  # fmt: skip
    """A test that audits ``subject`` on these inputs; it fails as ``report`` does, until the code is repaired.

    ``draws`` are tensors that a seed draws, by their path in ``(args, kwargs)``. ``options`` are the audit's, those
    that have their default left out. Raises ``ConfigurationError`` for inputs that no source text can make.
    """
    writer = _Writer(args, kwargs, draws)
    lines, call = writer.inputs()
    mode = parse_mode(mode)
    defaults = {"accelerator": "cpu", "gradients": True, "budget": 2.0, "seed": 0, "options": Options()}
    given = {k: v for k, v in {**options, "seed": seed}.items() if v != defaults.get(k)}
    words = [*call[:1], f"mode={writer.mode(mode)}", *call[1:], *(f"{k}={writer(v)}" for k, v in given.items())]
    lines += [f"report = audit({subject}, {', '.join(words)})", "assert report.ok, str(report)"]
    imports = [*writer.imports(), "import torch", "", "from precision_runtime import audit", *writer.our_imports()]
    return _test(imports, "", subject, mode.name, "", [*_told(report), *lines])


def source_of_check(
    subject: str, mode: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], draws: Mapping[str, Draw],
    report: Report, options: Mapping[str, Any], marker: Mapping[str, Any], extra: str = "", note: str = "",
) -> str:  # fmt: skip
    """The same as a test of pytest's plugin, with ``precision_ctx.check``, in the one lane that ``mode`` is.

    ``options`` are the check's, ``marker`` what the marker says beside the mode; ``extra`` is a line of import that
    ``subject`` needs, ``note`` a comment. Raises ``ConfigurationError`` for inputs, or options of the marker, that no
    source text can make.
    """
    writer = _Writer(args, kwargs, draws)
    lines, call = writer.inputs()
    words = [*call, *(f"{k}={v!r}" for k, v in options.items())]
    lines.append(f"precision_ctx.check({subject}, {', '.join(words)})")
    marks = "".join(f", {k}={writer(v)}" for k, v in marker.items())
    ours = writer.our_imports()
    imports = [*writer.imports(), "import pytest", "import torch"]
    imports += ["", *ours] if ours else []
    imports += ["", extra] if extra else []
    decorator = f'@pytest.mark.precision("{mode}"{marks})'
    told = [*_told(report), *([f"# {note}"] if note else [])]
    return _test(imports, decorator, subject, mode, "precision_ctx", [*told, *lines])


def _told(report: Report) -> list[str]:
    return [f"# {finding.title()}" for finding in report.findings[:1]]


def _test(imports: Sequence[str], decorator: str, subject: str, mode: str, arguments: str, lines: Sequence[str]) -> str:
    name = "".join(c if c.isalnum() else "_" for c in f"test_{subject}_holds_in_{mode}").lower()
    head = [decorator] if decorator else []
    return "\n".join([*imports, "", "", *head, f"def {name}({arguments}):", *(f"    {line}" for line in lines), ""])


class _Writer:
    """Writes values as source text; ``draws`` are tensors among the inputs that a seed draws, by their path."""

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], draws: Mapping[str, Draw]) -> None:
        self._args, self._kwargs = args, kwargs
        self._draws = {id(t): draws[path] for path, t in leaves((args, kwargs)) if path in draws}
        self._base64 = False
        self._math: set[str] = set()
        self._ours: set[tuple[str, str]] = set()  # modules of this package, and names from them

    def mode(self, mode: Mode) -> str:
        """Its name, or, where the user chose its dtypes, what makes it."""
        if mode == MODES.get(mode.name):
            return f'"{mode.name}"'
        self._ours.add(("precision_runtime.options", "with_dtypes"))
        self._ours.add(("precision_runtime.modes", "parse_mode"))
        chosen = ("compute_dtype", mode.compute) if mode.family == "quantized" else ("weights_dtype", mode.params)
        return f'with_dtypes(parse_mode("{mode.name}"), {chosen[0]}="{chosen[1]}")'

    def inputs(self) -> tuple[list[str], list[str]]:
        """The lines that make the inputs, and the words that pass them to a call."""
        lines, call = [f"args = {self(self._args)}"], ["*args"]
        if self._kwargs:
            lines.append(f"kwargs = {self(dict(self._kwargs))}")
            call.append("kwargs=kwargs")
        return lines, call

    def imports(self) -> list[str]:
        """What the text needs beside torch, in the order in which tools sort it."""
        lines = ["import base64"] if self._base64 else []
        lines += [f"from math import {', '.join(sorted(self._math))}"] if self._math else []
        return [*lines, ""] if lines else []

    def our_imports(self) -> list[str]:
        """What it needs of this package."""
        return [f"from {module} import {name}" for module, name in sorted(self._ours)]

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
            if type(value).__module__.startswith("precision_runtime."):
                self._ours.add((type(value).__module__, type(value).__name__))
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
