"""ProxSparse: learn a copy of the weights under the 2:4 regulariser, keep only which two of every four survive.

Source: Liu et al. 2025 (arXiv 2502.00258), Algorithm 1; docs/math.md.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from ..errors import ConfigError, ModelError
from ..optim.prox_adamw import ProxAdamW
from ..training import memory
from ..training.loop import LoopConfig, learn, steps_of
from .base import PruneResult, PruneTask
from .magnitude import magnitude_mask

Moments = Literal["float32", "bfloat16", "int8"]
ClipMode = Literal["total", "loss", "none"]

# Dimensionless strengths of the published Llama-2-7B setting: lambda1 * steps * sigma and lr * steps / sigma, sigma the rms of the pruned
# weights. Used where no lambda1 or lr is given: a number tuned for one model and step count is wrong for another.
DEFAULT_STRENGTH = 2.0
DEFAULT_TRAVEL = 2.0


def default_precision(parameters: int, dtype: torch.dtype) -> tuple[int, Moments]:
    """(weight_bits, moments) of a model with so many parameters: exact while memory is no question, then what costs least quality."""
    if dtype != torch.bfloat16:
        return 32, "float32"
    if parameters < 1e9:
        return 24, "float32"
    return (16, "bfloat16") if parameters < 1e10 else (16, "int8")


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
    clip_mode: ClipMode = "total"  # the norm of which gradient; "none": no clipping, and each gradient is freed once it is used
    batch_size: int = 1
    epochs: int = 1
    weight_bits: int | None = None  # kept of bf16 weights; None: default_precision
    moments: Moments | None = None  # None: default_precision
    checkpointing: bool | None = None  # of activations; None: where the step would not fit into the GPU without

    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("lambda1", "lambda2"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"proxsparse: expected a finite {name} >= 0, got {value}. Choose another --{name}.")
        for name in ("frozen_eps", "clip"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                option = f"--{name.replace('_', '-')}"
                raise ConfigError(f"proxsparse: expected a finite {name} > 0, got {getattr(self, name)}. Choose another {option}.")
        for name, choices in (
            ("clip_mode", ("total", "loss", "none")),
            ("weight_bits", (16, 24, 32, None)),
            ("moments", ("float32", "bfloat16", "int8", None)),
        ):
            if getattr(self, name) not in choices:
                option, rule = f"--{name.replace('_', '-')}", ", ".join(str(choice) for choice in choices if choice is not None)
                raise ConfigError(f"proxsparse: expected {name} to be one of {rule}, got {getattr(self, name)!r}. Choose another {option}.")
        self.loop_config(1.0 if self.lr is None else self.lr)  # its own checks, before any work

    def loop_config(self, lr: float, *, checkpointing: bool = False) -> LoopConfig:
        return LoopConfig(
            lr=lr,
            warmup=self.warmup,
            batch_size=self.batch_size,
            epochs=self.epochs,
            checkpointing=checkpointing,
            release_gradients=self.clip_mode == "none",
        )

    def precision(self, model: nn.Module) -> tuple[int, Moments]:
        """(weight_bits, moments) for this model: what was asked for, else the default for its size and dtype.

        Raises: ConfigError: low bits of weights that are not bf16.
        """
        dtype = next(model.parameters()).dtype
        weight_bits, moments = default_precision(sum(p.numel() for p in model.parameters()), dtype)
        if dtype != torch.bfloat16 and self.weight_bits not in (None, 32):
            raise ConfigError(
                f"proxsparse: expected --weight-bits {self.weight_bits} with bf16 weights only, got {dtype}. "
                "Learn with --dtype bfloat16, or leave it out."
            )
        return self.weight_bits or weight_bits, self.moments or moments

    def memory_of_step(
        self, model: nn.Module, pruned: Collection[str], seqlen: int, *, checkpointing: bool, stored: torch.dtype | None = None
    ) -> memory.StepMemory:
        """Memory and arithmetic of one step, from `memory.meta_model`.

        Args:
            pruned: parameter names of the weights to prune.
            stored: dtype of the weights in their file; W0 is kept in bf16 where that loses nothing. None: the model's.
        Raises: ModelError: the step cannot be counted. ConfigError: no activation checkpointing in this model.
        """
        weight_bits, moments = self.precision(model)
        pretrained = (stored or next(model.parameters()).dtype) if self.lambda2 > 0 else None
        kept = memory.resident(model, pruned, memory.Storage(weight_bits, moments, pretrained))
        step = memory.trace_step(model, self.batch_size, seqlen, checkpoint=checkpointing, release=self.clip_mode == "none")
        return memory.StepMemory(kept, step)

    def needs_checkpointing(self, model: nn.Module, pruned: Collection[str], seqlen: int, limit: int | None) -> bool:
        """Whether a step keeps within `limit` bytes (None: no limit) only with activation checkpointing, which costs a third more time.

        Args: model: a `memory.meta_model`.
        """
        if self.checkpointing is not None:
            return self.checkpointing
        if limit is None or not memory.supports_checkpointing(model):
            return False
        return not memory.fits(self.memory_of_step(model, pruned, seqlen, checkpointing=False).peak, limit)

    def _checkpointing(self, task: PruneTask) -> bool:
        """The same decision for a real model; where its steps cannot be counted, the careful one."""
        limit = task.memory
        device = next(task.model.parameters()).device
        if limit is None and device.type == "cuda":
            limit = torch.cuda.get_device_properties(device).total_memory
        if self.checkpointing is not None or limit is None or not memory.supports_checkpointing(task.model):
            return bool(self.checkpointing)
        seqlen = max(len(window) for window in task.windows)
        try:
            twin = memory.meta_model(task.model.config, next(task.model.parameters()).dtype, kind=type(task.model))
            return self.needs_checkpointing(twin, list(task.linears()), seqlen, limit)
        except ModelError:
            return True

    def optimizer(self, model: nn.Module, linears: Mapping[str, nn.Linear], lr: float, lambda1: float, seed: int) -> ProxAdamW:
        """ProxAdamW over all trainable parameters: the selected weights with the prox, the others (embeddings, norms, head) without."""
        weight_bits, moments = self.precision(model)
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [pair for pair in trainable if pair[0] in linears], "prox": True},
            {"params": [pair for pair in trainable if pair[0] not in linears], "prox": False},
        ]
        return ProxAdamW(
            [group for group in groups if group["params"]],
            lr=lr,
            lambda1=lambda1,
            lambda2=self.lambda2,
            frozen_eps=self.frozen_eps,
            max_norm=None if self.clip_mode == "none" else self.clip,
            clip="loss" if self.clip_mode == "loss" else "total",
            weight_bits=weight_bits,
            moments=moments,
            seed=seed,
        )

    def prune(self, task: PruneTask) -> PruneResult:
        linears = task.linears()
        sigma = rms(linears)
        if not (math.isfinite(sigma) and sigma > 0):
            raise ModelError(
                f"proxsparse: expected finite weights that are not all zero, got a root mean square of {sigma}. Check the model."
            )
        steps = steps_of(len(task.windows), self.loop_config(1.0))
        lr = DEFAULT_TRAVEL * sigma / steps if self.lr is None else self.lr
        lambda1 = DEFAULT_STRENGTH / (steps * sigma) if self.lambda1 is None else self.lambda1
        optimizer = self.optimizer(task.model, linears, lr, lambda1, task.seed)
        weight_bits, moments = self.precision(task.model)
        checkpointing = self._checkpointing(task)
        task.progress.note(
            f"proxsparse: {steps} steps, lambda1 {lambda1:.4g}, lambda2 {self.lambda2:.4g}, lr {lr:.4g}, weight rms {sigma:.4g}, "
            f"{weight_bits}-bit weights, {moments} moments{', checkpointing' if checkpointing else ''}"
        )
        learn(
            task.model,
            task.windows,
            optimizer,
            self.loop_config(lr, checkpointing=checkpointing),
            seed=task.seed,
            progress=task.progress,
            record=task.record,
        )
        share = float(optimizer.figures().share_24)
        masks = {name: magnitude_mask(linear.weight) for name, linear in linears.items()}
        return PruneResult(
            masks,
            summary={
                "lambda1": lambda1,
                "lr": lr,
                "steps": steps,
                "weight_rms": sigma,
                "share_24": share,
                "weight_bits": weight_bits,
                "moments": moments,
                "checkpointing": checkpointing,
            },
        )


METHOD = ProxSparse
