"""`prox_24` in plain torch: the readable twin of the kernel, and the slow oracle that both are tested against."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..sparsity import BLOCK, KEPT
from .block import objective, solve

MIN_SCALE = 1e-20  # column scales below this (dead input features) are read as this
NEGLIGIBLE = 1e-12  # below this lam * |z| the shrinkage is far under half an ulp of fp64: the block is returned as it is


def prox_24(z: Tensor, lam: float, *, column_scale: Tensor | None = None) -> Tensor:
    """argmin_w 1/2 ||w - z||^2 + lam R(w) for every block of z [..., in_features]; with `column_scale` c applied to c*z and divided back.

    Computes in fp32, or fp64 for fp64 input. A block with a NaN comes back all NaN.
    """
    if lam == 0:
        return z.clone()
    precision = torch.float64 if z.dtype == torch.float64 else torch.float32
    magnitude = z.to(precision).abs()
    scale = torch.ones((), dtype=precision, device=z.device) if column_scale is None else column_scale.to(precision).clamp_min(MIN_SCALE)
    blocks = (magnitude * scale).unflatten(-1, (-1, BLOCK))
    v, order = blocks.sort(dim=-1, descending=True, stable=True)
    u = lam * v
    # Not w / lam but z minus its shrinkage e2(w without i) / lam: a kept weight that does not shrink stays the same bit for bit.
    # The clamp keeps infinities out of products with zero; a minimum with three or four kept weights has none above 1.
    w = solve(u).clamp_max(2)
    a, b, c, d = w.unbind(-1)
    shrink = torch.stack([b * (c + d) + c * d, a * (c + d) + c * d, d * (a + b) + a * b, c * (a + b) + a * b], -1) / lam
    negligible = u[..., :1] < NEGLIGIBLE
    shrink = torch.where(negligible, 0.0, torch.where(w > 0, shrink, torch.inf))
    shrink = torch.empty_like(shrink).scatter_(-1, order, shrink).flatten(-2) / scale
    # Rounded before it gets its sign: a weight that underflows in fp16 is +0.0 too.
    result = torch.where(shrink < magnitude, magnitude - shrink, 0.0).to(z.dtype)
    result = torch.where((z < 0) & (result > 0), -result, result)
    poisoned = blocks.isnan().any(-1, keepdim=True).expand_as(blocks).flatten(-2)
    return torch.where(poisoned, torch.nan, result)


def prox_24_exhaustive(z: Tensor, lam: float, *, sweeps: int = 200) -> Tensor:
    """The oracle: best of many exact cyclic coordinate descents (Algorithm 2) from every sub-block and from small starts, in fp64.

    Shares no idea with `prox_24` but the objective. Takes seconds for 10,000 blocks; z [..., in_features] -> fp64 of the same shape.
    """
    blocks = z.double().unflatten(-1, (-1, BLOCK))
    magnitude, order = blocks.abs().sort(dim=-1, descending=True, stable=True)
    u = lam * magnitude
    best = u.clone()
    best[..., KEPT:] = 0
    best_value = objective(best, u)
    corners = [u * torch.tensor(corner, dtype=u.dtype, device=u.device) for corner in itertools.product((0, 1), repeat=BLOCK)]
    for start in [*corners, u.clamp_max(0.25), u.clamp_max(0.5), u.clamp_max(1.0), 0.5 * u, 0.3 * u]:
        w = list(start.unbind(-1))
        for _ in range(sweeps):
            for i in reversed(range(BLOCK)):
                p, q, r = (w[j] for j in range(BLOCK) if j != i)
                w[i] = (u[..., i] - (p * q + q * r + r * p)).clamp_min(0)
        end = torch.stack(w, -1)
        value = objective(end, u)
        better = value < best_value
        best_value = torch.where(better, value, best_value)
        best = torch.where(better[..., None], end, best)
    best = best / lam if lam > 0 else magnitude
    return torch.empty_like(best).scatter_(-1, order, best).copysign(blocks).flatten(-2)
