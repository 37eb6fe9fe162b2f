"""torch's fast path of transformer encoders, which evaluates a layer in one kernel, past the layers inside."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def leave_fast_path(root: nn.Module, reason: Callable[[nn.Module], bool] = lambda part: True) -> None:
    """Have encoders in ``root`` that hold a part with a ``reason`` call their layers, whose weights or casts the kernel
    does not know. Padding is then masked, not cut off as nested tensors, which only the kernel takes.
    """
    for part in root.modules():
        if isinstance(part, _ENCODERS) and any(map(reason, part.modules())):
            if isinstance(part, nn.TransformerEncoder):
                part.use_nested_tensor = False
            else:
                part.activation_relu_or_gelu = 0  # "neither": the kernel is for relu and gelu


_ENCODERS = (nn.TransformerEncoder, nn.TransformerEncoderLayer)
