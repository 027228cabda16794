"""Magnitude pruning: keep the two largest |w| of each block. Needs no text; the baseline of all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..models.selection import LayerPlan
from ..ops import mask_24
from .base import PruneResult, PruneTask


def magnitude_mask(w: Tensor) -> Tensor:
    """The two largest |w| of each block, on the CPU; ties to the highest index.

    In bf16 models some 0.4 % of the blocks tie for the second place and the choice among equals is noise: it moves the
    perplexity of pylm-2m between 74.7 and 78.1. Published baselines take whatever `torch.topk` does; this choice is nearest to
    it (75.2 against 74.7, the lowest index gives 77.4).
    """
    return mask_24(w.detach().abs().flip(-1)).flip(-1).cpu()


@dataclass(frozen=True)
class Magnitude:
    needs_calibration: ClassVar[bool] = False

    def check(self, plan: LayerPlan) -> None:
        """Every layer will do."""

    def prune(self, task: PruneTask) -> PruneResult:
        return PruneResult({name: magnitude_mask(linear.weight) for name, linear in task.linears().items()})


METHOD = Magnitude
