"""`mask_24`: which two of every four to keep."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import mask as reference
from ..sparsity import check_width
from .dispatch import check_floating, choose_backend
from .sharded import check_shards, is_dtensor, local, sharded_like


@torch.library.custom_op("proxsparse::mask_24", mutates_args=())
def _mask_24(scores: Tensor, backend: str) -> Tensor:
    if backend == "reference":
        return reference.mask_24(scores).contiguous()
    from ..kernels import launch, mask

    out = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    mask.mask_24(scores.contiguous(), out, launch.blockwise(not scores.is_cuda))
    return out


@_mask_24.register_fake
def _(scores: Tensor, backend: str) -> Tensor:
    return torch.empty(scores.shape, dtype=torch.bool, device=scores.device)


def mask_24(scores: Tensor, *, backend: str | None = None) -> Tensor:
    """The 2:4 mask that keeps the two largest scores of each block.

    argmax_M sum_i M_i scores_i  over masks with exactly two kept of every four

    Args:
        scores: [..., in_features], in_features divisible by 4; any floating dtype. Pass |w| for magnitude. Of a DTensor
            each rank's part is worked on.
        backend: see `prox_24`.
    Returns: bool like `scores`, True = kept; ties to the lowest index, a NaN counts as -inf.
    Raises: TypeError: not a floating tensor. ShapeError: in_features not divisible by 4, on any rank of a DTensor. ConfigError: a DTensor
        of partial sums. BackendError: backend not available.
    """
    check_floating("mask_24", "scores", scores)
    check_width("mask_24", scores.shape)
    if is_dtensor(scores):
        check_shards("mask_24", "scores", scores)
        return sharded_like(mask_24(local(scores), backend=backend), scores)
    result: Tensor = _mask_24(scores.detach(), choose_backend("mask_24", scores, backend))
    return result
