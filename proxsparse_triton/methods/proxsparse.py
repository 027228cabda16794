"""ProxSparse: learn a copy of the weights under the 2:4 regulariser, keep only which two of every four survive.

Source: Liu et al. 2025 (arXiv 2502.00258), Algorithm 1; docs/math.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import ConfigError, ModelError
from ..ops import accumulate_frozen_penalty, prox_24
from ..sparsity import BLOCK, count_24_blocks
from ..training.loop import LoopConfig, learn, steps_of
from .base import PruneResult, PruneTask
from .magnitude import magnitude_mask

# Dimensionless strengths of the published Llama-2-7B setting: lambda1 * steps * sigma and lr * steps / sigma, sigma the rms of the pruned
# weights. Used where no lambda1 or lr is given: a number tuned for one model and step count is wrong for another.
DEFAULT_STRENGTH = 2.0
DEFAULT_TRAVEL = 2.0


class ProxRegulariser:
    """lambda1 by the prox after each step, lambda2 by its closed-form gradient; works on the weights of `linears` in place."""

    def __init__(self, linears: Mapping[str, nn.Linear], lambda1: float, lambda2: float, frozen_eps: float) -> None:
        self._weights: dict[str, Tensor] = {name: linear.weight for name, linear in linears.items()}
        self._lambda1, self._lambda2, self._frozen_eps = lambda1, lambda2, frozen_eps
        self._blocks = {name: w.numel() // BLOCK for name, w in self._weights.items()}
        # The pretrained weights are only needed by lambda2; without it they stay in their file.
        self._w0 = {name: w.detach().clone() for name, w in self._weights.items()} if lambda2 > 0 else {}

    def add_gradient(self) -> Tensor | None:
        if not self._w0:
            return None
        values = []
        for name, w in self._weights.items():
            if w.grad is None:
                w.grad = torch.zeros_like(w)
            values.append(accumulate_frozen_penalty(w, self._w0[name], self._lambda2, self._frozen_eps, w.grad))
        return torch.stack(values).sum()

    def after_step(self) -> None:
        for w in self._weights.values():
            prox_24(w.data, self._lambda1, out=w.data)

    def shares(self) -> dict[str, Tensor]:
        counts = {name: count_24_blocks(w.detach()) for name, w in self._weights.items()}
        shares = {name: count / self._blocks[name] for name, count in counts.items()}
        shares["all"] = torch.stack(list(counts.values())).sum() / sum(self._blocks.values())
        return shares


def rms(weights: Mapping[str, nn.Linear]) -> float:
    """Root mean square over all weights together."""
    squares = torch.stack([linear.weight.detach().float().square().sum() for linear in weights.values()]).double().sum()
    return math.sqrt(float(squares) / sum(linear.weight.numel() for linear in weights.values()))


@dataclass(frozen=True)
class ProxSparse:
    """Settings of Algorithm 1. lambda1 acts after every step and is not multiplied by the learning rate."""

    lambda1: float | None = None  # None: DEFAULT_STRENGTH / (steps * rms)
    lambda2: float = 0.0
    frozen_eps: float = 0.1
    lr: float | None = None  # None: DEFAULT_TRAVEL * rms / steps
    warmup: float = 0.1
    clip: float = 1.0
    batch_size: int = 1
    epochs: int = 1

    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("lambda1", "lambda2"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"proxsparse: expected a finite {name} >= 0, got {value}. Choose another --{name}.")
        if not (math.isfinite(self.frozen_eps) and self.frozen_eps > 0):
            raise ConfigError(f"proxsparse: expected a finite frozen_eps > 0, got {self.frozen_eps}. Choose another --frozen-eps.")
        self._loop_config(1.0 if self.lr is None else self.lr)  # its own checks, before any work

    def _loop_config(self, lr: float) -> LoopConfig:
        return LoopConfig(lr=lr, warmup=self.warmup, clip=self.clip, batch_size=self.batch_size, epochs=self.epochs)

    def prune(self, task: PruneTask) -> PruneResult:
        linears = task.linears()
        sigma = rms(linears)
        if not (math.isfinite(sigma) and sigma > 0):
            raise ModelError(
                f"proxsparse: expected finite weights that are not all zero, got a root mean square of {sigma}. Check the model."
            )
        steps = steps_of(len(task.windows), self._loop_config(1.0))
        lr = DEFAULT_TRAVEL * sigma / steps if self.lr is None else self.lr
        lambda1 = DEFAULT_STRENGTH / (steps * sigma) if self.lambda1 is None else self.lambda1
        task.progress.note(
            f"proxsparse: {steps} steps, lambda1 {lambda1:.4g}, lambda2 {self.lambda2:.4g}, lr {lr:.4g}, weight rms {sigma:.4g}"
        )
        regulariser = ProxRegulariser(linears, lambda1, self.lambda2, self.frozen_eps)
        learn(
            task.model,
            task.windows,
            regulariser,
            self._loop_config(lr),
            seed=task.seed,
            progress=task.progress,
            record=task.record,
        )
        share = float(regulariser.shares()["all"])
        masks = {name: magnitude_mask(linear.weight) for name, linear in linears.items()}
        return PruneResult(masks, summary={"lambda1": lambda1, "lr": lr, "steps": steps, "weight_rms": sigma, "share_24": share})


METHOD = ProxSparse
