"""prox_24: w = argmin 1/2 ||w - z||^2 + lam R(w) per block, optionally in the metric of a column scale."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block import inside, load_blocks, store_signed, unpack_blocks
from .launch import Launch
from .solver import prox_magnitude

MIN_SCALE = tl.constexpr(1e-20)


@triton.jit
def load_scale(scale_ptr, tile, row_blocks, TILE_BLOCKS: tl.constexpr):
    """Column scales [TILE_BLOCKS, 4] of a tile, never 0."""
    first = (tl.cast(tile, tl.int64) * TILE_BLOCKS % row_blocks).to(tl.int32)
    block = (first + tl.arange(0, TILE_BLOCKS)) % row_blocks
    return tl.maximum(tl.load(scale_ptr + block[:, None] * 4 + tl.arange(0, 4)[None, :]).to(tl.float32), MIN_SCALE)


@triton.jit
def _prox_24_kernel(
    z_ptr, scale_ptr, out_ptr, lam, n_blocks, row_blocks,
    HAS_SCALE: tl.constexpr, EVEN: tl.constexpr, TILE_BLOCKS: tl.constexpr,
):  # fmt: skip
    """w = argmin 1/2 ||w - z||^2 + lam R(w) of each block.

    A program (one warp) takes every num_programs-th tile of TILE_BLOCKS blocks and loads two tiles ahead. Reads and writes each weight
    once: 4 bytes per bf16 weight, 8 per fp32 (plus the scale, which stays in the cache). Safe in place: a thread writes only what it has
    read. EVEN: the last tile is whole.
    """
    lam = tl.cast(lam, tl.float32)
    rate = 1 / lam
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    tiles = tl.cdiv(n_blocks, TILE_BLOCKS)
    no_poison = tl.zeros([TILE_BLOCKS], tl.float32)
    # One warp's loads for the tile being solved do not cover the latency of memory. Ahead of the end is the last tile, out of the cache.
    next1 = load_blocks(z_ptr, program, inside(program, n_blocks, EVEN, TILE_BLOCKS))
    ahead = tl.minimum(program + programs, tiles - 1)
    next2 = load_blocks(z_ptr, ahead, inside(ahead, n_blocks, EVEN, TILE_BLOCKS))
    for tile in range(program, tiles, programs):
        raw = next1
        next1 = next2
        ahead = tl.minimum(tile + 2 * programs, tiles - 1)
        next2 = load_blocks(z_ptr, ahead, inside(ahead, n_blocks, EVEN, TILE_BLOCKS))
        z = unpack_blocks(raw)
        scale = z
        if HAS_SCALE:
            scale = load_scale(scale_ptr, tile, row_blocks, TILE_BLOCKS)
        w = prox_magnitude(z, scale, lam, rate, no_poison, HAS_SCALE)
        store_signed(out_ptr, w, raw, tile, inside(tile, n_blocks, EVEN, TILE_BLOCKS))


def prox_24(z: Tensor, lam: float, column_scale: Tensor | None, out: Tensor, launch: Launch) -> None:
    """Writes the prox of contiguous z into contiguous `out` (may be z itself); column_scale fp32 [in_features] or None."""
    n_blocks = z.numel() // 4
    if n_blocks == 0:
        return
    with torch.cuda.device_of(z):
        _prox_24_kernel[(launch.programs(n_blocks, z.device),)](
            z,
            z if column_scale is None else column_scale,
            out,
            lam,
            n_blocks,
            z.shape[-1] // 4,
            HAS_SCALE=column_scale is not None,
            EVEN=n_blocks % launch.tile_blocks == 0,
            TILE_BLOCKS=launch.tile_blocks,
            num_warps=launch.num_warps,
        )
