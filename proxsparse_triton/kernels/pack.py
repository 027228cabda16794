"""pack_24 and unpack_24: the two kept weights of each block and their positions.

Weights are bits here, 16 or 32 of them: nothing is rounded, and a NaN keeps its payload. A thread owns two neighbouring blocks, whose
nibbles of metadata are one byte, so that no thread waits for another.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block import column, join
from .launch import Launch


@triton.jit
def _pairs(row_blocks, n_pairs, WHOLE: tl.constexpr, PAIRS: tl.constexpr):
    """This program's pairs of blocks: their numbers, the numbers of their first blocks, and which of the two blocks there are.

    Rows of metadata end on whole words, those of blocks anywhere. WHOLE: everywhere on a whole word, and all rows are one."""
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    inside = pair < n_pairs
    if WHOLE:
        return pair, pair * 2, inside, inside
    else:
        row_pairs = tl.cdiv(row_blocks, 4) * 2
        row = pair // row_pairs
        block = (pair - row * row_pairs) * 2
        return pair, row * row_blocks + block, inside & (block < row_blocks), inside & (block + 1 < row_blocks)


@triton.jit
def _kept_of(w_ptr, mask_ptr, block, there, HAS_MASK: tl.constexpr):
    """The two kept weights of each block, its nibble, and whether it has too many (or, with a mask, too few)."""
    lane = tl.arange(0, 4)[None, :]
    w = tl.load(w_ptr + block[:, None] * 4 + lane, mask=there[:, None], other=0)
    if HAS_MASK:
        kept = tl.load(mask_ptr + block[:, None] * 4 + lane, mask=there[:, None], other=0) != 0
    else:
        kept = (w << 1).to(w.dtype) != 0  # without the sign
        w = tl.where(kept, w, 0)  # no -0.0
    count = tl.sum(kept.to(tl.int32), axis=1)
    # Of a block that keeps one or none, the lowest free positions: 0 and the kept one, or 0 and 1.
    low = tl.where(count < 2, 0, tl.min(tl.where(kept, lane, 2), axis=1))
    high = tl.max(tl.where(kept, lane, 1), axis=1)
    if HAS_MASK:
        wrong = there & (count != 2)
    else:
        wrong = count > 2
    first = tl.sum(tl.where(lane == low[:, None], w, 0), axis=1)
    second = tl.sum(tl.where(lane == high[:, None], w, 0), axis=1)
    return first, second, low | (high << 2), wrong


@triton.jit
def _pack_24_kernel(
    w_ptr, mask_ptr, values_ptr, metadata_ptr, wrong_ptr, row_blocks, n_pairs,
    HAS_MASK: tl.constexpr, WHOLE: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """values = the kept of each block in column order, metadata = i0 | i1 << 2; wrong = 1 if a block keeps more than two.

    One program owns PAIRS pairs of blocks. Reads each weight (and a byte of the mask) once and writes half of them and a bit: 3.125 bytes a
    weight of 16 bits. All writers of `wrong` write the same: a flag costs nothing where all is well, a sum would need a place and a launch.
    28672 x 8192 in bf16: 78 % of the copy bandwidth, with a mask 102 %; in fp32 101 %; back again 95 and 80 %; bf16 rows
    that end inside a word 47 % (H200, 2026-11-26).
    """
    pair, block, has_first, has_second = _pairs(row_blocks, n_pairs, WHOLE, PAIRS)
    a, b, low_nibble, wrong = _kept_of(w_ptr, mask_ptr, block, has_first, HAS_MASK)
    c, d, high_nibble, wrong_too = _kept_of(w_ptr, mask_ptr, block + 1, has_second, HAS_MASK)
    lane = tl.arange(0, 4)[None, :]
    there = tl.where(lane < 2, has_first[:, None], has_second[:, None])
    tl.store(values_ptr + block[:, None] * 2 + lane, join(a, b, c, d), mask=there)
    tl.store(metadata_ptr + pair, low_nibble | (high_nibble << 4), mask=pair < n_pairs)
    tl.store(wrong_ptr + tl.zeros_like(pair), 1, mask=wrong | wrong_too)


@triton.jit
def _spread(w_ptr, first, second, nibble, block, there):
    """Stores blocks that hold `first` and `second` where the nibble says, and +0.0."""
    lane = tl.arange(0, 4)[None, :]
    w = tl.where(lane == (nibble >> 2 & 3)[:, None], second[:, None], 0)
    w = tl.where(lane == (nibble & 3)[:, None], first[:, None], w)
    tl.store(w_ptr + block[:, None] * 4 + lane, w, mask=there[:, None])


@triton.jit
def _unpack_24_kernel(values_ptr, metadata_ptr, w_ptr, row_blocks, n_pairs, WHOLE: tl.constexpr, PAIRS: tl.constexpr):
    """w = the kept weights at their positions, +0.0 elsewhere. The bytes of `_pack_24_kernel`, the other way round."""
    pair, block, has_first, has_second = _pairs(row_blocks, n_pairs, WHOLE, PAIRS)
    lane = tl.arange(0, 4)[None, :]
    there = tl.where(lane < 2, has_first[:, None], has_second[:, None])
    kept = tl.load(values_ptr + block[:, None] * 2 + lane, mask=there, other=0)
    nibbles = tl.load(metadata_ptr + pair, mask=pair < n_pairs, other=0).to(tl.int32)
    _spread(w_ptr, column(kept, 0), column(kept, 1), nibbles, block, has_first)
    _spread(w_ptr, column(kept, 2), column(kept, 3), nibbles >> 4, block + 1, has_second)


def _bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def pack_24(w: Tensor, mask: Tensor | None, values: Tensor, metadata: Tensor, launch: Launch) -> Tensor:
    """Packs contiguous w [out, in_features] into contiguous `values` and `metadata`.

    Returns: int32 scalar, not 0 if a block keeps more than two weights (or, with a mask, not two); then the results mean nothing.
    """
    wrong = torch.zeros((), dtype=torch.int32, device=w.device)
    row_blocks, n_pairs, pairs = w.shape[1] // 4, 2 * metadata.numel(), launch.tile_blocks // 2
    if n_pairs:
        with torch.cuda.device_of(w):
            _pack_24_kernel[(triton.cdiv(n_pairs, pairs),)](
                _bits(w), _bits(w) if mask is None else mask, _bits(values), metadata.view(torch.uint8), wrong, row_blocks, n_pairs,
                HAS_MASK=mask is not None, WHOLE=row_blocks % 4 == 0, PAIRS=pairs, num_warps=launch.num_warps,
            )  # fmt: skip
    return wrong


def unpack_24(values: Tensor, metadata: Tensor, w: Tensor, launch: Launch) -> None:
    """Writes contiguous `w` from contiguous `values` and `metadata`."""
    row_blocks, n_pairs, pairs = w.shape[1] // 4, 2 * metadata.numel(), launch.tile_blocks // 2
    if n_pairs:
        with torch.cuda.device_of(w):
            _unpack_24_kernel[(triton.cdiv(n_pairs, pairs),)](
                _bits(values), metadata.view(torch.uint8), _bits(w), row_blocks, n_pairs,
                WHOLE=row_blocks % 4 == 0, PAIRS=pairs, num_warps=launch.num_warps,
            )  # fmt: skip
