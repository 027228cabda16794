"""mask_24: True at the two largest scores of each block."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block import column, join, ranks
from .launch import Launch


@triton.jit
def _mask_24_kernel(score_ptr, mask_ptr, n_blocks, TILE_BLOCKS: tl.constexpr):
    """mask = rank < 2, ties to the lowest index, a NaN counts as -inf.

    One program owns TILE_BLOCKS blocks; reads each score once, writes one byte per weight.
    """
    block = tl.program_id(0).to(tl.int64) * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
    inside = (block < n_blocks)[:, None]
    offset = block[:, None] * 4 + tl.arange(0, 4)[None, :]
    score = tl.load(score_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    score = tl.where(score == score, score, float("-inf"))
    a, b, c, d = ranks(column(score, 0), column(score, 1), column(score, 2), column(score, 3))
    tl.store(mask_ptr + offset, join(a, b, c, d) < 2, mask=inside)


def mask_24(scores: Tensor, mask: Tensor, launch: Launch) -> None:
    """Writes the mask of contiguous `scores` into contiguous bool `mask`."""
    n_blocks = scores.numel() // 4
    if n_blocks == 0:
        return
    with torch.cuda.device_of(scores):
        _mask_24_kernel[(triton.cdiv(n_blocks, launch.tile_blocks),)](
            scores, mask, n_blocks, TILE_BLOCKS=launch.tile_blocks, num_warps=launch.num_warps
        )
