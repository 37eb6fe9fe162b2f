"""The 16 by 16 Hadamard matrix with signs that spreads outliers over their block before a tensor is rounded to 4 bits.

It is orthogonal: turned by it, both operands of a product have the same product as before. The signs are a fixed vector
that NVIDIA publishes with its NVFP4 recipe; the method is that of "Pretraining Large Language Models with NVFP4"
(arXiv 2509.25149).
"""

from __future__ import annotations

import torch

from precision_runtime.float8.wide import without_autocast

SIZE = 16
_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


def matrix(device: torch.device) -> torch.Tensor:
    """The matrix in float32, whose entries are +0.25 and -0.25: sign(i) * (-1)^(number of ones in i & j) / sqrt(16)."""
    entries = [[_SIGNS[i] * (-1) ** (i & j).bit_count() / SIZE**0.5 for j in range(SIZE)] for i in range(SIZE)]
    return torch.tensor(entries, dtype=torch.float32, device=device)


def rotated(values: torch.Tensor) -> torch.Tensor:
    """Each run of 16 values along the first dimension times the matrix; float32, rounded to bfloat16 as on the GPU."""
    with without_autocast(values.device.type):
        turned: torch.Tensor = matrix(values.device).t() @ values.unflatten(0, (-1, SIZE))
    return turned.flatten(0, 1).bfloat16().float()
