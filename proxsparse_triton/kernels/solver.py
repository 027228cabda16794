"""The exact 2:4 proximal operator of blocks held in registers.

A program is one warp: its branches are then uniform, and a tile takes the cheapest path that its blocks allow:

1. sweeps (sweeps.py): blocks with u1 + u2 + u3 + u4 <= SWEEPS_UP_TO, u = lam |z|, where the problem has one minimum and coordinate descent
   reaches it in 1 to 11 sweeps. No sorting. All published settings of lambda1 stay here.
2. decisions: whether two, three or four weights are kept is decided by closed-form tests, not by comparing objectives. Two kept need the
   largest three weights only; the rest, sorted blocks.
3. comparisons: as 2, plus the candidate with four kept weights found from scratch, where four nearly equal weights leave two minima.

The proofs are in docs/math.md ("The kernel's solver"); reference/block.py solves the same problem by enumerating candidates.
"""

import triton
import triton.language as tl

from .block import column, join
from .ptx import reciprocal
from .sweeps import pair_products, sweep, sweeps

SWEEPS_UP_TO = tl.constexpr(0.8)
STEPS_FOUR_FROM_SCRATCH = tl.constexpr(6)  # the objective is then within 2e-7 of |u|^2 / 2 over 3e5 blocks that need it
INF = tl.constexpr(float("inf"))


@triton.jit
def exchange(swap, a, b):
    """(b, a) where `swap`, else (a, b)."""
    return tl.where(swap, b, a), tl.where(swap, a, b)


@triton.jit
def tie_broken(u, index: tl.constexpr):
    """The bits of u >= 0, which order like u, with the lowest two replaced by 3 - index: no two weights of a block are equal and ties
    fall to the lowest index. Infinities and NaNs sort as the largest."""
    return (u.to(tl.int32, bitcast=True) & -4) | (3 - index)


@triton.jit
def sort_descending(a, b, c, d):
    """Five comparators on integers or numbers; returns the sorted four and the five swaps, which `unsort` takes back."""
    ab = a < b
    a, b = exchange(ab, a, b)
    cd = c < d
    c, d = exchange(cd, c, d)
    ac = a < c
    a, c = exchange(ac, a, c)
    bd = b < d
    b, d = exchange(bd, b, d)
    bc = b < c
    b, c = exchange(bc, b, c)
    return a, b, c, d, ab, cd, ac, bd, bc


@triton.jit
def unsort(a, b, c, d, ab, cd, ac, bd, bc):
    """Four values in sorted order -> in the order before `sort_descending`."""
    b, c = exchange(bc, b, c)
    b, d = exchange(bd, b, d)
    a, c = exchange(ac, a, c)
    c, d = exchange(cd, c, d)
    a, b = exchange(ab, a, b)
    return a, b, c, d


@triton.jit
def objective(w1, w2, w3, w4, a, b, c, d):
    """1/2 ||w - u||^2 + R(w)."""
    square = (w1 - a) * (w1 - a) + (w2 - b) * (w2 - b) + (w3 - c) * (w3 - c) + (w4 - d) * (w4 - d)
    return 0.5 * square + w1 * w2 * (w3 + w4) + w3 * w4 * (w1 + w2)


@triton.jit
def largest(x):
    """The maximum of numbers >= 0 [TILE_BLOCKS], which order like their bits. A NaN is above all; a floating maximum would lose it."""
    return tl.max(x.to(tl.int32, bitcast=True), axis=0).to(tl.float32, bitcast=True)


@triton.jit
def largest_of_two(x, y):
    """The maximum of two tiles of such numbers."""
    return largest(tl.maximum(x.to(tl.int32, bitcast=True), y.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True))


@triton.jit
def count_hard(total, other_total):
    """How many blocks of two tiles are beyond the sweeps."""
    hard = ((total <= SWEEPS_UP_TO) == 0).to(tl.int32) + ((other_total <= SWEEPS_UP_TO) == 0).to(tl.int32)
    return tl.sum(hard, axis=0)


@triton.jit
def some(condition):
    """Whether a condition holds in any block of the tile."""
    return tl.max(condition.to(tl.int32), axis=0) > 0


