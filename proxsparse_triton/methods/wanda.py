"""Wanda: keep the two largest |w_ij| * ||x_j|| of each block, block by block on the inputs of the pruned model.

Source: Sun et al. 2023 (arXiv 2306.11695).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..models.layerwise import BlockWalker
from ..models.selection import LayerPlan, decoder_blocks
from ..models.statistics import InputNorm, observe
from ..ops import mask_24
from .base import PruneResult, PruneTask, check_inside_blocks
from .magnitude import magnitude_mask


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
        _, blocks = decoder_blocks(task.model)
        walker = BlockWalker(task.model, blocks, task.windows)
        masks: dict[str, Tensor] = {}
        with task.progress.task("wanda: decoder blocks", total=len(blocks)) as bar:
            for index, _ in walker:
                linears = task.linears_of(index)
                norms = {name: InputNorm(linear) for name, linear in linears.items()}
                with observe(linears, norms):
                    walker.forward(index)
                for name, linear in linears.items():
                    norm = norms[name].value()
                    if norm.any():
                        masks[name] = mask_24(wanda_scores(linear.weight, norm)).cpu()
                    else:
                        task.unseen(name)
                        masks[name] = magnitude_mask(linear.weight)
                    with torch.no_grad():
                        linear.weight.masked_fill_(~masks[name].to(linear.weight.device), 0.0)
                bar.advance()
        return PruneResult(masks)


METHOD = Wanda
