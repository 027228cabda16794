"""Losses that form value and gradient together, so that what lies between them need not be kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError


class GradientsInForward(torch.autograd.Function):
    """The backward pass of functions whose forward pass leaves `ctx.gradients`, those of its first inputs, and `ctx.name`, for messages.

    Gradients may be kept in a wider dtype than the inputs have: fp16 cannot hold them before a loss scale has reached them.
    """

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # The only reference is given away: autograd can then keep the tensor as `.grad` instead of a copy of it.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise ConfigError(f"{ctx.name}: expected one backward pass, got a second. Compute the loss again.")
        rest = len(ctx.needs_input_grad) - len(gradients)
        return (*(None if gradient is None else gradient.mul_(upstream) for gradient in gradients), *(None,) * rest)  # autograd casts


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which a gradient waits for the backward pass: the tensor's own, but fp32 for fp16, which rounds most of them to zero."""
    return torch.float32 if dtype == torch.float16 else dtype
