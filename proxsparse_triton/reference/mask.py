"""`mask_24` in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..sparsity import BLOCK, KEPT


def mask_24(scores: Tensor) -> Tensor:
    """bool mask, True at the two largest scores of each block; ties to the lowest index, a NaN counts as -inf."""
    blocks = scores.unflatten(-1, (-1, BLOCK)).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    kept = blocks.sort(dim=-1, descending=True, stable=True).indices[..., :KEPT]
    return torch.zeros_like(blocks, dtype=torch.bool).scatter_(-1, kept, True).flatten(-2)
