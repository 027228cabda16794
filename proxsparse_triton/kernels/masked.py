"""masked_weight_24: w0 at the two largest |c w| of each block, +0.0 elsewhere."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block import both_words, column, inside, join, load_blocks, ranks, store_blocks, store_raw_at, unpack_blocks, words
from .launch import Launch
from .prox import load_scale


@triton.jit
def _kept_raw(raw, a, b, c, d):
    """Raw blocks with zeros where the rank, one of the four columns given, is not below 2: the kept weights bit for bit."""
    if raw.dtype == tl.int32:
        first, second = words(raw)
        first &= tl.where(a < 2, 0xFFFF, 0) | tl.where(b < 2, -65536, 0)
        second &= tl.where(c < 2, 0xFFFF, 0) | tl.where(d < 2, -65536, 0)
        return both_words(first, second)
    else:
        return tl.where(join(a, b, c, d) < 2, raw, 0)


@triton.jit
def _masked_weight_24_kernel(
    w_ptr, w0_ptr, scale_ptr, out_ptr, n_blocks, row_blocks,
    HAS_SCALE: tl.constexpr, TILE_BLOCKS: tl.constexpr,
):  # fmt: skip
    """out = w0 where rank(|w| c) < 2, else +0.0; ties to the lowest index, a NaN counts as -inf.

    One program owns TILE_BLOCKS blocks. Reads w and w0 once and writes out once: 6 bytes per weight in bf16 (plus the scale, which stays in
    the cache). Safe in place: a thread writes only the blocks that it has read.
    """
    tile = tl.program_id(0)
    mask = inside(tile, n_blocks, False, TILE_BLOCKS)
    w = load_blocks(w_ptr, tile, mask)
    raw = load_blocks(w0_ptr, tile, mask)
    first, block = tl.cast(tile, tl.int64) * TILE_BLOCKS, tl.arange(0, TILE_BLOCKS)
    score = tl.abs(unpack_blocks(w))
    if HAS_SCALE:
        score *= load_scale(scale_ptr, first, block, row_blocks)
    score = tl.where(score == score, score, float("-inf"))
    a, b, c, d = ranks(column(score, 0), column(score, 1), column(score, 2), column(score, 3))
    if w0_ptr.dtype == out_ptr.dtype:
        store_raw_at(out_ptr, _kept_raw(raw, a, b, c, d), first, block, mask)
    else:
        store_blocks(out_ptr, tl.where(join(a, b, c, d) < 2, unpack_blocks(raw), 0.0), tile, mask)


def masked_weight_24(w: Tensor, w0: Tensor, column_scale: Tensor | None, out: Tensor, launch: Launch) -> None:
    """Writes into contiguous `out` (may be w or w0 itself); w, w0 contiguous, column_scale fp32 [in_features] or None."""
    n_blocks = w.numel() // 4
    if n_blocks == 0:
        return
    with torch.cuda.device_of(w):
        _masked_weight_24_kernel[(launch.programs(n_blocks),)](
            w,
            w0,
            w if column_scale is None else column_scale,
            out,
            n_blocks,
            w.shape[-1] // 4,
            HAS_SCALE=column_scale is not None,
            TILE_BLOCKS=launch.tile_blocks,
            num_warps=launch.num_warps,
        )
