"""The vocabulary of one fused optimiser step: its scalars and the tensors it keeps for one parameter."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from .errors import ConfigError

MOMENT_GROUP = 128  # consecutive weights of the flattened tensor that share the scale of their 8-bit moments


@dataclass(frozen=True)
class StepSettings:
    """Scalars of one fused step for one tensor.

    Raises: ConfigError: a value out of its range.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int  # 1, 2, ... (bias correction)
    lambda1: float = 0.0
    lambda2: float = 0.0
    frozen_eps: float = 0.1
    clip_total: bool = True  # the clipping coefficient multiplies loss gradient + penalty gradient; False: the loss gradient only
    stochastic: bool = False  # how bf16 and 8-bit storage is rounded; False: to nearest even
    seed: int = 0  # 64-bit key of the random bits, already mixed from (seed, step, parameter)
    offset: int = 0  # global index of the tensor's first block (of a shard within its full tensor)

    def __post_init__(self) -> None:
        rules = (
            ("lr", self.lr, "finite and >= 0", 0 <= self.lr < math.inf),
            ("beta1", self.beta1, "in [0, 1)", 0 <= self.beta1 < 1),
            ("beta2", self.beta2, "in [0, 1)", 0 <= self.beta2 < 1),
            ("eps", self.eps, "finite and >= 0", 0 <= self.eps < math.inf),
            ("weight_decay", self.weight_decay, "finite and >= 0", 0 <= self.weight_decay < math.inf),
            ("step", self.step, ">= 1", self.step >= 1),
            ("lambda1", self.lambda1, "finite and >= 0", 0 <= self.lambda1 < math.inf),
            ("lambda2", self.lambda2, "finite and >= 0", 0 <= self.lambda2 < math.inf),
            ("frozen_eps", self.frozen_eps, "finite and > 0", 0 < self.frozen_eps < math.inf),
            ("seed", self.seed, "in [0, 2^64)", 0 <= self.seed < 1 << 64),
            ("offset", self.offset, ">= 0", self.offset >= 0),
        )
        for name, value, rule, kept in rules:
            if not kept:
                raise ConfigError(f"StepSettings: expected {name} {rule}, got {value!r}. Choose another value.")


@dataclass(frozen=True)
class AdamState:
    """Tensors of one parameter, updated in place. Moments are fp32 (fp64 for fp64 weights), bf16, or 8-bit codes with scales."""

    exp_avg: Tensor  # like w; int8 codes m = scale sgn(c) (|c| / 127)^2
    exp_avg_sq: Tensor  # like w; uint8 codes v = scale (c / 255)^4
    exp_avg_scale: Tensor | None = None  # fp32 [ceil(numel / MOMENT_GROUP)], for 8-bit codes only
    exp_avg_sq_scale: Tensor | None = None
    residual: Tensor | None = None  # int8 or int16 like w: the low bits of a bf16 weight
