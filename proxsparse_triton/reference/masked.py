"""`masked_weight_24` in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .mask import mask_24
from .prox import MIN_SCALE


def masked_weight_24(w: Tensor, w0: Tensor, *, column_scale: Tensor | None = None) -> Tensor:
    """w0 where |w|, times `column_scale` if given, is among the two largest of its block, +0.0 elsewhere; in w's dtype.

    Compares in fp32, or fp64 for fp64 w. Ties to the lowest index, a NaN counts as -inf.
    """
    precision = torch.float64 if w.dtype == torch.float64 else torch.float32
    scores = w.to(precision).abs()
    if column_scale is not None:
        scores = scores * column_scale.to(precision).clamp_min(MIN_SCALE)
    return torch.where(mask_24(scores), w0.to(w.dtype), 0.0)
