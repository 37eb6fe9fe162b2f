"""Buffers that a cast to half would spoil: frequencies, positions and other tables computed by a formula.

One rounding of a value is what a half mode costs everywhere. A table of frequencies costs more: it is multiplied by a
position, so that position 4,000 turns a rounding of 2^-9 into an angle that is wrong by radians. What a table is used
for cannot be seen, but what it holds can be: values by formula obey a simple law, others do not.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from precision_runtime.casting import FLOATING
from precision_runtime.errors import ConfigurationError
from precision_runtime.setup.keeping import Island

# n values in any order happen to be ascending or descending with a chance of 2 / n!.
_LEAST_STEPS = 4
_LEAST_ROWS = 8
# Angles of a few hundred radians are exact to 2^-16 in float32, and so are the sinusoids computed from them.
_MOST_ROWS = 256
_SINUSOID = 2.0**-12


def find_tables(root: nn.Module, dtype: torch.dtype, wide: str = "float32") -> Iterator[Island]:
    """The buffers in ``root`` that stay as they are because a cast to ``dtype`` would harm what they are for.

    - complex and float64 buffers: whoever made them so chose that;
    - of float32 buffers that the cast changes: a vector whose entries ascend or descend throughout (frequencies,
      positions, time steps, edges of bins), and a matrix whose columns are all sinusoids of the row.

    Where the module that holds a float32 table has no parameters (a rotary embedding) the whole module is the island,
    so that what it computes from the table is computed wide and leaves in the mode's dtype; otherwise the buffer alone.
    ``wide`` is the dtype's name for these. Running statistics of norms are no tables. Raises ``ConfigurationError`` for
    buffers on the meta device.
    """
    for path, owner in root.named_modules():
        if isinstance(owner, _NormBase):
            continue
        for name, buffer in owner._buffers.items():
            if buffer is None:
                continue
            whole = f"{path}.{name}" if path else name
            if buffer.is_complex():
                real = "float64" if buffer.dtype is torch.complex128 else "float32"
                yield Island(whole, "buffer", real, "auto: a complex buffer")
            elif buffer.dtype is torch.float64:
                yield Island(whole, "buffer", "float64", "auto: a float64 buffer")
            elif buffer.is_meta and buffer.dtype in FLOATING:
                raise ConfigurationError(
                    f"islands='auto' looks at what buffers hold, and {whole!r} is on the meta device, where nothing is "
                    "held. Make the model on a real device, or name its islands"
                )
            elif buffer.dtype in FLOATING and is_changed(buffer, dtype) and (law := law_of(buffer)):
                if path and next(owner.parameters(), None) is None:
                    yield Island(path, "module", wide, f"auto: its buffer {name!r} holds {law}")
                else:
                    yield Island(whole, "buffer", wide, f"auto: it holds {law}")


def is_changed(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a cast to ``dtype`` and back gives other values."""
    return not torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)


def law_of(table: torch.Tensor) -> str:
    """What kind of table these values are, as a noun; "" where they follow no law that is looked for."""
    if not table.is_floating_point() or not bool(table.isfinite().all()):
        return ""
    values = table.detach().squeeze().double()
    if values.dim() == 1 and len(values) >= _LEAST_STEPS and _is_monotone(values):
        return "values in ascending or descending order, such as frequencies or positions"
    if values.dim() == 2 and len(values) >= _LEAST_ROWS and _are_sinusoids(values[:_MOST_ROWS]):
        return "sinusoids of positions"
    return ""


def _is_monotone(values: torch.Tensor) -> bool:
    steps = values.diff()
    return bool((steps > 0).all() or (steps < 0).all())


def _are_sinusoids(rows: torch.Tensor) -> bool:
    """Whether each column obeys s[p + 1] + s[p - 1] = 2 cos(w) s[p], as a sin(w p + b) does for every a, w and b."""
    middle, sums = rows[1:-1], rows[2:] + rows[:-2]
    square = (middle * middle).sum(0)
    factor = torch.where(square > 0, (sums * middle).sum(0) / square, 2.0)
    misfit = (sums - factor * middle).square().mean(0).sqrt()
    fits = misfit <= _SINUSOID * rows.square().mean(0).sqrt()
    varies = bool((rows != rows[0]).any())
    return varies and bool((fits & (factor.abs() <= 2.0 + _SINUSOID)).all())
