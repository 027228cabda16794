"""`pack_24` and `unpack_24` in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ShapeError
from ..sparsity import BLOCK, KEPT
from .mask import mask_24
from .metadata import join_nibbles, split_words


def pack_24(w: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(values [out, in_features / 2], linear metadata) of w [out, in_features]: what a 2:4 mask keeps, or else the non-zeros, filled up to
    two a block at the lowest free positions. Of more than two non-zeros the first two are taken: the caller looks for such blocks."""
    rows, blocks = w.shape[0], w.shape[1] // BLOCK
    kept = mask_24((w != 0).float()) if mask is None else mask  # its ties go to the lowest index: just how a block is filled up
    values = w[kept].view(rows, blocks * KEPT)  # no gather: on the CPU it takes 16-bit NaNs through fp32 and changes their bits
    if mask is None:
        values = values.masked_fill(values == 0, 0.0)  # a -0.0 that fills up
    i0, i1 = kept.unflatten(-1, (-1, BLOCK)).nonzero()[:, -1].view(rows, blocks, KEPT).unbind(-1)
    return values, join_nibbles(i0 | i1 << 2)


def unpack_24(values: Tensor, metadata: Tensor) -> Tensor:
    """w [out, in_features] of `pack_24`'s values and metadata, +0.0 where nothing was kept."""
    nibbles = split_words(metadata, values.shape[1] // KEPT).long()
    position = torch.stack([nibbles & 3, nibbles >> 2], -1)
    wrong = (position[..., 0] >= position[..., 1]).nonzero()
    if len(wrong):
        at = tuple(wrong[0].tolist())
        raise ShapeError(
            f"unpack_24: expected ascending positions of the two kept weights in metadata, got {tuple(position[at].tolist())} "
            f"in block {at} ({len(wrong)} blocks are wrong). Pass metadata in linear order, as pack_24 returns it."
        )
    kept = torch.zeros((*nibbles.shape, BLOCK), dtype=torch.bool, device=values.device).scatter_(-1, position, True)
    w = torch.zeros_like(kept, dtype=values.dtype)
    w[kept] = values.flatten()
    return w.flatten(-2)
