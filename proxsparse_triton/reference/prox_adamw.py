"""One optimiser step on one tensor in plain torch: penalty gradient, AdamW, prox and rounding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..sparsity import BLOCK, KEPT
from ..step import AdamState, StepSettings
from .frozen_penalty import residual as penalty_terms
from .prox import prox_24
from .storage import (
    decode_first,
    decode_second,
    encode_first,
    encode_second,
    join_residual,
    random_bits,
    round_bf16,
    split_residual,
)


def prox_adamw(
    w: Tensor,
    grad: Tensor,
    state: AdamState,
    settings: StepSettings,
    w0: Tensor | None,
    column_scale: Tensor | None,
    grad_coef: Tensor | None,
) -> Tensor:
    """p = 2 lambda2 r a (2w - w0);  g = coef (grad + p), or coef grad + p;  AdamW;  w = prox_lambda1(w); all stored rounded, in place.

    Computes in fp32, or fp64 for fp64 weights. Returns fp64 [4]: penalty value, squared norm of the gradient before clipping, number of 2:4
    blocks among those that were stepped, number of blocks left alone because their gradient (its square, for a norm must be) is not finite.
    """
    precision = torch.float64 if w.dtype == torch.float64 else torch.float32
    x = w.to(precision) if state.residual is None else join_residual(w, state.residual)
    m, v = _moments(state, precision)
    loss_grad = grad.to(precision)
    penalty, penalty_grad = torch.zeros((), dtype=torch.float64, device=w.device), torch.zeros_like(x)
    if w0 is not None:
        r, a, slope = penalty_terms(x, w0, settings.frozen_eps)
        penalty = settings.lambda2 * r.double().square().sum()
        penalty_grad = 2 * settings.lambda2 * r * a * slope
    total = loss_grad + penalty_grad
    square = (total if settings.clip_total else loss_grad).square().double().sum()
    coef = torch.ones((), dtype=precision, device=w.device) if grad_coef is None else grad_coef.to(precision)
    g = coef * total if settings.clip_total else coef * loss_grad + penalty_grad

    finite = total.square().isfinite().unflatten(-1, (-1, BLOCK)).all(-1)
    stepped = finite & coef.isfinite()
    kept = stepped.repeat_interleave(BLOCK, -1)
    new_m, new_v, new_x = _adamw(x, m, v, g, settings)
    new_x = prox_24(new_x, settings.lambda1, column_scale=column_scale)
    new_x, new_m, new_v = torch.where(kept, new_x, x), torch.where(kept, new_m, m), torch.where(kept, new_v, v)
    rand16 = random_bits(w, settings.seed, settings.offset) if settings.stochastic else None
    _store_weight(w, new_x, state, rand16, kept)
    _store_moments(new_m, new_v, state, rand16, kept, coef.isfinite())
    sparse = (w.unflatten(-1, (-1, BLOCK)) != 0).sum(-1) <= KEPT
    return torch.stack([penalty, square, (sparse & stepped).sum().double(), (~finite).sum().double()])


def _moments(state: AdamState, precision: torch.dtype) -> tuple[Tensor, Tensor]:
    if state.exp_avg_scale is None or state.exp_avg_sq_scale is None:
        return state.exp_avg.to(precision), state.exp_avg_sq.to(precision)
    return decode_first(state.exp_avg, state.exp_avg_scale), decode_second(state.exp_avg_sq, state.exp_avg_sq_scale)


def _adamw(x: Tensor, m: Tensor, v: Tensor, g: Tensor, s: StepSettings) -> tuple[Tensor, Tensor, Tensor]:
    """torch.optim.AdamW's step: (m, v, x)."""
    m = m.lerp(g, 1 - s.beta1)
    v = (v * s.beta2).addcmul(g, g, value=1 - s.beta2)
    denominator = v.sqrt() / math.sqrt(1 - s.beta2**s.step) + s.eps
    return m, v, (x * (1 - s.lr * s.weight_decay)).addcdiv(m, denominator, value=-s.lr / (1 - s.beta1**s.step))


def _write(target: Tensor, value: Tensor, kept: Tensor) -> None:
    """In place; where `kept` is False the old bits stay."""
    target.copy_(torch.where(kept, value, target))


def _store_weight(w: Tensor, x: Tensor, state: AdamState, rand16: Tensor | None, kept: Tensor) -> None:
    if state.residual is not None:
        high, low = split_residual(x, state.residual.dtype, None if rand16 is None else rand16 & 0xFF)
        _write(state.residual, low, kept)
        _write(w, high, kept)
    else:
        stored = round_bf16(x, rand16) if w.dtype == torch.bfloat16 else x
        _write(w, torch.where(stored == 0, 0.0, stored), kept)  # a negative number that rounds to zero becomes +0.0 too


def _store_moments(m: Tensor, v: Tensor, state: AdamState, rand16: Tensor | None, kept: Tensor, alive: Tensor) -> None:
    if state.exp_avg_scale is None or state.exp_avg_sq_scale is None:
        low = state.exp_avg.dtype == torch.bfloat16
        for target, value in ((state.exp_avg, m), (state.exp_avg_sq, v)):
            _write(target, round_bf16(value, rand16) if low else value, kept)
        return
    # A group has one scale: the moments of a block left alone keep their value and are coded anew with it.
    uniform = 0.5 if rand16 is None else (rand16 + 0.5) / 65536
    for target, scale, (codes, new_scale) in (
        (state.exp_avg, state.exp_avg_scale, encode_first(m, uniform)),
        (state.exp_avg_sq, state.exp_avg_sq_scale, encode_second(v, uniform)),
    ):
        _write(target, codes, alive)
        _write(scale, new_scale, alive)
