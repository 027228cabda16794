"""The plain-torch step against torch.optim.AdamW, against the chain of separate operations in fp64, and what it leaves alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from proxsparse_triton.reference.frozen_penalty import accumulate_frozen_penalty, gradient_square
from proxsparse_triton.reference.prox import prox_24
from proxsparse_triton.reference.prox_adamw import prox_adamw
from proxsparse_triton.reference.storage import decode_first, decode_second
from proxsparse_triton.sparsity import count_24_blocks
from proxsparse_triton.step import AdamState, StepSettings

SETTINGS = StepSettings(lr=0.01, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, step=1)
NAN, INF = float("nan"), float("inf")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def zero_state(w: Tensor) -> AdamState:
    return AdamState(torch.zeros_like(w), torch.zeros_like(w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_strengths_it_is_adamw(dtype: torch.dtype) -> None:
    w = normal(7, 12, dtype=dtype)
    p = torch.nn.Parameter(w.clone())
    adamw = torch.optim.AdamW([p], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1, foreach=False)
    state = zero_state(w)
    for step in range(1, 21):
        p.grad = normal(7, 12, seed=step, dtype=dtype)
        adamw.step()
        prox_adamw(w, p.grad, state, dataclasses.replace(SETTINGS, step=step), None, None, None)
    assert torch.equal(w, p.detach())
    assert torch.equal(state.exp_avg, adamw.state[p]["exp_avg"])
    assert torch.equal(state.exp_avg_sq, adamw.state[p]["exp_avg_sq"])


@pytest.mark.parametrize("clip_total", [True, False])
@pytest.mark.parametrize("scaled", [False, True])
def test_it_is_the_chain(clip_total: bool, scaled: bool) -> None:
    """fp64: penalty gradient, clipping by norm, AdamW, prox, one after the other."""
    w0 = normal(7, 12, dtype=torch.float64)
    w, state = w0.clone(), zero_state(w0)
    p = torch.nn.Parameter(w0.clone())
    adamw = torch.optim.AdamW([p], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    scale = normal(12, seed=99, dtype=torch.float64).abs() if scaled else None
    for step in range(1, 11):
        grad = normal(7, 12, seed=step, dtype=torch.float64)
        p.grad = grad.clone()
        if clip_total:
            value = accumulate_frozen_penalty(p.detach(), w0, 0.3, 0.1, p.grad)
            norm = torch.nn.utils.clip_grad_norm_([p], 2.0)
        else:
            norm = torch.nn.utils.clip_grad_norm_([p], 2.0)
            value = accumulate_frozen_penalty(p.detach(), w0, 0.3, 0.1, p.grad)
        adamw.step()
        p.data = prox_24(p.detach(), 0.02, column_scale=scale)
        assert norm > 2
        settings = dataclasses.replace(SETTINGS, step=step, lambda1=0.02, lambda2=0.3, clip_total=clip_total)
        penalty, square, blocks, bad = prox_adamw(w, grad, state, settings, w0, scale, 2.0 / (norm + 1e-6))
        torch.testing.assert_close(w, p.detach(), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(penalty, value, rtol=1e-12, atol=0)
        torch.testing.assert_close(square.sqrt(), norm, rtol=1e-12, atol=0)
        assert (blocks, bad) == (count_24_blocks(p), 0)
    assert 0 < count_24_blocks(w) < 21


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e30])
def test_a_block_without_finite_gradient_is_left_alone(value: float) -> None:
    """1e30: its square overflows fp32, so v would."""
    w, grad = normal(3, 8), normal(3, 8, seed=1)
    state = AdamState(normal(3, 8, seed=2), normal(3, 8, seed=3).square())
    expected = [x.clone() for x in (w, state.exp_avg, state.exp_avg_sq)]
    prox_adamw(*(expected[0], grad, AdamState(*expected[1:]), SETTINGS), None, None, None)
    before = [x.clone() for x in (w, state.exp_avg, state.exp_avg_sq)]
    grad[1, 6] = value
    statistics = prox_adamw(w, grad, state, SETTINGS, None, None, None)
    assert statistics[3] == 1
    assert not statistics[1].isfinite()
    for now, old, new in zip((w, state.exp_avg, state.exp_avg_sq), before, expected, strict=True):
        assert torch.equal(now[1, 4:], old[1, 4:])
        now[1, 4:] = new[1, 4:]
        assert torch.equal(now, new)


def test_eight_bit_moments_beside_a_broken_block() -> None:
    """The scale of a group follows its other blocks; what is left alone keeps its value up to the rounding of the new codes."""
    w = normal(1, 128)
    state = AdamState(
        torch.zeros(1, 128, dtype=torch.int8), torch.zeros(1, 128, dtype=torch.uint8), torch.zeros(1), torch.zeros(1)
    )  # fmt: skip
    prox_adamw(w, normal(1, 128, seed=1), state, SETTINGS, None, None, None)
    m, v = decode_first(state.exp_avg, state.exp_avg_scale), decode_second(state.exp_avg_sq, state.exp_avg_sq_scale)
    grad = 3 * normal(1, 128, seed=2)
    grad[0, 0] = NAN
    prox_adamw(w, grad, state, dataclasses.replace(SETTINGS, step=2), None, None, None)
    after = decode_first(state.exp_avg, state.exp_avg_scale), decode_second(state.exp_avg_sq, state.exp_avg_sq_scale)
    torch.testing.assert_close(after[0][0, :4], m[0, :4], rtol=0.02, atol=float(state.exp_avg_scale) * 0.008)
    torch.testing.assert_close(after[1][0, :4], v[0, :4], rtol=0.05, atol=float(state.exp_avg_sq_scale) * 0.008)
    assert not torch.equal(after[0][0, 4:], m[0, 4:])


def test_gradient_square() -> None:
    w, w0, grad = normal(7, 12), normal(7, 12, seed=1), normal(7, 12, seed=2)
    total = grad.double()
    torch.testing.assert_close(gradient_square(w, None, 0.3, 0.1, grad).double(), total.square().sum(), rtol=1e-6, atol=0)
    accumulate_frozen_penalty(w.double(), w0.double(), 0.3, 0.1, total)
    result = gradient_square(w, w0, 0.3, 0.1, grad)
    assert (result.dtype, result.shape) == (torch.float64, torch.Size([]))
    torch.testing.assert_close(result.double(), total.square().sum(), rtol=1e-5, atol=0)
