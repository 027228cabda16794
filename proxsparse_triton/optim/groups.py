"""What a param group of ProxAdamW may hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, ShapeError
from ..ops.dispatch import check_strength
from .parameters import OPTIMIZER, Parameter
from .state import Precision, check_parameter

NUMBERS = ("lr", "eps", "weight_decay", "lambda1", "lambda2", "frozen_eps")
SETTINGS = (*NUMBERS, "betas", "prox", "column_scale")
# A name is for the reader; the others are what torch's schedulers keep in a group.
LABELS = ("params", "param_names", "name", "initial_lr", "max_lr", "min_lr", "swa_lr", "max_momentum", "base_momentum")


def check_keys(group: dict[str, Any]) -> None:
    """ConfigError for a key that no step would look at: a setting of another optimizer, a misspelt one, or one of the whole optimizer."""
    unknown = [key for key in group if key not in SETTINGS and key not in LABELS]
    if unknown:
        raise ConfigError(
            f"{OPTIMIZER}: expected settings of a group ({', '.join(SETTINGS)}), got {', '.join(map(repr, unknown))}. "
            "Leave it out, or give what holds for all groups to the constructor."
        )


def check_numbers(group: dict[str, Any]) -> None:
    """ConfigError unless every number of the group is in its range."""
    for name in NUMBERS:
        try:
            value = float(group[name])
        except (TypeError, ValueError):
            value = group[name]
        check_strength(OPTIMIZER, name, value, positive=name == "frozen_eps")
    betas = group["betas"]
    if not hasattr(betas, "__len__") or len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ConfigError(f"{OPTIMIZER}: expected two betas in [0, 1), got {betas!r}. AdamW's are (0.9, 0.999).")


def check_group(group: dict[str, Any], items: Sequence[Parameter], precision: Precision) -> None:
    """Raises TypeError, ConfigError or ShapeError unless a new group and its parameters can be stepped."""
    check_keys(group)
    check_numbers(group)
    for item in items:
        if group["prox"]:
            check_parameter(item.name, item.p, precision)
            check_scale(item)
        elif not item.p.is_floating_point():
            raise TypeError(f"{OPTIMIZER}: expected real floating parameters, got {item.p.dtype} in {item.name}. Leave it out.")


def check_scale(item: Parameter) -> None:
    """Raises unless the column scale of a prox parameter's group is None or fits it."""
    scale, p = item.group["column_scale"], item.p
    if scale is None:
        return
    if not isinstance(scale, Tensor) or not scale.is_floating_point():
        actual = scale.dtype if isinstance(scale, Tensor) else type(scale).__name__
        raise TypeError(f"{OPTIMIZER}: expected a floating tensor as column_scale for {item.name}, got {actual}. Convert it first.")
    if tuple(scale.shape) != (p.shape[-1],):
        raise ShapeError(
            f"{OPTIMIZER}: expected column_scale of shape {(p.shape[-1],)} for {item.name}, got {tuple(scale.shape)}. "
            "Give each weight a group of its own."
        )


def check_step(item: Parameter, device: torch.device) -> None:
    """Raises unless a parameter and its gradient can be stepped beside the others on `device`: before a tensor is changed."""
    p, grad, scale = item.p, item.p.grad, item.group["column_scale"]
    if p.device != device:
        raise ConfigError(f"{OPTIMIZER}: expected all parameters on {device}, got {item.name} on {p.device}. Use one optimizer a device.")
    if grad is None or grad.layout != torch.strided:
        layout = None if grad is None else grad.layout
        raise TypeError(f"{OPTIMIZER}: expected a dense gradient of {item.name}, got {layout}. Use embeddings with sparse=False.")
    if grad.dtype != p.dtype and not (item.group["prox"] and grad.dtype == torch.float32):
        raise TypeError(f"{OPTIMIZER}: expected a gradient of {item.name} in {p.dtype}, got {grad.dtype}. Convert it first.")
    if item.group["prox"] and scale is not None:
        check_scale(item)
        if scale.device != device:
            raise ConfigError(f"{OPTIMIZER}: expected column_scale of {item.name} on {device}, got {scale.device}. Move it.")
