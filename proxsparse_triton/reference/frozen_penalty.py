"""The frozen-weight penalty in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def residual(w: Tensor, w0: Tensor, frozen_eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(r, a, (2w - w0)) in fp32 (fp64 for fp64 input), with a = 1 / (w0 + eps sgn(w0)), sgn(0) = +1, r = a w (w - w0)."""
    precision = torch.float64 if w.dtype == torch.float64 else torch.float32
    w, w0 = w.to(precision), w0.to(precision)
    # Not where(w0 < 0, -eps, eps): two Python numbers make an fp32 tensor.
    a = 1 / torch.where(w0 < 0, w0 - frozen_eps, w0 + frozen_eps)
    return a * w * (w - w0), a, 2 * w - w0


def frozen_penalty_value(w: Tensor, w0: Tensor, lam: float, frozen_eps: float) -> Tensor:
    """lam * sum r^2, a scalar."""
    r, _, _ = residual(w, w0, frozen_eps)
    return lam * r.square().sum()


def frozen_penalty_grad(w: Tensor, w0: Tensor, lam: float, frozen_eps: float) -> Tensor:
    """2 lam r a (2w - w0), like w."""
    r, a, slope = residual(w, w0, frozen_eps)
    return (2 * lam * r * a * slope).to(w.dtype)


def accumulate_frozen_penalty(w: Tensor, w0: Tensor, lam: float, frozen_eps: float, grad: Tensor) -> Tensor:
    """Adds the gradient to `grad` in place and returns the value."""
    r, a, slope = residual(w, w0, frozen_eps)
    grad.copy_(grad.to(r.dtype) + 2 * lam * r * a * slope)
    return lam * r.square().sum()


def gradient_square(w: Tensor, w0: Tensor | None, lam: float, frozen_eps: float, grad: Tensor) -> Tensor:
    """sum (grad + 2 lam r a (2w - w0))^2, added up in fp64; without w0: sum grad^2."""
    total = grad.to(torch.float64 if w.dtype == torch.float64 else torch.float32)
    if w0 is not None:
        r, a, slope = residual(w, w0, frozen_eps)
        total = total + 2 * lam * r * a * slope
    return total.square().sum(dtype=torch.float64)
