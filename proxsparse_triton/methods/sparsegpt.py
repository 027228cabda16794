"""SparseGPT at 2:4: choose the mask by the inverse Hessian, column by column, and let the kept weights make up for the error.

Source: Frantar & Alistarh 2023 (arXiv 2301.00774).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError, LearningError
from ..models.selection import LayerPlan
from ..models.statistics import Hessian
from ..ops import mask_24
from ..sparsity import BLOCK
from .base import PruneResult, PruneTask, check_inside_blocks
from .magnitude import magnitude_mask
from .walk import BY_MAGNITUDE, taken, walk

_ATTEMPTS = 4


def inverse_factor(hessian: Tensor, dampening: float) -> Tensor:
    """Upper Cholesky factor U of the damped inverse, (H + d mean(diag H) I)^-1 = U^T U; [in, in].

    d grows tenfold where the factorisation fails. Raises: LearningError: it fails for every d tried, or H is not finite.
    """
    mean = hessian.diagonal().mean()
    for attempt in range(_ATTEMPTS):
        damped = hessian.clone()
        damped.diagonal().add_(dampening * 10**attempt * mean)
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            upper: Tensor
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if int(info) == 0:
                return upper
    if not hessian.isfinite().all():
        raise LearningError(
            "sparsegpt: expected a finite Hessian, got NaN or inf in it. The layer's inputs overflow or are no numbers: check the weights."
        )
    raise LearningError(
        f"sparsegpt: expected a positive definite Hessian, got one that stays singular at dampening {dampening * 10 ** (_ATTEMPTS - 1):g}. "
        "Use more calibration windows or a larger dampening."
    )


def sparsegpt_24(w: Tensor, hessian: Tensor, *, dampening: float = 0.01, column_block: int = 128) -> tuple[Tensor, Tensor]:
    """Updated weights and mask of one layer, minimising tr((W - W0) H (W - W0)^T) greedily.

    Args:
        w: [out, in], in divisible by 4.
        hessian: [in, in], the sum of x x^T up to a factor; a dead input feature has a zero diagonal.
        dampening: share of the mean diagonal added to it.
        column_block: columns whose errors are applied to the rest in one product; divisible by 4.
    Returns: (weights fp32 [out, in], zero outside the mask; bool mask [out, in]).
    """
    w = w.detach().float().clone()
    hessian = hessian.clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    w[:, dead] = 0
    upper = inverse_factor(hessian, dampening)
    mask = torch.zeros_like(w, dtype=torch.bool)
    for start in range(0, w.shape[1], column_block):
        stop = min(start + column_block, w.shape[1])
        part, factor = w[:, start:stop], upper[start:stop, start:stop]
        diagonal = factor.diagonal()
        errors = torch.zeros_like(part)
        for i in range(stop - start):
            if i % BLOCK == 0:  # a block is decided with the errors of all columns before it in place
                scores = (part[:, i : i + BLOCK] / diagonal[i : i + BLOCK]).square()
                mask[:, start + i : start + i + BLOCK] = mask_24(scores)
            column = part[:, i]
            kept = torch.where(mask[:, start + i], column, 0.0)
            error = (column - kept) / diagonal[i]
            part[:, i:] -= error[:, None] * factor[i, i:]
            part[:, i] = kept
            errors[:, i] = error
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return w, mask


@dataclass(frozen=True)
class SparseGPT:
    dampening: float = 0.01
    column_block: int = 128
    mask_only: bool = False  # put the mask on the original weights instead of updating them

    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.dampening) and self.dampening > 0):
            raise ConfigError(f"sparsegpt: expected a finite dampening > 0, got {self.dampening}. The usual value is 0.01.")
        if self.column_block < BLOCK or self.column_block % BLOCK:
            raise ConfigError(f"sparsegpt: expected column_block divisible by {BLOCK}, got {self.column_block}. The usual value is 128.")

    def check(self, plan: LayerPlan) -> None:
        check_inside_blocks(plan, "sparsegpt", "--method magnitude or proxsparse")

    def prune(self, task: PruneTask) -> PruneResult:
        self.check(task.plan)
        masks: dict[str, Tensor] = {}
        weights: dict[str, Tensor] = {}
        for linears, hessians in walk(task, "sparsegpt", "sparsegpt", Hessian, otherwise=BY_MAGNITUDE):
            for name, linear in linears.items():
                updated, mask = self._pruned(linear.weight, taken(hessians, name))
                kept = linear.weight.masked_fill(~mask, 0.0) if self.mask_only else updated.to(linear.weight.dtype)
                with torch.no_grad():
                    linear.weight.copy_(kept)
                masks[name], weights[name] = mask.cpu(), linear.weight.detach().to("cpu", copy=True)
        return PruneResult(masks, None if self.mask_only else weights)

    def _pruned(self, w: Tensor, hessian: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights and mask. Without a Hessian every column would be dead, and the layer zero: magnitude decides."""
        if hessian is not None:
            return sparsegpt_24(w, hessian, dampening=self.dampening, column_block=self.column_block)
        mask = magnitude_mask(w).to(w.device)
        return w.detach().masked_fill(~mask, 0.0), mask


METHOD = SparseGPT
