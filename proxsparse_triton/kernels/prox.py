"""prox_24: w = argmin 1/2 ||w - z||^2 + lam R(w) per block, optionally in the metric of a column scale."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block import column, join, round_to, shrinkage
from .launch import Launch, interpreted

MIN_SCALE = tl.constexpr(1e-20)


@triton.jit
def _prox_24_kernel(
    z_ptr, scale_ptr, out_ptr, lam, n_blocks, row_blocks,
    HAS_SCALE: tl.constexpr, TILE_BLOCKS: tl.constexpr, EXPLICIT: tl.constexpr,
):  # fmt: skip
    """w = sgn(z) max(|z| - shrinkage(|z| c) / c, 0), +0.0 where dropped.

    One program owns TILE_BLOCKS consecutive blocks. Reads and writes each weight once: 4 bytes per bf16 weight, 8 per fp32
    (plus the scale, which stays in the cache). Safe in place: a thread writes only what it has read.
    """
    lam = tl.cast(lam, tl.float32)
    block = tl.program_id(0).to(tl.int64) * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
    inside = (block < n_blocks)[:, None]
    offset = block[:, None] * 4 + tl.arange(0, 4)[None, :]
    z = tl.load(z_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    magnitude = tl.abs(z)
    if HAS_SCALE:
        scale_offset = (block % row_blocks)[:, None] * 4 + tl.arange(0, 4)[None, :]
        scale = tl.maximum(tl.load(scale_ptr + scale_offset, mask=inside, other=1.0).to(tl.float32), MIN_SCALE)
        v = magnitude * scale
    else:
        v = magnitude
    a, b, c, d = shrinkage(column(v, 0), column(v, 1), column(v, 2), column(v, 3), lam)
    shrink = join(a, b, c, d)
    if HAS_SCALE:
        shrink = shrink / scale
    w = tl.where(shrink < magnitude, magnitude - shrink, 0.0)
    # Rounded before it gets its sign: a weight that underflows in fp16 is +0.0 too.
    w = round_to(w, out_ptr.dtype.element_ty, EXPLICIT).to(tl.float32)
    w = tl.where((z < 0) & (w > 0), -w, w)
    # A sum, not a maximum: maxima drop NaNs. An infinity stays one, since all magnitudes are positive.
    total = tl.sum(magnitude, axis=1)[:, None]
    w = tl.where(total == total, w, float("nan"))
    tl.store(out_ptr + offset, w.to(out_ptr.dtype.element_ty), mask=inside)


def prox_24(z: Tensor, lam: float, column_scale: Tensor | None, out: Tensor, launch: Launch) -> None:
    """Writes the prox of contiguous z into contiguous `out` (may be z itself); column_scale fp32 [in_features] or None."""
    n_blocks = z.numel() // 4
    if n_blocks == 0:
        return
    with torch.cuda.device_of(z):
        _prox_24_kernel[(triton.cdiv(n_blocks, launch.tile_blocks),)](
            z,
            z if column_scale is None else column_scale,
            out,
            lam,
            n_blocks,
            z.shape[-1] // 4,
            HAS_SCALE=column_scale is not None,
            TILE_BLOCKS=launch.tile_blocks,
            EXPLICIT=interpreted(_prox_24_kernel),
            num_warps=launch.num_warps,
        )
