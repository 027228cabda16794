"""Device functions on blocks held in registers: order, the exact prox solver, explicit rounding.

A tile of blocks is a [TILE_BLOCKS, 4] tensor whose rows lie in one thread each, so that `column` and `join` are register
renaming. A program is one warp: its branches are then uniform, and a tile takes the cheapest path that all of its blocks allow:

1. sweeps: every block has u1 + u2 + u3 + u4 <= SWEEPS_UP_TO, u = lam |z|, where the problem has one minimum and coordinate
   descent reaches it in 2 to 8 sweeps. No sorting. All published settings of lambda1 stay here.
2. decisions: sorted blocks; whether two, three or four weights are kept is decided by closed-form tests, not by comparing objectives.
3. comparisons: as 2, plus the candidate with four kept weights found from scratch, where four nearly equal weights leave two minima.

The proofs are in docs/math.md ("The kernel's solver"); reference/block.py solves the same problem by enumerating candidates.
"""

import triton
import triton.language as tl

SWEEPS_UP_TO = tl.constexpr(0.7)
STEPS_FOUR_FROM_SCRATCH = tl.constexpr(6)  # the objective is then within 2e-7 of |u|^2 / 2 over 3e5 blocks that need it
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
def reciprocal(x):
    """1 / x for x > 0, to 2 ulp: one special-function instruction and a product, a third of a division."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def objective(w1, w2, w3, w4, a, b, c, d):
    """1/2 ||w - u||^2 + R(w)."""
    square = (w1 - a) * (w1 - a) + (w2 - b) * (w2 - b) + (w3 - c) * (w3 - c) + (w4 - d) * (w4 - d)
    return 0.5 * square + w1 * w2 * (w3 + w4) + w3 * w4 * (w1 + w2)


@triton.jit
def pair_products(w1, w2, w3, w4):
    """e2(w without i) for i = 1, 2, 3, 4: what the regulariser pulls off each weight."""
    top = w1 + w2
    top_product = w1 * w2
    low = w3 + w4
    low_product = w3 * w4
    return w2 * low + low_product, w1 * low + low_product, w4 * top + top_product, w3 * top + top_product


@triton.jit
def sweep(u1, u2, u3, u4, w1, w2, w3, w4):
    """One round of exact coordinate minimisation, in any order of the weights."""
    top = w1 + w2
    left3 = u3 - w1 * w2
    left4 = u4 - w1 * w2
    w4 = tl.maximum(left4 - w3 * top, 0.0)
    w3 = tl.maximum(left3 - w4 * top, 0.0)
    low = w3 + w4
    left1 = u1 - w3 * w4
    left2 = u2 - w3 * w4
    w2 = tl.maximum(left2 - w1 * low, 0.0)
    w1 = tl.maximum(left1 - w2 * low, 0.0)
    return w1, w2, w3, w4


@triton.jit
def sweeps(u1, u2, u3, u4, top):
    """e2(w without i) after as many sweeps from u as a tile needs whose largest sum of u is `top`.

    2, 3, 5 and 8 sweeps for sums up to 0.06, 0.2, 0.5 and 0.7: the objective is within 2e-8 of |u|^2 / 2. The most frequent case, two,
    has no loop: a tile is so little work that a few branches show.
    """
    w1, w2, w3, w4 = sweep(u1, u2, u3, u4, u1, u2, u3, u4)
    w1, w2, w3, w4 = sweep(u1, u2, u3, u4, w1, w2, w3, w4)
    if top > 0.06:
        w1, w2, w3, w4 = sweep(u1, u2, u3, u4, w1, w2, w3, w4)
        if top > 0.2:
            for _ in range(tl.where(top <= 0.5, 2, 5)):
                w1, w2, w3, w4 = sweep(u1, u2, u3, u4, w1, w2, w3, w4)
    return pair_products(w1, w2, w3, w4)


@triton.jit
def steps_for(top):
    """Newton steps with three and with four kept, likewise. The worst blocks that hill climbing finds miss 6.2e-7 of |u|^2 / 2 in the
    objective; 2 steps at 1.4 would miss 1.7e-6."""
    return tl.where(top <= 1.0, 1, tl.where(top <= 1.3, 2, tl.where(top <= 1.5, 3, tl.where(top <= 1.7, 4, 5)))), tl.where(top <= 1.7, 2, 3)


@triton.jit
def some(condition):
    """Whether a condition holds in any block of the tile."""
    return tl.max(condition.to(tl.int32), axis=0) > 0


@triton.jit
def more_than_two(a, b, c):
    """Whether a third weight is kept, for u sorted descending: exact, by the sign of a cubic.

    c > a b: two kept are no local minimum. Else three kept beat two iff B(t) = (ab - c) - k t + c t^2 - t^3 / 2, k = (a^2 + b^2 - 1) / 2,
    is negative at its local minimum t, and that point keeps w2 > 0 (a t < b). Four kept never beat two there.
    """
    excess = a * b - c
    twice_k = a * a + b * b - 1
    discriminant = 4 * c * c - 3 * twice_k
    root = discriminant * tl.rsqrt(tl.maximum(discriminant, 1e-30))
    t = (2 * c - root) * (1.0 / 3.0)
    cubic = ((c - 0.5 * t) * t - 0.5 * twice_k) * t + excess
    return (excess < 0) | ((twice_k > 0) & (discriminant > 0) & (cubic < 0) & (a * t < b))


@triton.jit
def three_kept(a, b, c, steps):
    """The minimum with w4 = 0, where there is one: (w1, w2, w3).

    Given t = w3, w1 = (a - b t) / (1 - t^2) and w2 = (b - a t) / (1 - t^2); what is left is g(t) = t - c + w1 w2 = 0. Newton's method
    from the least of these upper bounds is monotone: the inflection t_c = (1 - r) / (1 + r), r = sqrt((a - b) / (a + b)); the end of the
    first step from 0, (c - ab) / (1 - a^2 - b^2), where that is positive; c; 3/4.
    """
    gap = a - b
    ratio = gap * tl.rsqrt(tl.maximum(gap * (a + b), 1e-30))
    slope = 1 - a * a - b * b
    excess = c - a * b
    first = tl.where((slope > 0.01) & (excess > 0), excess * reciprocal(tl.maximum(slope, 0.01)), 0.75)
    t = tl.minimum(tl.minimum((1 - ratio) * reciprocal(1 + ratio), c), tl.minimum(first, 0.75))
    for _ in range(steps):
        q = 1 - t * t
        p1 = a - b * t
        p2 = b - a * t
        product = p1 * p2
        square = q * q
        value = (t - c) * square + product
        slope = tl.maximum(square * q + 2 * t * product - p1 * p1 - p2 * p2, 1e-6)
        t = tl.minimum(tl.maximum(t - value * q * reciprocal(slope), 0.0), 0.9)
    r = reciprocal(1 - t * t)
    return (a - b * t) * r, (b - a * t) * r, t


@triton.jit
def four_kept(a, b, c, d, s, m, steps):
    """The minimum with all four kept, by Newton's method in the pair sums s = w1 + w2, m = w3 + w4 from the three kept ones.

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
def may_have_two_minima(w1, w2, w3):
    """Whether the curvature along the pair sums at the minimum with w4 = 0 is small or negative.

    Over 4e5 blocks where three and four kept are both minima: s >= 0.78, e2(w1, w2, w3) (1 - 0.087 u4) <= u4, and curvature <= -0.009
    where s < 1.
    """
    s = w1 + w2
    delta = w1 - w2
    p = reciprocal(tl.maximum(1 - s, 1e-4))
    q = reciprocal(1 - w3)
    return (s >= 1) | ((1 + w3 - w3 * w3 * p) * (1 + s - delta * delta * q) - (s + w3) * (s + w3) < 0.05)


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
def decide(a, b, c, d, top):
    """e2(w without i) at the global minimiser of 1/2 ||w - u||^2 + R(w), u sorted descending; inf where a weight of a two-kept block drops.

    Three kept: u4 <= e2(w1, w2, w3) and w4 = 0. Else four, reached from there; where that is not certain both are compared.
    """
    more = more_than_two(a, b, c)
    steps_three, steps_four = steps_for(top)
    w1, w2, w3 = three_kept(a, b, c, tl.where(some(more), steps_three, 0))
    dropped = w1 * w2 + w3 * (w1 + w2)
    four = more & (d > dropped)
    unsure = more & (d > dropped - 0.1 * d * dropped) & (w1 + w2 > 0.75) & (c > a * b)
    if some(unsure):
        unsure = unsure & may_have_two_minima(w1, w2, w3)
    f1, f2, f3, f4 = four_kept(a, b, c, d, w1 + w2, w3, tl.where(some(four & (unsure == 0)), steps_four, 0))
    v1 = tl.where(four, f1, w1)
    v2 = tl.where(four, f2, w2)
    v3 = tl.where(four, f3, w3)
    v4 = tl.where(four, f4, 0.0)
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
    e1, e2, e3, e4 = pair_products(v1, v2, v3, v4)
    return tl.where(more, e1, 0.0), tl.where(more, e2, 0.0), tl.where(more, e3, INF), tl.where(more, e4, INF)


