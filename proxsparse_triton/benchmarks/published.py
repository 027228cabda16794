"""The operator as it was published, in eager PyTorch: EnumALM (Algorithm 3) over ALM (Algorithm 2). The rival of `pst bench prox`.

Source: Liu et al. 2025 (arXiv 2502.00258), Algorithms 2 and 3; own code, vectorised over blocks, arithmetic in the dtype of the tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from ..reference.block import objective
from ..sparsity import BLOCK, KEPT

SWEEPS = 100
COMPILED_SWEEPS = 10  # in one compiled function: more take minutes to compile, fewer read and write the blocks more often

Columns = tuple[Tensor, ...]  # one tensor [blocks] per kept weight, the largest first
# (w, z, lam, sweeps) -> w after `sweeps` cyclic sweeps
Sweeper = Callable[[Columns, Columns, Tensor, int], Columns]


def sweep(w: Columns, z: Columns, lam: Tensor, sweeps: int) -> Columns:
    """w_i <- max(z_i - lam e2(w without i), 0), exact minimisation of one coordinate after the other, the smallest z first.

    e2: sum of the products of two of the other weights; three of them for four kept weights, one for three.
    """
    values = list(w)
    for _ in range(sweeps):
        for i in reversed(range(len(values))):
            others = values[:i] + values[i + 1 :]
            p, q = others[0], others[1]
            pairs = p * q if len(others) == KEPT else p * q + q * others[2] + others[2] * p
            values[i] = (z[i] - lam * pairs).clamp_min(0)
    return tuple(values)


def alm(z: Columns, lam: Tensor, sweeper: Sweeper) -> Columns:
    """Algorithm 2: SWEEPS sweeps from zero."""
    return sweeper(tuple(torch.zeros_like(column) for column in z), z, lam, SWEEPS)


def published_prox(z: Tensor, lam: float, sweeper: Sweeper = sweep) -> Tensor:
    """Algorithm 3: the best of the candidates with two, three and four kept weights, ties to the sparser; z [..., 4 n], like z."""
    strength = torch.tensor(lam, dtype=z.dtype, device=z.device)
    magnitude, order = z.abs().unflatten(-1, (-1, BLOCK)).sort(dim=-1, descending=True)
    columns = tuple(column.contiguous() for column in magnitude.unbind(-1))
    nothing = torch.zeros_like(columns[0])
    best = torch.stack([*columns[:KEPT], nothing, nothing], -1)
    least = objective(best, magnitude, strength)
    for kept in (3, 4):
        w = alm(columns[:kept], strength, sweeper)
        candidate = torch.stack([*w, *[nothing] * (BLOCK - kept)], -1)
        value = objective(candidate, magnitude, strength)
        best = torch.where((value < least)[..., None], candidate, best)
        least = torch.minimum(value, least)
    return torch.empty_like(best).scatter_(-1, order, best).flatten(-2).mul_(z.sign())


@cache
def compiled_sweeper() -> Sweeper:
    """The sweeps fused by torch.compile, COMPILED_SWEEPS in one pass over the blocks; the same functions after the first call."""
    body = torch.compile(_some_sweeps, dynamic=True)  # one compilation a dtype and candidate, whatever the shape

    def run(w: Columns, z: Columns, lam: Tensor, sweeps: int) -> Columns:
        for _ in range(sweeps // COMPILED_SWEEPS):
            w = body(w, z, lam)
        return w

    return run


def _some_sweeps(w: Columns, z: Columns, lam: Tensor) -> Columns:
    return sweep(w, z, lam, COMPILED_SWEEPS)
