"""The plain-torch penalty against autograd of the formula as the paper writes it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from proxsparse_triton.reference.frozen_penalty import (
    accumulate_frozen_penalty,
    frozen_penalty_grad,
    frozen_penalty_value,
)


def as_written(w: Tensor, w0: Tensor, lam: float, eps: float) -> Tensor:
    """lam || W / (W0 + eps sgn(W0)) * (W - W0) ||_F^2 with sgn(0) = +1."""
    sign = torch.where(w0 >= 0, 1.0, -1.0).to(w.dtype)
    return lam * (w / (w0 + eps * sign) * (w - w0)).norm() ** 2


@pytest.fixture
def weights() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    w0 = torch.randn(7, 12, generator=generator, dtype=torch.float64)
    w0[0, :4] = torch.tensor([0.0, -0.0, 1e-8, -1e-8])
    return w0 + 0.1 * torch.randn(7, 12, generator=generator, dtype=torch.float64), w0


@pytest.mark.parametrize("eps", [0.01, 0.5])
def test_value_and_gradient_are_autograds(weights: tuple[Tensor, Tensor], eps: float) -> None:
    w, w0 = weights
    w = w.requires_grad_()
    value = as_written(w, w0, 0.25, eps)
    (gradient,) = torch.autograd.grad(value, w)
    torch.testing.assert_close(frozen_penalty_value(w.detach(), w0, 0.25, eps), value.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(frozen_penalty_grad(w.detach(), w0, 0.25, eps), gradient, rtol=1e-10, atol=1e-12)


def test_double_well(weights: tuple[Tensor, Tensor]) -> None:
    """Zero with zero slope at w = 0 and at w = w0; the barrier's top is half way."""
    _, w0 = weights
    for w in (torch.zeros_like(w0), w0):
        assert frozen_penalty_value(w, w0, 1.0, 0.1) == 0
        assert (frozen_penalty_grad(w, w0, 1.0, 0.1) == 0).all()
    assert (frozen_penalty_grad(w0 / 2, w0, 1.0, 0.1) == 0).all()
    assert frozen_penalty_value(w0 / 2, w0, 1.0, 0.1) > frozen_penalty_value(w0 / 4, w0, 1.0, 0.1) > 0


def test_accumulate_adds(weights: tuple[Tensor, Tensor]) -> None:
    w, w0 = weights
    grad = torch.full_like(w, 3.0)
    value = accumulate_frozen_penalty(w, w0, 0.25, 0.5, grad)
    assert value == frozen_penalty_value(w, w0, 0.25, 0.5)
    torch.testing.assert_close(grad, 3 + frozen_penalty_grad(w, w0, 0.25, 0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_fp32(weights: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    w, w0 = (x.to(dtype) for x in weights)
    assert frozen_penalty_value(w, w0, 1.0, 0.1).dtype == torch.float32
    assert torch.equal(frozen_penalty_value(w, w0, 1.0, 0.1), frozen_penalty_value(w.float(), w0.float(), 1.0, 0.1))
    assert torch.equal(frozen_penalty_grad(w, w0, 1.0, 0.1), frozen_penalty_grad(w.float(), w0.float(), 1.0, 0.1).to(dtype))
