"""`mask_24` in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..sparsity import BLOCK, KEPT


def mask_24(scores: Tensor) -> Tensor:
    """bool mask, True at the two largest scores of each block; ties to the lowest index, a NaN counts as -inf."""
    blocks = scores.unflatten(-1, (-1, BLOCK)).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    columns = blocks.unbind(-1)

    def rank(i: int) -> Tensor:
        """How many of the block come before column i."""
        before = [columns[j] >= columns[i] for j in range(i)] + [columns[j] > columns[i] for j in range(i + 1, BLOCK)]
        return torch.stack(before, -1).sum(-1)

    return torch.stack([rank(i) < KEPT for i in range(BLOCK)], -1).flatten(-2)
