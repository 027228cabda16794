"""prox_24: w = argmin 1/2 ||w - z||^2 + lam R(w) per block, optionally in the metric of a column scale."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block import both_words, column, inside, join, load_blocks_at, signed_raw, store_raw_at, unpack_blocks, words, words_at
from .launch import Launch
from .pending import CAPACITY, at, pending_list, push
from .ptx import PTX
from .solver import SWEEPS_UP_TO, count_hard, hard_magnitude, largest_of_two, prox_magnitude, shrunk, strengths, two_kept
from .sweeps import sweeps_of_pairs

MIN_SCALE = tl.constexpr(1e-20)
FEW = tl.constexpr(32)  # of the 64 blocks of a pair of tiles


@triton.jit
def load_scale(scale_ptr, first, block, row_blocks):
    """Column scales [TILE_BLOCKS, 4] of the blocks first + block, never 0."""
    column_block = ((first % row_blocks).to(tl.int32) + block) % row_blocks
    return tl.maximum(tl.load(scale_ptr + column_block[:, None] * 4 + tl.arange(0, 4)[None, :]).to(tl.float32), MIN_SCALE)


@triton.jit
def _prox_blocks(
    z_ptr, scale_ptr, out_ptr, lam, rate, row_blocks, first_block, block, loaded, stored,
    HARD: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """The blocks first_block + block: read where `loaded`, written where `stored`. HARD: without trying the sweeps."""
    raw = load_blocks_at(z_ptr, first_block, block, loaded)
    z = unpack_blocks(raw)
    scale = z
    if HAS_SCALE:
        scale = load_scale(scale_ptr, first_block, block, row_blocks)
    if HARD:
        w = hard_magnitude(z, scale, lam, rate, HAS_SCALE)
    else:
        w = prox_magnitude(z, scale, lam, rate, HAS_SCALE)
    store_raw_at(out_ptr, signed_raw(w, raw, out_ptr.dtype.element_ty), first_block, block, stored)


@triton.jit
def _pair_places(index: tl.constexpr, ADJACENT: tl.constexpr, TILE_BLOCKS: tl.constexpr):
    """The blocks of the two tiles of a pair: adjacent ones, so that a thread accesses 16 bytes of bf16, or tiles one after the other."""
    lane = tl.arange(0, TILE_BLOCKS)
    start: tl.constexpr = index * 2 * TILE_BLOCKS
    if ADJACENT:
        return start + 2 * lane, start + 2 * lane + 1
    else:
        return start + lane, start + TILE_BLOCKS + lane


@triton.jit
def _load_pair(ptr, first_block, index: tl.constexpr, ADJACENT: tl.constexpr, TILE_BLOCKS: tl.constexpr):
    block, other_block = _pair_places(index, ADJACENT, TILE_BLOCKS)
    if ADJACENT:
        four = tl.load(words_at(ptr, first_block, block, 4))
        return both_words(column(four, 0), column(four, 1)), both_words(column(four, 2), column(four, 3))
    else:
        mask = block == block
        return load_blocks_at(ptr, first_block, block, mask), load_blocks_at(ptr, first_block, other_block, mask)


@triton.jit
def _store_pair(ptr, raw, other_raw, first_block, index: tl.constexpr, ADJACENT: tl.constexpr, TILE_BLOCKS: tl.constexpr):
    block, other_block = _pair_places(index, ADJACENT, TILE_BLOCKS)
    if ADJACENT:
        a, b = words(raw)
        c, d = words(other_raw)
        tl.store(words_at(ptr, first_block, block, 4), join(a, b, c, d))
    else:
        mask = block == block
        store_raw_at(ptr, raw, first_block, block, mask)
        store_raw_at(ptr, other_raw, first_block, other_block, mask)


@triton.jit
def _put_off(result, raw, z, scale, lam, rate, block, pending, pending_at, count, DTYPE: tl.constexpr, HAS_SCALE: tl.constexpr):
    """Leaves pending blocks as they were (z and out may be one tensor) and notes them. Where there is no list, solves them at once."""
    if PTX:
        return tl.where(pending[:, None], raw, result), push(pending_at, count, block, pending)
    else:
        solved = signed_raw(hard_magnitude(z, scale, lam, rate, HAS_SCALE), raw, DTYPE)
        return tl.where(pending[:, None], solved, result), count


@triton.jit
def _prox_pair(
    raw, other_raw, scale_ptr, lam, rate, row_blocks, first_block, index: tl.constexpr, pending_at, count,
    DTYPE: tl.constexpr, HAS_SCALE: tl.constexpr, ADJACENT: tl.constexpr, TILE_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Two tiles as loaded: their results in the same form, and how many blocks of the program are pending now."""
    block, other_block = _pair_places(index, ADJACENT, TILE_BLOCKS)
    z, other = unpack_blocks(raw), unpack_blocks(other_raw)
    scale, other_scale = z, other
    if HAS_SCALE:
        scale = load_scale(scale_ptr, first_block, block, row_blocks)
        other_scale = load_scale(scale_ptr, first_block, other_block, row_blocks)
    v1, v2, v3, v4, total = strengths(z, scale, lam, HAS_SCALE)
    x1, x2, x3, x4, other_total = strengths(other, other_scale, lam, HAS_SCALE)
    top = largest_of_two(total, other_total)
    swept = top <= SWEEPS_UP_TO
    beyond = not swept
    if beyond:  # sweeps are cheaper than the hard solver even where a few blocks need that besides
        swept = count_hard(total, other_total) <= FEW
    if swept:
        # A NaN, too, sweeps its neighbours as often as any of them may need.
        top = tl.where(top <= SWEEPS_UP_TO, top, SWEEPS_UP_TO)
        e1, e2, e3, e4, f1, f2, f3, f4 = sweeps_of_pairs(
            lam * v1, lam * v2, lam * v3, lam * v4, lam * x1, lam * x2, lam * x3, lam * x4, top, ADJACENT
        )
        result = signed_raw(shrunk(z, scale, rate, e1, e2, e3, e4, HAS_SCALE), raw, DTYPE)
        other_result = signed_raw(shrunk(other, other_scale, rate, f1, f2, f3, f4, HAS_SCALE), other_raw, DTYPE)
        if beyond:
            pending, other_pending = (total <= SWEEPS_UP_TO) == 0, (other_total <= SWEEPS_UP_TO) == 0
            result, count = _put_off(result, raw, z, scale, lam, rate, block, pending, pending_at, count, DTYPE, HAS_SCALE)
            other_result, count = _put_off(
                other_result, other_raw, other, other_scale, lam, rate, other_block, other_pending, pending_at, count, DTYPE, HAS_SCALE
            )
    else:
        w, pending = two_kept(z, v1, v2, v3, v4, total, lam)
        other_w, other_pending = two_kept(other, x1, x2, x3, x4, other_total, lam)
        result, other_result = signed_raw(w, raw, DTYPE), signed_raw(other_w, other_raw, DTYPE)
        result, count = _put_off(result, raw, z, scale, lam, rate, block, pending, pending_at, count, DTYPE, HAS_SCALE)
        other_result, count = _put_off(
            other_result, other_raw, other, other_scale, lam, rate, other_block, other_pending, pending_at, count, DTYPE, HAS_SCALE
        )
    return result, other_result, count


