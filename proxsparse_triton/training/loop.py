"""The step loop: loss, backward, one fused optimiser step; one host sync a step.

The optimiser is the regulariser: `ProxAdamW` adds the penalty's gradient, clips, updates and applies the prox in one pass over the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from statistics import median

import torch
from torch import Tensor, nn

from ..errors import ConfigError, LearningError
from ..optim.prox_adamw import ProxAdamW
from ..optim.schedules import round_up, warmup_linear
from ..progress import SILENT, Progress
from .batches import Batch, batches
from .loss import NextTokenLoss
from .memory import checkpointing
from .passes import Passes, one_text_a_window
from .watch import MaskWatch, Pace


@dataclass(frozen=True)
class LoopConfig:
    """Linear warm-up then linear decay of the learning rate over a number of passes, or of steps."""

    lr: float | None = None  # the peak; None: each group of the optimiser has its own
    warmup: float = 0.1
    batch_size: int = 1
    epochs: int = 1
    steps: int | None = None  # instead of whole epochs
    checkpointing: bool = False  # of activations: a third more arithmetic, the activations of one decoder block instead of all
    cuda_graph: bool = True  # forward and backward pass, where that is possible and pays; see `Passes`
    release_gradients: bool = False  # each weight is stepped inside the backward pass; needs an optimiser without max_norm

    @property
    def capturable(self) -> bool:
        """A released gradient is used in the backward pass, with numbers that change; checkpointing looks at the random state."""
        return self.cuda_graph and not (self.release_gradients or self.checkpointing)

    def __post_init__(self) -> None:
        if self.lr is not None and not (math.isfinite(self.lr) and self.lr > 0):
            raise ConfigError(f"learning: expected a finite lr > 0, got {self.lr}. Choose another value.")
        for name in ("batch_size", "epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"learning: expected {name} >= 1, got {getattr(self, name)}. Choose another value.")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"learning: expected steps >= 1, got {self.steps}. Choose another value.")
        if self.steps is not None and self.epochs != 1:
            raise ConfigError(f"learning: expected --steps or --epochs, got both ({self.steps} and {self.epochs}). Leave one out.")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"learning: expected 0 <= warmup < 1, got {self.warmup}. The paper uses 0.1.")


def steps_of(windows: int, config: LoopConfig) -> int:
    """Number of optimiser steps."""
    return config.steps or math.ceil(windows / config.batch_size) * config.epochs


def learn(
    model: nn.Module,
    windows: Sequence[Tensor],
    optimizer: ProxAdamW,
    config: LoopConfig,
    loss_of: Callable[[Batch], Tensor] | None = None,
    watch: MaskWatch | None = None,
    *,
    seed: int = 42,
    progress: Progress = SILENT,
    record: Callable[[Mapping[str, object]], None] = lambda row: None,
) -> None:
    """Trains `model` in place on `windows` (CPU token windows), the parameters of `optimizer`, `record`ing one row a step.

    Args: loss_of: of a batch on the model's device; None: cross-entropy of the next token. watch: looked at now and then.
    Raises: LearningError: the loss or a gradient is not finite; no block of weights has taken a step with such a gradient (with max_norm:
        no weight has taken it), and the message names step and parameter. ConfigError: no activation checkpointing in this model.
    """
    if not windows:
        raise ConfigError("learning: expected at least one window of tokens, got none. Give calibration text.")
    device = next(model.parameters()).device
    steps = steps_of(len(windows), config)
    loss_of = loss_of or NextTokenLoss(model, windows[0].to(device))
    losses: list[float] = []
    pace = None if watch is None else Pace(steps, round_up(config.warmup * steps), watch.masked)
    peaks = [group["lr"] if config.lr is None else config.lr for group in optimizer.param_groups]
    typical = median([peak for peak, group in zip(peaks, optimizer.param_groups, strict=True) if group["prox"]] or peaks)
    passes = Passes(loss_of, [p for p in model.parameters() if p.requires_grad], capture=device.type == "cuda" and config.capturable)
    torch.manual_seed(seed)
    model.train()
    with (
        fast_matmul(device),
        one_text_a_window(),
        checkpointing(model, config.checkpointing),
        _gradient_release(optimizer, config.release_gradients),
        _rates(optimizer),
        progress.task("learning the mask", total=steps) as bar,
    ):
        for step, batch in enumerate(_epochs(windows, config, seed)):
            factor = warmup_linear(step, steps, config.warmup)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            loss = passes(batch.to(device))
            if not config.release_gradients:
                _complete_gradients(optimizer)
            optimizer.step()
            look = watch is not None and ((step + 1) % watch.every == 0 or step + 1 == steps)
            values, layers, changes = _figures(loss, optimizer, watch if look else None)
            _check_finite(step, steps, values, model, optimizer)
            optimizer.zero_grad(set_to_none=True)
            seen = {"mask_changes": changes} if look else {}
            row: dict[str, object] = {"step": step + 1, **values, "lr": typical * factor, "layers": layers, **seen}
            losses.append(values["loss"])
            if pace is not None and (warnings := pace.warnings(values["share_24"], losses)):
                row["warnings"] = warnings
                progress.note("\n".join(warnings))
            record(row)
            bar.advance(loss=f"{values['loss']:.3f}", sparse=f"{100 * values['share_24']:.1f}%")
    model.eval()


def _figures(loss: Tensor, optimizer: ProxAdamW, watch: MaskWatch | None) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Figures of the step, the share of 2:4 blocks of each layer after it, and what changed of its mask: the step's only wait."""
    figures = optimizer.figures()
    changes = {} if watch is None else watch.changes()
    parts: tuple[dict[str, Tensor], ...] = (
        {"loss": loss, "penalty": figures.penalty, "grad_norm": figures.norm, "share_24": figures.share_24},
        figures.shares,
        changes,
    )
    values = iter(torch.stack([scalar.double() for part in parts for scalar in part.values()]).tolist())
    numbers, layers, changed = ({name: next(values) for name in part} for part in parts)
    return numbers, layers, changed


