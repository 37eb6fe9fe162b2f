"""Weights to 4 and 8 bits and back, in pieces that are small beside a layer.

The arithmetic is bitsandbytes'; results equal those of its functions on the whole weight, bit by bit. The pieces keep
its temporaries, four to five times the float32 weight, from ever being larger than a few megabytes. Everything is
quantised from float32: others go through float16, where a weight above 65504 is inf.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from precision_runtime.layers.library import bnb, float32_tables

BLOCK = 64  # weights that share a scale in the 4-bit formats
NESTED = 256  # scales that share a scale of their own under double quantisation
PIECE = 1 << 16  # weights quantised at once; a multiple of BLOCK


def pack4(weight: torch.Tensor, storage: str) -> tuple[torch.Tensor, Any]:
    """Codes (uint8, two weights in each, shape (n/2, 1)) and bitsandbytes' QuantState of ``weight``.

    ``storage`` is nf4, nf4-dq, fp4 or fp4-dq. A weight on the meta device gives empty tensors of the right sizes.
    """
    kind, _, nested = storage.partition("-")
    flat = weight.detach().reshape(-1)
    count = flat.numel()
    codes = torch.empty(((count + 1) // 2, 1), dtype=torch.uint8, device=flat.device)
    scales = torch.empty(-(-count // BLOCK), dtype=torch.float32, device=flat.device)
    if not flat.is_meta:
        for start in range(0, count, PIECE):
            piece = flat[start : start + PIECE].to(torch.float32)
            packed, absmax = torch.ops.bitsandbytes.quantize_4bit.default(piece, BLOCK, kind, torch.uint8)
            codes[start // 2 : start // 2 + len(packed)] = packed
            scales[start // BLOCK : start // BLOCK + len(absmax)] = absmax
    with float32_tables():
        table = bnb.functional.get_4bit_type(kind, device=flat.device)
    state = bnb.functional.QuantState(
        absmax=scales, shape=weight.shape, code=table, blocksize=BLOCK, quant_type=kind, dtype=torch.float32
    )
    return codes, (_nest(state) if nested else state)


def _nest(state: Any) -> Any:
    """The same state with its scales in 8 bits."""
    offset = state.absmax.mean()
    if state.absmax.is_meta:
        blocks = -(-state.absmax.numel() // NESTED)
        outer = bnb.functional.QuantState(
            absmax=torch.empty(blocks, device="meta"), code=torch.empty(256, device="meta"), blocksize=NESTED,
            dtype=torch.float32,
        )  # fmt: skip
        codes = torch.empty_like(state.absmax, dtype=torch.uint8)
    else:
        codes, outer = bnb.functional.quantize_blockwise(state.absmax - offset, blocksize=NESTED)
    return bnb.functional.QuantState(
        absmax=codes, shape=state.shape, code=state.code, blocksize=BLOCK, quant_type=state.quant_type,
        dtype=state.dtype, offset=offset, state2=outer,
    )  # fmt: skip


def scales4(state: Any) -> torch.Tensor:
    """One float32 scale for each block."""
    if not state.nested:
        scales: torch.Tensor = state.absmax
    else:
        scales = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    return scales


def whole_blocks(shape: Sequence[int]) -> bool:
    """Whether each row of a weight is a whole number of blocks, so that bitsandbytes' products may be trusted."""
    return shape[1] % BLOCK == 0


def unpack4(codes: torch.Tensor, state: Any, dtype: torch.dtype, scales: torch.Tensor | None = None) -> torch.Tensor:
    """Code times scale, computed in float32 and rounded to ``dtype``, in the shape of the weight."""
    shape = tuple(state.shape)
    count = shape[0] * shape[1]
    # bitsandbytes' kernel for the CPU takes wrong scales where rows are no whole blocks (0.50: up to 3% at rows of 96),
    # and rows of odd length go to a fallback that is compiled anew for each shape. As one row both come out right.
    plain = shape if whole_blocks(shape) else (1, count + count % 2)
    values: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        codes, scales4(state) if scales is None else scales, state.blocksize, state.quant_type, plain, dtype
    )
    return values.reshape(-1)[:count].view(shape)


def pack8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (int8, the shape of ``weight``) and the largest magnitude of each row (float32), which is code 127."""
    rows = weight.detach()
    codes = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
    scales = torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device)
    step = max(1, PIECE // max(1, rows.shape[1]))
    for start in range(0, 0 if rows.is_meta else len(rows), step):
        piece = rows[start : start + step].to(torch.float32)
        largest = torch.linalg.vector_norm(piece, float("inf"), dim=1)
        # A row of zeros would become 0 * inf.
        factor = (127.0 / largest).clamp(max=torch.finfo(torch.float32).max)
        codes[start : start + step] = torch.round(piece * factor.unsqueeze(1))
        scales[start : start + step] = largest
    return codes, scales


def unpack8(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Code times scale / 127, computed in float32 and rounded to ``dtype``."""
    return codes.to(dtype).mul_(scales.mul(1.0 / 127.0).unsqueeze(1))
