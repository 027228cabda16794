"""Device functions on blocks held in registers: sorting, ranks, the exact prox solver, explicit rounding.

A tile of blocks is a [TILE_BLOCKS, 4] tensor whose rows lie in one thread each, so that `column` and `join` are register
renaming; the solver works on four [TILE_BLOCKS] tensors u1 >= u2 >= u3 >= u4 >= 0, in fp32. The derivation of each step is in
docs/math.md, its readable twin in reference/block.py.
"""

import triton
import triton.language as tl

STEPS_THREE = tl.constexpr(8)
STEPS_FOUR_HARD = tl.constexpr(8)
STEPS_FOUR_EASY = tl.constexpr(4)
NEGLIGIBLE = tl.constexpr(1e-12)
INF = tl.constexpr(float("inf"))


@triton.jit
def column(x, index: tl.constexpr):
    """Column `index` of a [TILE_BLOCKS, 4] tile."""
    lane = tl.arange(0, 4)[None, :]
    return tl.sum(tl.where(lane == index, x, 0), axis=1)


@triton.jit
def join(a, b, c, d):
    """[TILE_BLOCKS, 4] tile of four columns."""
    lane = tl.arange(0, 4)[None, :]
    return tl.where(lane < 2, tl.where(lane == 0, a[:, None], b[:, None]), tl.where(lane == 2, c[:, None], d[:, None]))


@triton.jit
def ranks(a, b, c, d):
    """Position of each of the four in descending order, ties to the lowest index: four int32 tensors."""
    ab = (a >= b).to(tl.int32)
    ac = (a >= c).to(tl.int32)
    ad = (a >= d).to(tl.int32)
    bc = (b >= c).to(tl.int32)
    bd = (b >= d).to(tl.int32)
    cd = (c >= d).to(tl.int32)
    return 3 - ab - ac - ad, 2 + ab - bc - bd, 1 + ac + bc - cd, ad + bd + cd


@triton.jit
def sort_descending(a, b, c, d):
    """Five comparators."""
    a, b = tl.maximum(a, b), tl.minimum(a, b)
    c, d = tl.maximum(c, d), tl.minimum(c, d)
    a, c = tl.maximum(a, c), tl.minimum(a, c)
    b, d = tl.maximum(b, d), tl.minimum(b, d)
    b, c = tl.maximum(b, c), tl.minimum(b, c)
    return a, b, c, d


@triton.jit
def pick(rank, a, b, c, d):
    """The value of the given rank."""
    return tl.where(rank < 2, tl.where(rank == 0, a, b), tl.where(rank == 2, c, d))


@triton.jit
def objective(w1, w2, w3, w4, a, b, c, d):
    """1/2 ||w - u||^2 + R(w)."""
    square = (w1 - a) * (w1 - a) + (w2 - b) * (w2 - b) + (w3 - c) * (w3 - c) + (w4 - d) * (w4 - d)
    return 0.5 * square + w1 * w2 * (w3 + w4) + w3 * w4 * (w1 + w2)


@triton.jit
def three_kept(a, b, c):
    """Interior minimum with w4 = 0: monotone Newton on g(t) = t - u3 + w1(t) w2(t), t = w3. Returns (w1, w2, w3, valid)."""
    total = a + b
    gap = a - b
    rho = tl.sqrt(gap / tl.maximum(total, 1e-37))
    t = tl.minimum((1 - rho) / (1 + rho), c)
    valid = a == a
    for _ in tl.static_range(STEPS_THREE):
        p = 1 / (1 + t)
        q = 1 / tl.maximum(1 - t, 1e-6)
        sigma = total * p
        delta = gap * q
        slope = 1 - 0.5 * (sigma * sigma * p + delta * delta * q)
        valid = valid & (slope > 0)
        step = (t - c + 0.25 * (sigma * sigma - delta * delta)) / slope
        t = tl.minimum(tl.maximum(tl.where(valid, t - step, t), -1e-6), 1.0)
    sigma = total / (1 + t)
    delta = gap / tl.maximum(1 - t, 1e-6)
    w1 = 0.5 * (sigma + delta)
    w2 = 0.5 * (sigma - delta)
    return w1, w2, t, valid & (w2 > 0) & (t > 0)


@triton.jit
def four_kept_easy(a, b, c, d):
    """Interior minimum for 2 (u1 + u2 + u3 - u4) <= 1: Newton in the pair sums s = w1 + w2, m = w3 + w4."""
    top = a + b
    top_gap = a - b
    low = c + d
    low_gap = c - d
    s = top
    m = low
    for _ in tl.static_range(STEPS_FOUR_EASY):
        p = 1 / (1 - s)
        q = 1 / (1 - m)
        delta = top_gap * q
        eta = low_gap * p
        grad_s = 2 * (s - top) + 2 * s * m + m * m - eta * eta
        grad_m = 2 * (m - low) + 2 * s * m + s * s - delta * delta
        h_ss = 2 + 2 * m - 2 * eta * eta * p
        h_mm = 2 + 2 * s - 2 * delta * delta * q
        h_sm = 2 * (s + m)
        inverse = 1 / (h_ss * h_mm - h_sm * h_sm)
        ds = (h_mm * grad_s - h_sm * grad_m) * inverse
        dm = (h_ss * grad_m - h_sm * grad_s) * inverse
        s -= ds
        m -= dm
    delta = top_gap / (1 - m)
    eta = low_gap / (1 - s)
    w1 = 0.5 * (s + delta)
    w2 = 0.5 * (s - delta)
    w3 = 0.5 * (m + eta)
    w4 = 0.5 * (m - eta)
    return w1, w2, w3, w4, (w4 > 0) & (w2 > 0)


