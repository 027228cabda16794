"""The 2:4 proximal problem of one block, solved exactly: plain torch, one block per row, arithmetic in the input's precision.

For u = lam * |z| sorted descending (the scale law: prox_lam(z) = prox_1(lam z) / lam) the problem is

    min_{w >= 0}  f(w) = 1/2 ||w - u||^2 + w1 w2 w3 + w2 w3 w4 + w3 w4 w1 + w4 w1 w2 .

The minimiser keeps two, three or four weights. On each face the set where the Hessian is positive semidefinite is convex, so
each face holds at most one interior minimum; both can be reached by a Newton iteration in one or two scalars that provably
does not jump past it (docs/math.md, "The exact solver"). At a minimum every 2 x 2 minor of the Hessian is non-negative, which
bounds pair sums by 1 and gives the certificate used first: u1 > 2 means that two weights are kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Iterations after which 500,000 adversarial blocks are solved to 1e-8 of |z|^2/2 (fp64: 1e-16); quadratic convergence, so
# one more changes nothing. 6 (three kept), 6 and 3 (four kept) still meet 1e-7.
STEPS_THREE = 8
STEPS_FOUR_HARD = 8
STEPS_FOUR_EASY = 4


class Point(NamedTuple):
    """A candidate on one face: w [blocks, 4] and whether it is an interior minimum of that face, [blocks]."""

    w: Tensor
    valid: Tensor


def regulariser(w: Tensor) -> Tensor:
    """R(w) = |w1 w2 w3| + |w2 w3 w4| + |w3 w4 w1| + |w4 w1 w2| of each block; w [..., 4] -> [...]. Zero iff 2:4."""
    a, b, c, d = w.abs().unbind(-1)
    return a * b * (c + d) + c * d * (a + b)


def objective(w: Tensor, z: Tensor, lam: float | Tensor = 1.0) -> Tensor:
    """1/2 ||w - z||^2 + lam R(w) of each block; [..., 4] -> [...]."""
    return 0.5 * (w - z).square().sum(-1) + lam * regulariser(w)


def three_kept(u: Tensor) -> Point:
    """Interior minimum with w4 = 0.

    Given t = w3, the quadratic problem in (w1, w2) solves to w1 + w2 = Z / (1 + t), w1 - w2 = D / (1 - t) with Z, D = u1 +- u2. What is
    left is g(t) = t - u3 + w1 w2 = 0, convex below t_c = (1 - rho) / (1 + rho), rho = sqrt(D / Z), and concave above: from t_c
    (or u3, if less) Newton's method is monotone and ends in the minimum, or meets g' <= 0 and there is none.
    """
    a, b, c, _ = u.unbind(-1)
    total, gap = a + b, a - b
    rho = (gap / total.clamp_min(torch.finfo(u.dtype).tiny)).sqrt()
    t = torch.minimum((1 - rho) / (1 + rho), c)
    valid = torch.ones_like(a, dtype=torch.bool)
    for _ in range(STEPS_THREE):
        p, q = 1 / (1 + t), 1 / (1 - t).clamp_min(1e-6)
        sigma, delta = total * p, gap * q
        slope = 1 - 0.5 * (sigma * sigma * p + delta * delta * q)
        valid &= slope > 0
        step = (t - c + 0.25 * (sigma * sigma - delta * delta)) / slope
        t = torch.where(valid, t - step, t).clamp(-1e-6, 1)
    p, q = 1 / (1 + t), 1 / (1 - t).clamp_min(1e-6)
    w = torch.stack([0.5 * (total * p + gap * q), 0.5 * (total * p - gap * q), t, torch.zeros_like(t)], -1)
    return Point(w, valid & (w[..., :3] > 0).all(-1))


def four_kept_easy(u: Tensor) -> Point:
    """Interior minimum with all four kept, for 2 (u1 + u2 + u3 - u4) <= 1, where there is at most one stationary point.

    Newton's method in the pair sums s = w1 + w2, m = w3 + w4; the differences follow: w1 - w2 = D / (1 - m), w3 - w4 = E / (1 - s).
    Conditioned relative to u, however small u is. Starts at u; four steps reach fp32 accuracy in the whole region.
    """
    a, b, c, d = u.unbind(-1)
    top, top_gap, low, low_gap = a + b, a - b, c + d, c - d
    s, m = top, low
    for _ in range(STEPS_FOUR_EASY):
        p, q = 1 / (1 - s), 1 / (1 - m)
        delta, eta = top_gap * q, low_gap * p
        grad_s = 2 * (s - top) + 2 * s * m + m * m - eta * eta
        grad_m = 2 * (m - low) + 2 * s * m + s * s - delta * delta
        h_ss, h_mm, h_sm = 2 + 2 * m - 2 * eta * eta * p, 2 + 2 * s - 2 * delta * delta * q, 2 * (s + m)
        det = h_ss * h_mm - h_sm * h_sm
        s, m = s - (h_mm * grad_s - h_sm * grad_m) / det, m - (h_ss * grad_m - h_sm * grad_s) / det
    delta, eta = top_gap / (1 - m), low_gap / (1 - s)
    w = 0.5 * torch.stack([s + delta, s - delta, m + eta, m - eta], -1)
    return Point(w, (w > 0).all(-1))


def four_kept_hard(u: Tensor) -> Point:
    """Interior minimum with all four kept, for C = 2 (u1 + u2 + u3 - u4) - 1 > 0.

    With S = sum w, stationarity reads w_i = (S - 1) / 2 + x_i, x_i = sqrt(x^2 + u_i - u4) for i < 4, x = x_4 of either sign, where
    S = 2 - x - sum x_i (concave in x) and S = sqrt(4 x^2 + C) (convex). Their difference L is concave: of its at most two roots
    the larger is the minimum, the other a saddle. Newton's method from x = 1/2, where L <= 0, decreases to the larger root, or
    meets L' >= 0 and there is none.
    """
    a, b, c, d = u.unbind(-1)
    offset = torch.stack([a - d, b - d, c - d], -1)
    const = 2 * (a + b + c - d) - 1
    x = torch.full_like(a, 0.5)
    valid = torch.ones_like(a, dtype=torch.bool)
    tiny = 1e-18  # guards x_i = 0 at exact ties; the derivative x / x_i then reads 0
    for _ in range(STEPS_FOUR_HARD):
        roots = (x.square()[..., None] + offset).sqrt().clamp_min(tiny)
        total = (4 * x * x + const).clamp_min(tiny).sqrt()
        slope = -1 - (x[..., None] / roots).sum(-1) - 4 * x / total
        valid &= slope < 0
        x = torch.where(valid, x - (2 - x - roots.sum(-1) - total) / slope, x).clamp(-2, 0.5)
    roots = (x.square()[..., None] + offset).sqrt()
    shift = 0.5 * (1 - x - roots.sum(-1))
    w = torch.cat([roots + shift[..., None], (x + shift)[..., None]], -1)
    return Point(w, valid & (w > 0).all(-1))


def solve(u: Tensor) -> Tensor:
    """The global minimiser for u >= 0 sorted descending, [blocks, 4] -> [blocks, 4].

    Two weights are kept without further ado where u1 > 2, or where the problem is strictly convex, 2 (u1 + u2 + u3) < 1, and
    u3 <= u1 u2 (the condition for a minimum there). The other blocks, gathered to save time, compare all candidates.
    """
    a, b, c, _ = u.unbind(-1)
    w = u.clone()
    w[..., 2:] = 0
    settled = ~(a <= 2) | ((2 * (a + b + c) < 1) & (c <= a * b))
    rest = ~settled
    w[rest] = _least_candidate(u[rest])
    return w


def _least_candidate(u: Tensor) -> Tensor:
    """The candidate of least objective, ties to the sparser; [blocks, 4] -> [blocks, 4].

    In the strictly convex region a point with four kept weights is the answer without comparing objectives that differ by less
    than their rounding.
    """
    a, b, c, d = u.unbind(-1)
    four_w, four_valid = torch.empty_like(u), torch.empty_like(a, dtype=torch.bool)
    easy = 2 * (a + b + c - d) <= 1
    for region, solver in ((easy, four_kept_easy), (~easy, four_kept_hard)):
        four_w[region], four_valid[region] = solver(u[region])
    convex = 2 * (a + b + c) < 1
    w = u.clone()
    w[..., 2:] = 0
    # What is left to compare needs the candidate with three kept weights too.
    rest = ~(convex & four_valid)
    v = u[rest]
    three = three_kept(v)
    f_two = 0.5 * (v[..., 2] ** 2 + v[..., 3] ** 2)
    f_three = torch.where(three.valid, objective(three.w, v), torch.inf)
    f_four = torch.where(four_valid[rest], objective(four_w[rest], v), torch.inf)
    best = torch.where((f_three < f_two)[..., None], three.w, w[rest])
    best = torch.where((f_four < torch.minimum(f_three, f_two))[..., None], four_w[rest], best)
    w = torch.where(rest[..., None], w, four_w)
    w[rest] = best
    return w
