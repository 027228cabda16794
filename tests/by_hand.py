"""The distance from the dense model in fp64 and by torch's own functions: the oracle of all that learns from it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def divergence(logits: Tensor, target: Tensor, real: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Args: logits, target: [N, vocabulary]. real: bool [N], the positions that count; None: all."""
    if real is None:
        real = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    log_p, log_p0 = (F.log_softmax(z[real].double() / temperature, -1) for z in (logits, target))
    return F.kl_div(log_p, log_p0, log_target=True, reduction="sum") * temperature**2 / real.sum()


def layer_errors(states: Iterable[Tensor], targets: Iterable[Tensor], real: Tensor | None = None) -> Tensor:
    """Args: states, targets: [..., width] of each layer. real: bool [N], the positions that count; None: all."""
    pairs = [(h.flatten(0, -2).double(), h0.flatten(0, -2).double()) for h, h0 in zip(states, targets, strict=True)]
    each = torch.stack([(h - h0).square().sum(-1) / h0.square().sum(-1) for h, h0 in pairs])
    return (each if real is None else each[:, real]).mean(1).sum()


def distance(out: Any, dense: Any, real: Tensor | None = None, *, temperature: float = 1.0, layer_weight: float = 1.0) -> Tensor:
    """Of what two models return for the same tokens with `output_hidden_states`. The defaults are those of the loss."""
    logits, target = (some.logits.flatten(0, 1) for some in (out, dense))
    errors = layer_errors(out.hidden_states[1:], dense.hidden_states[1:], real)
    return divergence(logits, target, real, temperature) + layer_weight * errors
