"""prox_24: w = argmin 1/2 ||w - z||^2 + lam R(w) per block, optionally in the metric of a column scale."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block import column, inside, join, load_blocks, store_signed, unpack_blocks, unpack_words, weights_of
from .launch import Launch
from .ptx import signed_pair
from .solver import prox_magnitude, prox_magnitude_pair

MIN_SCALE = tl.constexpr(1e-20)


@triton.jit
def load_scale(scale_ptr, first, step: tl.constexpr, row_blocks, TILE_BLOCKS: tl.constexpr):
    """Column scales [TILE_BLOCKS, 4] of the blocks first, first + step, ..., never 0."""
    block = ((first % row_blocks).to(tl.int32) + tl.arange(0, TILE_BLOCKS) * step) % row_blocks
    return tl.maximum(tl.load(scale_ptr + block[:, None] * 4 + tl.arange(0, 4)[None, :]).to(tl.float32), MIN_SCALE)


@triton.jit
def _load_tile(ptr, tile, last, n_blocks, EVEN: tl.constexpr, TILE_BLOCKS: tl.constexpr):
    tile = tl.minimum(tile, last)
    return load_blocks(ptr, tile, inside(tile, n_blocks, EVEN, TILE_BLOCKS))


@triton.jit
def _prox_tile(out_ptr, scale_ptr, raw, lam, rate, row_blocks, tile, mask, HAS_SCALE: tl.constexpr):
    z = unpack_blocks(raw)
    scale = z
    if HAS_SCALE:
        scale = load_scale(scale_ptr, tl.cast(tile, tl.int64) * mask.shape[0], 1, row_blocks, mask.shape[0])
    w = prox_magnitude(z, scale, lam, rate, HAS_SCALE)
    store_signed(out_ptr, w, raw, tile, mask)


@triton.jit
def _load_pairs(ptr, tile, TILE_BLOCKS: tl.constexpr):
    """16 bytes a thread, two bf16 blocks: [TILE_BLOCKS, 4] words of a tile of 2 TILE_BLOCKS blocks."""
    words = ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    return tl.load(weights_of(words, tile, TILE_BLOCKS))


@triton.jit
def _prox_pair(out_ptr, scale_ptr, raw, lam, rate, row_blocks, tile, HAS_SCALE: tl.constexpr, TILE_BLOCKS: tl.constexpr):
    a, b, c, d = column(raw, 0), column(raw, 1), column(raw, 2), column(raw, 3)
    z, other = unpack_words(a, b), unpack_words(c, d)
    scale, other_scale = z, other
    if HAS_SCALE:
        scale = load_scale(scale_ptr, 2 * tl.cast(tile, tl.int64) * TILE_BLOCKS, 2, row_blocks, TILE_BLOCKS)
        other_scale = load_scale(scale_ptr, 2 * tl.cast(tile, tl.int64) * TILE_BLOCKS + 1, 2, row_blocks, TILE_BLOCKS)
    w, other_w = prox_magnitude_pair(z, other, scale, other_scale, lam, rate, HAS_SCALE)
    a = signed_pair(column(w, 0), column(w, 1), a)
    b = signed_pair(column(w, 2), column(w, 3), b)
    c = signed_pair(column(other_w, 0), column(other_w, 1), c)
    d = signed_pair(column(other_w, 2), column(other_w, 3), d)
    words = out_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    tl.store(weights_of(words, tile, TILE_BLOCKS), join(a, b, c, d))


@triton.jit
def _prox_24_kernel(
    z_ptr, scale_ptr, out_ptr, lam, n_blocks, row_blocks,
    HAS_SCALE: tl.constexpr, EVEN: tl.constexpr, PAIRED: tl.constexpr, TILE_BLOCKS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """w = argmin 1/2 ||w - z||^2 + lam R(w) of each block.

    A program (one warp) owns TILES consecutive tiles of TILE_BLOCKS blocks, a thread a block of each, or with PAIRED two; it loads
    tiles ahead. Reads and writes each weight once: 4 bytes per bf16 weight, 8 per fp32 (plus the scale, which stays in the cache). Safe in
    place: a thread writes only what it has read. EVEN: the last tile is whole.
    """
    lam = tl.cast(lam, tl.float32)
    rate = 1 / lam
    tiles = tl.cdiv(n_blocks, 2 * TILE_BLOCKS if PAIRED else TILE_BLOCKS)
    first = tl.program_id(0) * TILES
    stop = tl.minimum(first + TILES, tiles)
    # What one warp loads for one tile does not cover the latency of memory. Ahead of the end is the last tile, from the cache.
    last = stop - 1
    if PAIRED:
        next1 = _load_pairs(z_ptr, first, TILE_BLOCKS)
        next2 = _load_pairs(z_ptr, tl.minimum(first + 1, last), TILE_BLOCKS)
        for tile in range(first, stop):
            raw = next1
            next1 = next2
            next2 = _load_pairs(z_ptr, tl.minimum(tile + 2, last), TILE_BLOCKS)
            _prox_pair(out_ptr, scale_ptr, raw, lam, rate, row_blocks, tile, HAS_SCALE, TILE_BLOCKS)
    else:
        next1 = _load_tile(z_ptr, first, last, n_blocks, EVEN, TILE_BLOCKS)
        next2 = _load_tile(z_ptr, first + 1, last, n_blocks, EVEN, TILE_BLOCKS)
        next3 = _load_tile(z_ptr, first + 2, last, n_blocks, EVEN, TILE_BLOCKS)
        for tile in range(first, stop):
            raw = next1
            next1 = next2
            next2 = next3
            next3 = _load_tile(z_ptr, tile + 3, last, n_blocks, EVEN, TILE_BLOCKS)
            _prox_tile(out_ptr, scale_ptr, raw, lam, rate, row_blocks, tile, inside(tile, n_blocks, EVEN, TILE_BLOCKS), HAS_SCALE)


def prox_24(z: Tensor, lam: float, column_scale: Tensor | None, out: Tensor, launch: Launch) -> None:
    """Writes the prox of contiguous z into contiguous `out` (may be z itself); column_scale fp32 [in_features] or None."""
    n_blocks = z.numel() // 4
    if n_blocks == 0:
        return
    paired = z.dtype == torch.bfloat16 and n_blocks % (2 * launch.tile_blocks) == 0
    with torch.cuda.device_of(z):
        _prox_24_kernel[(launch.programs(n_blocks // 2 if paired else n_blocks),)](
            z,
            z if column_scale is None else column_scale,
            out,
            lam,
            n_blocks,
            z.shape[-1] // 4,
            HAS_SCALE=column_scale is not None,
            EVEN=n_blocks % launch.tile_blocks == 0,
            PAIRED=paired,
            TILE_BLOCKS=launch.tile_blocks,
            TILES=launch.tiles,
            num_warps=launch.num_warps,
        )
