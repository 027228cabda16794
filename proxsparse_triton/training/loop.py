"""The step loop: loss, backward, regulariser, clip, optimiser step, prox; one host sync a step.

A regulariser is anything with the two calls of `Regulariser`; ProxSparse's stands in methods/proxsparse.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..errors import ConfigError, LearningError
from ..optim.schedules import warmup_linear
from ..progress import SILENT, Progress
from .batches import batches, cross_entropy


@dataclass(frozen=True)
class LoopConfig:
    """The paper's recipe: AdamW, linear warm-up then linear decay, one pass over the windows, gradients clipped by norm."""

    lr: float
    warmup: float = 0.1
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8
    batch_size: int = 1
    epochs: int = 1

    def __post_init__(self) -> None:
        for name in ("lr", "clip", "adam_eps"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"learning: expected a finite {name} > 0, got {value}. Choose another value.")
        for name in ("batch_size", "epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"learning: expected {name} >= 1, got {getattr(self, name)}. Choose another value.")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"learning: expected 0 <= warmup < 1, got {self.warmup}. The paper uses 0.1.")


class Regulariser(Protocol):
    def add_gradient(self) -> Tensor | None:
        """Called after backward: adds its gradient to `.grad`, returns its value (scalar on the device) or None."""

    def after_step(self) -> None:
        """Called after each optimiser step: changes the weights in place."""

    def shares(self) -> Mapping[str, Tensor]:
        """Named scalars on the device to record after the step: the share of 2:4 blocks of each layer, and "all" for the whole."""


def steps_of(windows: int, config: LoopConfig) -> int:
    """Number of optimiser steps."""
    return math.ceil(windows / config.batch_size) * config.epochs


def learn(
    model: nn.Module,
    windows: Sequence[Tensor],
    regulariser: Regulariser,
    config: LoopConfig,
    *,
    seed: int = 42,
    progress: Progress = SILENT,
    record: Callable[[Mapping[str, object]], None] = lambda row: None,
) -> None:
    """Trains `model` in place on `windows` (CPU token windows), all parameters, `record`ing one row a step.

    Raises: LearningError: the loss or a gradient is not finite; the optimiser has not seen it, and the message names step and
    parameter.
    """
    device = next(model.parameters()).device
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.lr, betas=config.betas, eps=config.adam_eps, weight_decay=0.0, fused=device.type in ("cpu", "cuda")
    )
    steps = steps_of(len(windows), config)
    torch.manual_seed(seed)
    model.train()
    with _fast_matmul(device), progress.task("learning the mask", total=steps) as bar:
        for step, batch in enumerate(_epochs(windows, config, seed)):
            lr = config.lr * warmup_linear(step, steps, config.warmup)
            optimizer.param_groups[0]["lr"] = lr
            loss = cross_entropy(model, batch.to(device))
            loss.backward()
            penalty = regulariser.add_gradient()
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            zero = torch.zeros((), device=device)
            values = torch.stack([loss.detach().float(), zero if penalty is None else penalty.float(), norm.float()]).tolist()
            _check_finite(step, steps, values, model)
            nn.utils.clip_grads_with_norm_(parameters, config.clip, norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            regulariser.after_step()
            shares = regulariser.shares()
            figures = dict(zip(shares, torch.stack(list(shares.values())).tolist(), strict=True))
            whole = figures.pop("all")
            record(
                {
                    "step": step + 1,
                    "loss": values[0],
                    "penalty": values[1],
                    "grad_norm": values[2],
                    "lr": lr,
                    "share_24": whole,
                    "layers": figures,
                }
            )
            bar.advance(loss=f"{values[0]:.3f}", sparse=f"{100 * whole:.1f}%")
    model.eval()


def _epochs(windows: Sequence[Tensor], config: LoopConfig, seed: int) -> Iterator:  # type: ignore[type-arg]
    """Batches of all epochs: the first in the given order (calibration windows come shuffled), later ones reshuffled."""
    for epoch in range(config.epochs):
        generator = torch.Generator().manual_seed(seed + epoch)
        order: Iterable[int] = range(len(windows)) if epoch == 0 else torch.randperm(len(windows), generator=generator).tolist()
        yield from batches([windows[i] for i in order], config.batch_size)


def _check_finite(step: int, steps: int, values: Sequence[float], model: nn.Module) -> None:
    loss, penalty, norm = values
    if all(math.isfinite(value) for value in values):
        return
    broken = [name for name, p in model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
    if not broken:
        broken = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()] or ["no single parameter"]
    raise LearningError(
        f"learning: expected finite losses and gradients, got loss {loss:g}, penalty {penalty:g}, gradient norm {norm:g} "
        f"at step {step + 1} of {steps}, first seen in {broken[0]}. "
        "Lower --lr or --lambda2, raise --frozen-eps, or learn with --dtype float32."
    )


@contextmanager
def _fast_matmul(device: torch.device) -> Iterator[None]:
    """fp32 matrix products on the tensor cores (TF32) while learning on a GPU; the setting is put back afterwards."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