def _complete_gradients(optimizer: ProxAdamW) -> None:
    """Zeros for weights that the loss did not reach (experts without a token): penalty, prox and shares are of all layers. Not where
    gradients are released: there nothing calls the step of a weight without one."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["prox"] else ():
            if parameter.grad is None and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)


def _epochs(windows: Sequence[Tensor], config: LoopConfig, seed: int) -> Iterator[Batch]:
    """Batches of all steps: the first pass in the given order (calibration windows come shuffled), later ones reshuffled."""
    return islice(_passes(windows, config, seed), steps_of(len(windows), config))


def _passes(windows: Sequence[Tensor], config: LoopConfig, seed: int) -> Iterator[Batch]:
    for epoch in count():
        generator = torch.Generator().manual_seed(seed + epoch)
        order: Iterable[int] = range(len(windows)) if epoch == 0 else torch.randperm(len(windows), generator=generator).tolist()
        yield from batches([windows[i] for i in order], config.batch_size)


def _check_finite(step: int, steps: int, values: Mapping[str, float], model: nn.Module, optimizer: ProxAdamW) -> None:
    if all(math.isfinite(value) for value in values.values()):
        return
    cause = None
    try:
        optimizer.check()
    except LearningError as error:
        cause = error
    broken = [name for name, p in model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
    broken = broken or [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    if broken or cause is None:
        where = broken[0] if broken else "no single parameter"
        advice = "Lower --lr or --lambda2, raise --frozen-eps, or learn with --dtype float32."
        where = f", first seen in {where}. {advice}"
    else:  # the gradients are gone, or finite without the penalty's: only the optimiser knows
        where = f": {cause}"
    raise LearningError(
        f"learning: expected finite losses and gradients, got loss {values['loss']:g}, penalty {values['penalty']:g}, "
        f"gradient norm {values['grad_norm']:g} at step {step + 1} of {steps}{where}"
    ) from cause


@contextmanager
def _rates(optimizer: ProxAdamW) -> Iterator[None]:
    """Afterwards every group has the learning rate that it came with: the next run starts from it."""
    before = [group["lr"] for group in optimizer.param_groups]
    try:
        yield
    finally:
        for group, lr in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = lr


@contextmanager
def _gradient_release(optimizer: ProxAdamW, enabled: bool) -> Iterator[None]:
    if not enabled:
        yield
        return
    handle = optimizer.release_gradients()
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def fast_matmul(device: torch.device) -> Iterator[None]:
    """fp32 matrix products on the tensor cores (TF32) while learning on a GPU; the setting is put back afterwards."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
