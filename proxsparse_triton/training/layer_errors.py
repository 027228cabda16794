"""How far the hidden states between the decoder blocks are from the dense model's: what the logits say too late for the early layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .gradients import GradientsInForward, gradient_dtype


def layer_errors(hidden: Sequence[Tensor], targets: list[Tensor], real: Tensor | None = None) -> Tensor:
    """sum over layers of `relative_error`. Takes each target out of the list once it is used, so that its memory can be free."""
    total = relative_error(hidden[0], targets.pop(0), real)
    for h in hidden[1:]:
        total = total + relative_error(h, targets.pop(0), real)
    return total


def relative_error(hidden: Tensor, target: Tensor, real: Tensor | None = None) -> Tensor:
    """mean_t ||h_t - h0_t||^2 / ||h0_t||^2; forward and gradient together, so differentiate it once.

    Args: hidden, target: [..., width]; the gradient is that of `hidden` alone. real: bool [N], the positions that count; None: all. Hidden
        states may be several to a position, [copies, ..., width] (Gemma 3n).
    Returns: scalar, fp32 (fp64 for fp64). A position whose target is zero, or squares to a subnormal number, does not count, but is one of
        the mean's.
    """
    error: Tensor = _RelativeError.apply(hidden, target, real)  # type: ignore[no-untyped-call]
    return error


class _RelativeError(GradientsInForward):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, target: Tensor, real: Tensor | None) -> Tensor:
        kind = torch.promote_types(hidden.dtype, torch.float32)
        size = torch.linalg.vector_norm(target, dim=-1, dtype=kind).square()
        if real is None:
            share = torch.ones_like(size) / size.numel()
        else:
            copies = size.numel() // real.numel()
            share = real.to(kind).expand(copies, -1).reshape(size.shape) / (copies * real.sum())
        weight = torch.where(size > torch.finfo(kind).tiny, share / size, 0.0)
        difference = hidden.to(kind) - target
        total: Tensor = (torch.linalg.vector_norm(difference, dim=-1).square() * weight).sum()
        # In the dtype of `hidden`, where that can hold it: what waits for the backward pass is no larger than the target was.
        gradient = difference.mul_(2 * weight[..., None]).to(gradient_dtype(hidden.dtype)) if ctx.needs_input_grad[0] else None
        ctx.name, ctx.gradients = "relative_error", (gradient,)
        return total
