"""The vocabulary of 2:4 sparsity: blocks, masks, and the checks everybody shares.

A block is 4 consecutive weights of a row along `in_features`; 2:4 means that at most 2 of the 4 are non-zero.
A mask is bool, of the weight's shape, True = kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import ShapeError

BLOCK = 4
KEPT = 2


def check_width(function: str, shape: Sequence[int]) -> None:
    """Raise ShapeError unless the last dimension of `shape` divides into blocks of 4."""
    if len(shape) == 0:
        raise ShapeError(f"{function}: expected a tensor of at least one dimension, got a scalar. Pass [..., in_features].")
    if shape[-1] % BLOCK:
        raise ShapeError(
            f"{function}: expected the last dimension divisible by {BLOCK}, got shape {tuple(shape)}. "
            "Exclude this layer with --skip or pad it."
        )


def kept_per_block(w: Tensor) -> Tensor:
    """Number of non-zero weights of each block: int [..., in_features / 4]. A NaN counts as non-zero.

    Raises: ShapeError: in_features not divisible by 4.
    """
    check_width("kept_per_block", w.shape)
    kept: Tensor = (w.unflatten(-1, (-1, BLOCK)) != 0).sum(dim=-1)
    return kept


def count_24_blocks(w: Tensor) -> Tensor:
    """How many blocks of `w` are 2:4 already: a scalar int64 tensor on w's device (no host sync)."""
    return (kept_per_block(w) <= KEPT).sum()


def is_24(w: Tensor) -> bool:
    """True if every block of `w` has at most two non-zeros. Syncs with the device."""
    return bool((kept_per_block(w) <= KEPT).all())


def check_mask(function: str, name: str, mask: Tensor) -> None:
    """Raise ShapeError unless `mask` is bool and keeps exactly two of every four weights."""
    check_width(function, mask.shape)
    if mask.dtype != torch.bool:
        raise ShapeError(f"{function}: expected a bool mask for {name}, got {mask.dtype}. True marks a kept weight.")
    kept = mask.unflatten(-1, (-1, BLOCK)).sum(dim=-1)
    wrong = (kept != KEPT).nonzero()
    if len(wrong):
        at = tuple(wrong[0].tolist())
        raise ShapeError(
            f"{function}: expected {KEPT} kept of every {BLOCK} in the mask of {name}, "
            f"got {int(kept[at])} in block {at} ({len(wrong)} blocks are wrong). Rebuild the mask with mask_24."
        )


def count_negative_zeros(w: Tensor) -> int:
    """How many entries are -0.0, which some 2:4 tools mistake for a kept weight."""
    return int(((w == 0) & torch.signbit(w)).sum())
