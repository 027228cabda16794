"""Wanda: keep the two largest |w_ij| * ||x_j|| of each block, block by block on the inputs of the pruned model.

Source: Sun et al. 2023 (arXiv 2306.11695).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..models.selection import LayerPlan
from ..models.statistics import InputNorm
from ..ops import mask_24
from .base import PruneResult, PruneTask, check_inside_blocks
from .magnitude import magnitude_mask
from .walk import BY_MAGNITUDE, taken, walk


def wanda_scores(w: Tensor, input_norm: Tensor) -> Tensor:
    """|w_ij| * ||x_j||_2, fp32; w [out, in], input_norm [in]."""
    return w.detach().float().abs() * input_norm


@dataclass(frozen=True)
class Wanda:
    needs_calibration: ClassVar[bool] = True

    def check(self, plan: LayerPlan) -> None:
        check_inside_blocks(plan, "wanda", "--method magnitude or proxsparse")

    def prune(self, task: PruneTask) -> PruneResult:
        self.check(task.plan)
        masks: dict[str, Tensor] = {}
        for linears, norms in walk(task, "wanda", "wanda", InputNorm, otherwise=BY_MAGNITUDE):
            for name, linear in linears.items():
                norm = taken(norms, name)
                mask = magnitude_mask(linear.weight) if norm is None else mask_24(wanda_scores(linear.weight, norm)).cpu()
                masks[name] = mask
                with torch.no_grad():
                    linear.weight.masked_fill_(~mask.to(linear.weight.device), 0.0)
        return PruneResult(masks)


METHOD = Wanda