@triton.jit
def _solve_pending(
    z_ptr, scale_ptr, out_ptr, lam, rate, row_blocks, first_block, pending_at, count,
    HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """The blocks of a program that are pending, a full warp at a time. Their weights come from the cache."""
    n = tl.max(count, axis=0)
    for start in range(0, n, count.shape[0]):
        place = start + tl.arange(0, count.shape[0])
        here = place < n
        block = at(pending_at, tl.minimum(place, n - 1))
        _prox_blocks(z_ptr, scale_ptr, out_ptr, lam, rate, row_blocks, first_block, block, place == place, here, True, HAS_SCALE)


@triton.jit
def _whole_program(
    z_ptr, scale_ptr, out_ptr, lam, rate, row_blocks, first_block,
    HAS_SCALE: tl.constexpr, TILE_BLOCKS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Pairs of tiles, unrolled, loaded two pairs ahead: what one warp loads for one does not cover the latency of memory."""
    ADJACENT: tl.constexpr = z_ptr.dtype.element_ty == tl.bfloat16
    PAIRS: tl.constexpr = TILES // 2
    pending_at = 0
    if PTX:
        tl.static_assert(TILES * TILE_BLOCKS <= CAPACITY and TILE_BLOCKS == 32)
        pending_at = pending_list()
    count = tl.zeros([TILE_BLOCKS], tl.int32)
    raw, other_raw = _load_pair(z_ptr, first_block, 0, ADJACENT, TILE_BLOCKS)
    next_raw, next_other = _load_pair(z_ptr, first_block, min(1, PAIRS - 1), ADJACENT, TILE_BLOCKS)
    for index in tl.static_range(PAIRS):
        last_raw, last_other = next_raw, next_other
        if index + 2 < PAIRS:
            last_raw, last_other = _load_pair(z_ptr, first_block, index + 2, ADJACENT, TILE_BLOCKS)
        raw, other_raw, count = _prox_pair(
            raw, other_raw, scale_ptr, lam, rate, row_blocks, first_block, index, pending_at, count,
            out_ptr.dtype.element_ty, HAS_SCALE, ADJACENT, TILE_BLOCKS,
        )  # fmt: skip
        _store_pair(out_ptr, raw, other_raw, first_block, index, ADJACENT, TILE_BLOCKS)
        raw, other_raw, next_raw, next_other = next_raw, next_other, last_raw, last_other
    if PTX:
        _solve_pending(z_ptr, scale_ptr, out_ptr, lam, rate, row_blocks, first_block, pending_at, count, HAS_SCALE)


@triton.jit
def _prox_24_kernel(
    z_ptr, scale_ptr, out_ptr, lam, rate, n_blocks, row_blocks, first_tile,
    HAS_SCALE: tl.constexpr, WHOLE: tl.constexpr, TILE_BLOCKS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """w = argmin 1/2 ||w - z||^2 + lam R(w) of each block from tile first_tile on; rate = 1 / lam.

    A program (one warp) owns TILES consecutive tiles of TILE_BLOCKS blocks, a thread a block of each. Reads and writes each weight once: 4
    bytes per bf16 weight, 8 per fp32 (plus the scale, which stays in the cache). Safe in place: a program writes only what it has read.

    WHOLE: all programs have all their tiles, and work on two at a time. Hard blocks are left as they were and read again, from the cache,
    when all tiles are through.
    """
    lam = tl.cast(lam, tl.float32)
    rate = tl.cast(rate, tl.float32)
    first = first_tile + tl.program_id(0) * TILES
    first_block = tl.cast(first, tl.int64) * TILE_BLOCKS
    if WHOLE:
        _whole_program(z_ptr, scale_ptr, out_ptr, lam, rate, row_blocks, first_block, HAS_SCALE, TILE_BLOCKS, TILES)
    else:
        block = tl.arange(0, TILE_BLOCKS)
        for tile in range(first, tl.minimum(first + TILES, tl.cdiv(n_blocks, TILE_BLOCKS))):
            mask = inside(tile, n_blocks, False, TILE_BLOCKS)
            _prox_blocks(z_ptr, scale_ptr, out_ptr, lam, rate, row_blocks, first_block, block, mask, mask, False, HAS_SCALE)
            block += TILE_BLOCKS


def prox_24(z: Tensor, lam: float, column_scale: Tensor | None, out: Tensor, launch: Launch) -> None:
    """Writes the prox of contiguous z into contiguous `out` (may be z itself); column_scale fp32 [in_features] or None."""
    n_blocks = z.numel() // 4
    # Two kernels rather than one with a branch: that takes 5 % longer (H200), for the sake of what a tensor of a model seldom has.
    # The list of pending blocks wants one block a lane, which the compiler arranges for 16-byte accesses only.
    aligned = all(tensor.data_ptr() % 16 == 0 for tensor in (z, out))
    whole = n_blocks // (launch.tiles * launch.tile_blocks) if aligned and launch.tiles % 2 == 0 else 0
    rest = launch.programs(n_blocks) - whole
    with torch.cuda.device_of(z):
        for programs, first_tile in ((whole, 0), (rest, whole * launch.tiles)):
            if programs == 0:
                continue
            _prox_24_kernel[(programs,)](
                z,
                z if column_scale is None else column_scale,
                out,
                lam,
                1 / lam,
                n_blocks,
                z.shape[-1] // 4,
                first_tile,
                HAS_SCALE=column_scale is not None,
                WHOLE=first_tile < whole * launch.tiles,
                TILE_BLOCKS=launch.tile_blocks,
                TILES=launch.tiles,
                num_warps=launch.num_warps,
            )