@triton.jit
def prox_tile(z, scale, lam, HAS_SCALE: tl.constexpr, EXPLICIT: tl.constexpr):
    """w = argmin 1/2 ||w - z||^2 + lam R(w) for each block of a [TILE_BLOCKS, 4] tile, in the metric of `scale`; fp32.

    Formed as |z| - e2(w without i) / (lam c): a difference rather than the point itself, so that a kept weight that does not shrink
    stays the same bit for bit. A dropped weight is +0.0; a block with a NaN is all NaN.
    """
    magnitude = tl.abs(z)
    v = magnitude
    if HAS_SCALE:
        v = v * scale
    v1, v2, v3, v4 = column(v, 0), column(v, 1), column(v, 2), column(v, 3)
    u1, u2, u3, u4 = lam * v1, lam * v2, lam * v3, lam * v4
    total = (u1 + u2) + (u3 + u4)
    # Non-negative floats order like their bits, and a NaN comes out above all others, which a floating maximum would lose.
    top = tl.max(total.to(tl.int32, bitcast=True), axis=0).to(tl.float32, bitcast=True)
    if top <= SWEEPS_UP_TO:
        e1, e2, e3, e4 = sweeps(u1, u2, u3, u4, top)
    else:
        # By v: products with a large lam may overflow and tie.
        s1, s2, s3, s4, ab, cd, ac, bd, bc = sort_descending(tie_broken(v1, 0), tie_broken(v2, 1), tie_broken(v3, 2), tie_broken(v4, 3))
        e1, e2, e3, e4 = decide(
            lam * s1.to(tl.float32, bitcast=True),
            lam * s2.to(tl.float32, bitcast=True),
            lam * s3.to(tl.float32, bitcast=True),
            lam * s4.to(tl.float32, bitcast=True),
            top,
        )
        e1, e2, e3, e4 = unsort(e1, e2, e3, e4, ab, cd, ac, bd, bc)
    rate = 1 / lam
    if HAS_SCALE:
        rate = rate / scale
    w = magnitude - rate * join(e1, e2, e3, e4)
    # inf - inf is a dropped weight: a maximum makes that NaN 0 on the card, but not in the interpreter.
    if EXPLICIT:
        w = tl.where(w > 0, w, 0.0)
    else:
        w = tl.maximum(w, 0.0)
    sign = z.to(tl.int32, bitcast=True) & -2147483648
    signed = (w.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    # 0.0 turns -0.0 into +0.0. A maximum drops NaNs; what has one goes through the sum.
    return signed + tl.where(total == total, 0.0, float("nan"))[:, None]


@triton.jit
def load_blocks(ptr, block, limit):
    """Raw blocks `block` < limit: [TILE_BLOCKS, 4], or the 32-bit halves [TILE_BLOCKS, 2] of bf16 blocks, which unpack in fewer
    instructions and registers. Zeros elsewhere."""
    inside = (block < limit)[:, None]
    if ptr.dtype.element_ty == tl.bfloat16:
        pairs = ptr.to(tl.pointer_type(tl.int32), bitcast=True)
        return tl.load(pairs + block[:, None] * 2 + tl.arange(0, 2)[None, :], mask=inside, other=0)
    else:
        return tl.load(ptr + block[:, None] * 4 + tl.arange(0, 4)[None, :], mask=inside, other=0)


@triton.jit
def unpack_blocks(raw):
    """What `load_blocks` loaded -> fp32 [TILE_BLOCKS, 4]."""
    if raw.dtype == tl.int32:
        half = tl.arange(0, 2)[None, :]
        low = tl.sum(tl.where(half == 0, raw, 0), axis=1)
        high = tl.sum(tl.where(half == 1, raw, 0), axis=1)
        bits = join(low << 16, low & -65536, high << 16, high & -65536)
        return bits.to(tl.float32, bitcast=True)
    else:
        return raw.to(tl.float32)


@triton.jit
def store_blocks(ptr, x, block, limit):
    """Stores fp32 [TILE_BLOCKS, 4] that is already rounded to the storage type; the twin of `load_blocks`."""
    inside = (block < limit)[:, None]
    if ptr.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        half = tl.arange(0, 2)[None, :]
        low = ((column(bits, 0) >> 16) & 0xFFFF) | (column(bits, 1) & -65536)
        high = ((column(bits, 2) >> 16) & 0xFFFF) | (column(bits, 3) & -65536)
        pairs = ptr.to(tl.pointer_type(tl.int32), bitcast=True)
        tl.store(pairs + block[:, None] * 2 + half, tl.where(half == 0, low[:, None], high[:, None]), mask=inside)
    else:
        tl.store(ptr + block[:, None] * 4 + tl.arange(0, 4)[None, :], x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def round_to(x, dtype: tl.constexpr, EXPLICIT: tl.constexpr):
    """fp32 -> dtype, to nearest even. The interpreter truncates bf16, hence the explicit rounding of the bits there."""
    if EXPLICIT and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, rounded, bits).to(tl.float32, bitcast=True)
    return x.to(dtype)