@triton.jit
def most(x, y):
    """The maximum, NaN if either is."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def least(x, y):
    """The minimum, NaN if either is."""
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def gain_of_a_third(a, b, c):
    """Negative iff a third weight is kept, for u sorted descending: exact, by the sign of a cubic.

    c > a b: two kept are no local minimum. Else three kept beat two iff B(t) = (ab - c) - k t + c t^2 - t^3 / 2, k = (a^2 + b^2 - 1) / 2,
    is negative at its local minimum t, and that point keeps w2 > 0 (a t < b). Four kept never beat two there. For k <= 0 there is no
    minimum with t > 0; without real roots t comes out above b / a. Infinities may give NaN: then two are kept.
    """
    excess = a * b - c
    minus_2k = (1 - b * b) - a * a
    discriminant = 4 * c * c + 3 * minus_2k
    root = discriminant * tl.rsqrt(tl.maximum(discriminant, 1e-30))
    t = (2 * c - root) * (1.0 / 3.0)
    cubic = ((c - 0.5 * t) * t + 0.5 * minus_2k) * t + excess
    return least(excess, most(most(cubic, a * t - b), minus_2k))


@triton.jit
def halley_step(a, b, c, limit, t):
    """Towards the zero of g = t - c + w1 w2, w1 = (a - b t) / (1 - t^2), w2 = (b - a t) / (1 - t^2), in [0, limit]."""
    r = reciprocal(1 - t * t)
    p = r - t * r
    q = r + t * r
    x = 0.5 * (a + b) * p
    y = 0.5 * (a - b) * q
    xxp = x * x * p
    yyq = y * y * q
    value = (t - c) + (a - b * t) * r * ((b - a * t) * r)  # x^2 - y^2 would cancel where w2 is small
    slope = tl.maximum(1 - 2 * (xxp + yyq), 1e-6)
    square = slope * slope
    denominator = tl.maximum(square - 3 * value * (xxp * p - yyq * q), 0.25 * square)
    return tl.minimum(tl.maximum(t - value * slope * reciprocal(denominator), 0.0), limit)


@triton.jit
def three_kept(a, b, c):
    """The minimum with w4 = 0, for blocks where more than two are kept: (w1, w2, w3).

    Given t = w3, w1 + w2 = (a + b) / (1 + t) and w1 - w2 = (a - b) / (1 - t); what is left is g(t) = t - c + w1 w2 = 0. Halley's method
    starts from a multiple of the larger root of g's parabola at 0, or from an upper bound if that is less: the inflection
    b / (a + sqrt(a^2 - b^2)), c, 3/4. Two steps leave 1e-9 of |u|^2 / 2 in the objective up to a sum of 2, 4e-7 anywhere (2e6 blocks).
    """
    excess = c - a * b
    slope = 1 - a * a - b * b
    root = tl.sqrt(tl.maximum(slope * slope + 12 * a * b * excess, 0.0))
    # Written so that nothing cancels.
    shallow = 2 * excess * reciprocal(tl.maximum(slope + root, 1e-20))
    steep = (root - slope) * reciprocal(6 * a * b + 1e-20)
    parabola = tl.where(slope > 0, shallow, steep) * tl.where(excess > 0, 1.1, 2.5)
    inflection = b * reciprocal(a + tl.sqrt(tl.maximum(a * a - b * b, 0.0)) + 1e-20)
    t = tl.minimum(tl.minimum(parabola, inflection), tl.minimum(c, 0.75))
    limit = tl.minimum(b * reciprocal(a + 1e-20), 0.9)  # beyond b / a the second weight would be negative
    t = halley_step(a, b, c, limit, t)
    t = halley_step(a, b, c, limit, t)
    r = reciprocal(1 - t * t)
    return (a - b * t) * r, tl.maximum(b - a * t, 0.0) * r, t


@triton.jit
def four_kept(a, b, c, d, s, m, steps):
    """The minimum with all four kept, by Newton's method in the pair sums s = w1 + w2, m = w3 + w4.

    Meaningless, and NaN, in blocks that it is not for.
    """
    top_gap = a - b
    low_gap = c - d
    for _ in range(steps):
        p = reciprocal(1 - s)
        q = reciprocal(1 - m)
        delta = top_gap * q
        eta = low_gap * p
        grad_s = (s - a - b) + s * m + 0.5 * (m * m - eta * eta)
        grad_m = (m - c - d) + s * m + 0.5 * (s * s - delta * delta)
        h_ss = 1 + m - eta * eta * p
        h_mm = 1 + s - delta * delta * q
        h_sm = s + m
        inverse = reciprocal(h_ss * h_mm - h_sm * h_sm)
        s, m = s - (h_mm * grad_s - h_sm * grad_m) * inverse, m - (h_ss * grad_m - h_sm * grad_s) * inverse
    delta = top_gap * reciprocal(1 - m)
    eta = tl.minimum(low_gap * reciprocal(1 - s), m)
    return 0.5 * (s + delta), 0.5 * (s - delta), 0.5 * (m + eta), 0.5 * (m - eta)


@triton.jit
def steps_four(top):
    """Steps of `four_kept` after one sweep from three kept, where the largest sum of u is `top` (0: no such block): 2e-8 of |u|^2 / 2 are
    left in the objective at most (4e5 blocks)."""
    return (top > 0).to(tl.int32) + (top > 0.7).to(tl.int32) + (top > 1.7).to(tl.int32)


@triton.jit
def may_have_two_minima(w1, w2, w3, four):
    """Whether the curvature along the pair sums at the minimum with w4 = 0 is small, where a fourth weight comes in, or negative.

    Over 2e6 blocks where three and four kept are both minima: s >= 0.78, e2(w1, w2, w3) (1 - 0.087 u4) <= u4 and curvature <= -0.12, or
    s >= 1. Newton's method with four kept needs it positive.
    """
    s = w1 + w2
    delta = w1 - w2
    p = reciprocal(tl.maximum(1 - s, 1e-4))
    q = reciprocal(1 - w3)
    curvature = (1 + w3 - w3 * w3 * p) * (1 + s - delta * delta * q) - (s + w3) * (s + w3)
    return (s >= 1) | (curvature < tl.where(four, 0.05, -0.05))


@triton.jit
def four_kept_from_scratch(a, b, c, d):
    """The minimum with all four kept for weights of order 1, and whether there is one: monotone Newton on a concave function of
    x = w4 + (1 - sum w) / 2."""
    const = 2 * (a + b + c - d) - 1
    x = tl.zeros_like(a) + 0.5
    valid = a == a
    for _ in tl.static_range(STEPS_FOUR_FROM_SCRATCH):
        y1 = tl.maximum(x * x + (a - d), 1e-18)
        y2 = tl.maximum(x * x + (b - d), 1e-18)
        y3 = tl.maximum(x * x + (c - d), 1e-18)
        y = tl.maximum(4 * x * x + const, 1e-18)
        r1 = tl.rsqrt(y1)
        r2 = tl.rsqrt(y2)
        r3 = tl.rsqrt(y3)
        r = tl.rsqrt(y)
        fall = 1 + x * (r1 + r2 + r3 + 4 * r)
        valid = valid & (fall > 0)
        value = 2 - x - y1 * r1 - y2 * r2 - y3 * r3 - y * r
        x = tl.where(valid, tl.minimum(tl.maximum(x + value * reciprocal(tl.maximum(fall, 1e-6)), -2.0), 0.5), x)
    x1 = tl.sqrt(x * x + (a - d))
    x2 = tl.sqrt(x * x + (b - d))
    x3 = tl.sqrt(x * x + (c - d))
    shift = 0.5 * (1 - x - x1 - x2 - x3)
    w4 = x + shift
    return x1 + shift, x2 + shift, x3 + shift, w4, valid & (w4 > 0)


@triton.jit
def three_or_four(a, b, c, d, more):
    """e2(w without i) at the best minimum with more than two kept, for the blocks `more`."""
    w1, w2, w3 = three_kept(a, b, c)
    dropped = w1 * w2 + w3 * (w1 + w2)
    four = more & (d > dropped)
    unsure = more & (d > dropped - 0.1 * d * dropped) & (w1 + w2 > 0.75) & (c > a * b)
    if some(unsure):
        unsure = unsure & may_have_two_minima(w1, w2, w3, four)
    v1, v2, v3, v4 = w1, w2, w3, tl.zeros_like(w1)
    steps = steps_four(largest(tl.where(four & (unsure == 0), (a + b) + (c + d), 0.0)))
    if steps > 0:
        x1, x2, x3, x4 = sweep(a, b, c, d, w1, w2, w3, v4)
        x1, x2, x3, x4 = four_kept(a, b, c, d, x1 + x2, x3 + x4, steps)
        v1 = tl.where(four, x1, v1)
        v2 = tl.where(four, x2, v2)
        v3 = tl.where(four, x3, v3)
        v4 = tl.where(four, x4, v4)
    if some(unsure):
        x1, x2, x3, x4, valid = four_kept_from_scratch(a, b, c, d)
        better = valid & (four | (objective(x1, x2, x3, x4, a, b, c, d) < objective(w1, w2, w3, 0.0, a, b, c, d)))
        x1 = tl.where(better, x1, w1)
        x2 = tl.where(better, x2, w2)
        x3 = tl.where(better, x3, w3)
        x4 = tl.where(better, x4, 0.0)
        v1 = tl.where(unsure, x1, v1)
        v2 = tl.where(unsure, x2, v2)
        v3 = tl.where(unsure, x3, v3)
        v4 = tl.where(unsure, x4, v4)
    return pair_products(v1, v2, v3, v4)


@triton.jit
def decide(a, b, c, d):
    """e2(w without i) at the global minimiser of 1/2 ||w - u||^2 + R(w), u sorted descending; inf where a weight of a two-kept block drops.

    Three kept: u4 <= e2(w1, w2, w3) and w4 = 0. Else four, reached from there; where that is not certain both are compared.
    """
    more = gain_of_a_third(a, b, c) < 0
    e1, e2 = tl.zeros_like(a), tl.zeros_like(a)
    e3, e4 = e1 + INF, e1 + INF
    if some(more):
        x1, x2, x3, x4 = three_or_four(a, b, c, d, more)
        e1 = tl.where(more, x1, e1)
        e2 = tl.where(more, x2, e2)
        e3 = tl.where(more, x3, e3)
        e4 = tl.where(more, x4, e4)
    return e1, e2, e3, e4


@triton.jit
def solve_hard(v1, v2, v3, v4, lam):
    """e2(w without i) of blocks [TILE_BLOCKS] by paths 2 and 3, inf for a dropped weight of a two-kept block; u = lam v."""
    # By v: products with a large lam may overflow and tie.
    s1, s2, s3, s4, ab, cd, ac, bd, bc = sort_descending(tie_broken(v1, 0), tie_broken(v2, 1), tie_broken(v3, 2), tie_broken(v4, 3))
    e1, e2, e3, e4 = decide(
        lam * s1.to(tl.float32, bitcast=True),
        lam * s2.to(tl.float32, bitcast=True),
        lam * s3.to(tl.float32, bitcast=True),
        lam * s4.to(tl.float32, bitcast=True),
    )
    return unsort(e1, e2, e3, e4, ab, cd, ac, bd, bc)


@triton.jit
def strengths(z, scale, lam, HAS_SCALE: tl.constexpr):
    """v = c |z| by columns, and the sum of u = lam v."""
    v = tl.abs(z)
    if HAS_SCALE:
        v = v * scale
    v1, v2, v3, v4 = column(v, 0), column(v, 1), column(v, 2), column(v, 3)
    return v1, v2, v3, v4, (lam * v1 + lam * v2) + (lam * v3 + lam * v4)


@triton.jit
def shrunk(z, scale, rate, e1, e2, e3, e4, HAS_SCALE: tl.constexpr):
    """|z| - e / (lam c), `rate` = 1 / lam: a difference rather than the minimiser itself, so that a kept weight that does not shrink stays
    the same bit for bit."""
    pull = rate * join(e1, e2, e3, e4)
    if HAS_SCALE:
        pull = pull / scale
    return tl.abs(z) - pull


@triton.jit
def settled(w, total):
    """Only hard blocks hold numbers that are not finite: NaN where `total` is, and inf - inf is a dropped weight."""
    return tl.where((total == total)[:, None], tl.where(w > 0, w, 0.0), float("nan"))


@triton.jit
def two_kept(z, v1, v2, v3, v4, total, lam):
    """The blocks of a hard tile that keep their two largest weights, unshrunk: |w|; and which do not, or need a closer look: ties between
    the second and the third, and numbers that are not finite. v = c |z|, total the sum of lam v."""
    above, below = tl.maximum(v1, v2), tl.minimum(v1, v2)
    other_above, other_below = tl.maximum(v3, v4), tl.minimum(v3, v4)
    first = tl.maximum(above, other_above)
    middle = tl.minimum(above, other_above)
    other_middle = tl.maximum(below, other_below)
    second, third = tl.maximum(middle, other_middle), tl.minimum(middle, other_middle)
    tie = (first > 0) & (third >= second)  # or no second at all
    pending = (gain_of_a_third(lam * first, lam * second, lam * third) < 0) | tie | ((total < INF) == 0)
    kept = join(v1, v2, v3, v4) >= second[:, None]
    return tl.where(kept, tl.abs(z), 0.0), pending


@triton.jit
def hard_magnitude(z, scale, lam, rate, HAS_SCALE: tl.constexpr):
    """`prox_magnitude` by paths 2 and 3."""
    v1, v2, v3, v4, total = strengths(z, scale, lam, HAS_SCALE)
    e1, e2, e3, e4 = solve_hard(v1, v2, v3, v4, lam)
    return settled(shrunk(z, scale, rate, e1, e2, e3, e4, HAS_SCALE), total)


@triton.jit
def prox_magnitude(z, scale, lam, rate, HAS_SCALE: tl.constexpr):
    """|w| of w = argmin 1/2 ||w - z||^2 + lam R(w) of each block of a tile [TILE_BLOCKS, 4], in the metric of `scale`; fp32.

    `rate` is 1 / lam. Where a weight is dropped the result is 0 or negative. A block with a NaN is all NaN.
    """
    v1, v2, v3, v4, total = strengths(z, scale, lam, HAS_SCALE)
    top = largest(total)
    if top <= SWEEPS_UP_TO:
        e1, e2, e3, e4 = sweeps(lam * v1, lam * v2, lam * v3, lam * v4, top)
        w = shrunk(z, scale, rate, e1, e2, e3, e4, HAS_SCALE)
    else:
        w = hard_magnitude(z, scale, lam, rate, HAS_SCALE)
    return w
