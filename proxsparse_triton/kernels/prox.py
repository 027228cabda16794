"""prox_24: w = argmin 1/2 ||w - z||^2 + lam R(w) per block, optionally in the metric of a column scale."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block import load_blocks, prox_tile, round_to, unpack_blocks
from .launch import Launch, interpreted

MIN_SCALE = tl.constexpr(1e-20)


@triton.jit
def _prox_24_kernel(
    z_ptr, scale_ptr, out_ptr, lam, n_blocks, row_blocks,
    HAS_SCALE: tl.constexpr, TILE_BLOCKS: tl.constexpr, TILES: tl.constexpr, EXPLICIT: tl.constexpr,
):  # fmt: skip
    """w = argmin 1/2 ||w - z||^2 + lam R(w), each block by `prox_tile`.

    One program owns TILES consecutive tiles of TILE_BLOCKS blocks and loads three tiles ahead. Reads and
    writes each weight once: 4 bytes per bf16 weight, 8 per fp32 (plus the scale, which stays in the cache). Safe in place: a thread
    writes only what it has read.
    """
    lam = tl.cast(lam, tl.float32)
    lane = tl.arange(0, 4)[None, :]
    # 64-bit arithmetic once a program; within it offsets are small.
    first = tl.program_id(0).to(tl.int64) * (TILE_BLOCKS * TILES)
    z_ptr += first * 4
    out_ptr += first * 4
    left = tl.minimum(n_blocks - first, TILE_BLOCKS * TILES).to(tl.int32)
    first_column = (first % row_blocks).to(tl.int32)
    block = tl.arange(0, TILE_BLOCKS)
    # Three tiles in flight beside the one being solved: what one warp loads for one tile does not cover the latency of memory.
    next1 = load_blocks(z_ptr, block, left)
    next2 = load_blocks(z_ptr, block + TILE_BLOCKS, left)
    next3 = load_blocks(z_ptr, block + 2 * TILE_BLOCKS, left)
    for _ in range(TILES):
        z = unpack_blocks(next1)
        next1 = next2
        next2 = next3
        next3 = load_blocks(z_ptr, block + 3 * TILE_BLOCKS, left)
        inside = (block < left)[:, None]
        scale = z
        if HAS_SCALE:
            scale_offset = ((first_column + block) % row_blocks)[:, None] * 4 + lane
            scale = tl.maximum(tl.load(scale_ptr + scale_offset, mask=inside, other=1.0).to(tl.float32), MIN_SCALE)
        w = round_to(prox_tile(z, scale, lam, HAS_SCALE, EXPLICIT), out_ptr.dtype.element_ty, EXPLICIT)
        if out_ptr.dtype.element_ty == tl.float16:
            w += 0.0  # a negative weight that underflows is +0.0 too
        tl.store(out_ptr + block[:, None] * 4 + lane, w, mask=inside)
        block += TILE_BLOCKS


def prox_24(z: Tensor, lam: float, column_scale: Tensor | None, out: Tensor, launch: Launch) -> None:
    """Writes the prox of contiguous z into contiguous `out` (may be z itself); column_scale fp32 [in_features] or None."""
    n_blocks = z.numel() // 4
    if n_blocks == 0:
        return
    with torch.cuda.device_of(z):
        _prox_24_kernel[(triton.cdiv(n_blocks, launch.tile_blocks * launch.tiles),)](
            z,
            z if column_scale is None else column_scale,
            out,
            lam,
            n_blocks,
            z.shape[-1] // 4,
            HAS_SCALE=column_scale is not None,
            TILE_BLOCKS=launch.tile_blocks,
            TILES=launch.tiles,
            EXPLICIT=interpreted(_prox_24_kernel),
            num_warps=launch.num_warps,
        )