@triton.jit
def four_kept_hard(a, b, c, d):
    """Interior minimum for 2 (u1 + u2 + u3 - u4) > 1: monotone Newton on a concave function of x = w4 + (1 - sum w) / 2."""
    const = 2 * (a + b + c - d) - 1
    x = tl.zeros_like(a) + 0.5
    valid = a == a
    for _ in tl.static_range(STEPS_FOUR_HARD):
        x1 = tl.maximum(tl.sqrt(x * x + (a - d)), 1e-18)
        x2 = tl.maximum(tl.sqrt(x * x + (b - d)), 1e-18)
        x3 = tl.maximum(tl.sqrt(x * x + (c - d)), 1e-18)
        total = tl.sqrt(tl.maximum(4 * x * x + const, 1e-18))
        slope = -1 - x / x1 - x / x2 - x / x3 - 4 * x / total
        valid = valid & (slope < 0)
        step = (2 - x - x1 - x2 - x3 - total) / slope
        x = tl.minimum(tl.maximum(tl.where(valid, x - step, x), -2.0), 0.5)
    x1 = tl.sqrt(x * x + (a - d))
    x2 = tl.sqrt(x * x + (b - d))
    x3 = tl.sqrt(x * x + (c - d))
    shift = 0.5 * (1 - x - x1 - x2 - x3)
    w4 = x + shift
    return x1 + shift, x2 + shift, x3 + shift, w4, valid & (w4 > 0)


@triton.jit
def solve(a, b, c, d):
    """Global minimiser of 1/2 ||w - u||^2 + R(w) for u sorted descending: four tensors, 0 where a weight is dropped."""
    two = ~(a <= 2)  # no minimum with three or four kept exists beyond: every 2 x 2 minor of the Hessian would have to be >= 0
    u1 = tl.minimum(a, 4.0)
    u2 = tl.minimum(b, 4.0)
    u3 = tl.minimum(c, 4.0)
    u4 = tl.minimum(d, 4.0)
    p1, p2, p3, valid3 = three_kept(u1, u2, u3)
    f_two = 0.5 * (u3 * u3 + u4 * u4)
    f_three = tl.where(valid3, objective(p1, p2, p3, 0.0, u1, u2, u3, u4), INF)
    easy = 2 * (u1 + u2 + u3 - u4) <= 1
    convex = 2 * (u1 + u2 + u3) < 1
    e1, e2, e3, e4, easy_valid = four_kept_easy(u1, u2, u3, u4)
    h1, h2, h3, h4, hard_valid = four_kept_hard(u1, u2, u3, u4)
    q1 = tl.where(easy, e1, h1)
    q2 = tl.where(easy, e2, h2)
    q3 = tl.where(easy, e3, h3)
    q4 = tl.where(easy, e4, h4)
    valid4 = (easy & easy_valid) | ((~easy) & hard_valid)
    f_four = tl.where(valid4, objective(q1, q2, q3, q4, u1, u2, u3, u4), INF)
    take3 = (f_three < f_two) & (~two)
    take4 = ((f_four < tl.minimum(f_three, f_two)) | (convex & valid4)) & (~two)
    w1 = tl.where(take4, q1, tl.where(take3, p1, u1))
    w2 = tl.where(take4, q2, tl.where(take3, p2, u2))
    w3 = tl.where(take4, q3, tl.where(take3, p3, 0.0))
    w4 = tl.where(take4, q4, 0.0)
    return w1, w2, w3, w4


@triton.jit
def shrinkage(a, b, c, d, lam):
    """|z| - prox for scaled magnitudes v = |z| c in any order: e2(w without i) / lam for a kept weight, inf for a dropped one.

    A difference rather than the point itself: a kept weight that does not shrink then stays the same bit for bit.
    """
    ra, rb, rc, rd = ranks(a, b, c, d)
    s1, s2, s3, s4 = sort_descending(a, b, c, d)
    w1, w2, w3, w4 = solve(lam * s1, lam * s2, lam * s3, lam * s4)
    e1 = (w2 * (w3 + w4) + w3 * w4) / lam
    e2 = (w1 * (w3 + w4) + w3 * w4) / lam
    e3 = (w4 * (w1 + w2) + w1 * w2) / lam
    e4 = (w3 * (w1 + w2) + w1 * w2) / lam
    negligible = lam * s1 < NEGLIGIBLE
    e1 = tl.where(negligible, 0.0, tl.where(w1 > 0, e1, INF))
    e2 = tl.where(negligible, 0.0, tl.where(w2 > 0, e2, INF))
    e3 = tl.where(negligible, 0.0, tl.where(w3 > 0, e3, INF))
    e4 = tl.where(negligible, 0.0, tl.where(w4 > 0, e4, INF))
    return pick(ra, e1, e2, e3, e4), pick(rb, e1, e2, e3, e4), pick(rc, e1, e2, e3, e4), pick(rd, e1, e2, e3, e4)


@triton.jit
def round_to(x, dtype: tl.constexpr, EXPLICIT: tl.constexpr):
    """fp32 -> dtype, to nearest even. The interpreter truncates bf16, hence the explicit rounding of the bits there."""
    if EXPLICIT and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, rounded, bits).to(tl.float32, bitcast=True)
    return x.to(dtype)
