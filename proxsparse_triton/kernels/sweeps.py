"""Coordinate descent on blocks whose sum of u = lam |z| is at most 0.8: one minimum, no sorting.

In pairs of tiles the first sweeps are in fp16, two blocks to a register: a third of the instructions. The last ones in fp32 take the
rounding to fp16 away again.
"""

import triton
import triton.language as tl

from .ptx import PTX, half_pair, half_values

ONE_UP_TO = tl.constexpr(0.012)
TWO_UP_TO = tl.constexpr(0.06)


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
def more_sweeps(top):
    """Sweeps beyond two for a tile whose largest sum of u is `top` > TWO_UP_TO: from 0.22 one more for every tenth; the convergence slows
    down at 0.72."""
    return 1 + (10 * top - 1.2).to(tl.int32) + 2 * (top > 0.72).to(tl.int32)


@triton.jit
def sweeps(u1, u2, u3, u4, top):
    """e2(w without i) after as many sweeps from u as a tile needs whose largest sum of u is `top`.

    The objective is then within 2e-11 of |u|^2 / 2 up to a sum of 0.06, 6e-10 up to 0.22, 2.5e-8 beyond. The most frequent cases, one and
    two, have no loop: a tile is so little work that a few branches show.
    """
    w1, w2, w3, w4 = sweep(u1, u2, u3, u4, u1, u2, u3, u4)
    if top > ONE_UP_TO:
        w1, w2, w3, w4 = sweep(u1, u2, u3, u4, w1, w2, w3, w4)
        if top > TWO_UP_TO:
            for _ in range(more_sweeps(top)):
                w1, w2, w3, w4 = sweep(u1, u2, u3, u4, w1, w2, w3, w4)
    return pair_products(w1, w2, w3, w4)


@triton.jit
def half_sweep(u1, u2, u3, u4, w1, w2, w3, w4):
    """`sweep` of pairs of blocks in fp16: ten instructions, since a product, its difference and the maximum with 0 are one."""
    if PTX:
        return tl.inline_asm_elementwise(
            """{
                .reg .b32 minus, sum, left, other;
                neg.f16x2 minus, $8;
                add.f16x2 sum, $8, $9;
                fma.rn.f16x2 left, minus, $9, $6;
                fma.rn.f16x2 other, minus, $9, $7;
                neg.f16x2 sum, sum;
                fma.rn.relu.f16x2 $3, $10, sum, other;
                fma.rn.relu.f16x2 $2, $3, sum, left;
                neg.f16x2 minus, $2;
                add.f16x2 sum, $2, $3;
                fma.rn.f16x2 left, minus, $3, $4;
                fma.rn.f16x2 other, minus, $3, $5;
                neg.f16x2 sum, sum;
                fma.rn.relu.f16x2 $1, $8, sum, other;
                fma.rn.relu.f16x2 $0, $1, sum, left;
            }""",
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r",
            [u1, u2, u3, u4, w1, w2, w3, w4], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:  # rounded once a sweep rather than once an instruction
        a1, b1 = half_values(u1)
        a2, b2 = half_values(u2)
        a3, b3 = half_values(u3)
        a4, b4 = half_values(u4)
        x1, y1 = half_values(w1)
        x2, y2 = half_values(w2)
        x3, y3 = half_values(w3)
        x4, y4 = half_values(w4)
        x1, x2, x3, x4 = sweep(a1, a2, a3, a4, x1, x2, x3, x4)
        y1, y2, y3, y4 = sweep(b1, b2, b3, b4, y1, y2, y3, y4)
        return half_pair(x1, y1), half_pair(x2, y2), half_pair(x3, y3), half_pair(x4, y4)


@triton.jit
def two_half_sweeps(h1, h2, h3, h4, g1, g2, g3, g4):
    g1, g2, g3, g4 = half_sweep(h1, h2, h3, h4, g1, g2, g3, g4)
    return half_sweep(h1, h2, h3, h4, g1, g2, g3, g4)


@triton.jit
def half_sweeps(h1, h2, h3, h4, top):
    """Sweeps of pairs in fp16 until what is left is its rounding: 2, 4, 6, 8 or 10 up to a sum of 0.22, 0.42, 0.62, 0.72 and beyond."""
    g1, g2, g3, g4 = two_half_sweeps(h1, h2, h3, h4, h1, h2, h3, h4)
    if top > 0.22:
        g1, g2, g3, g4 = two_half_sweeps(h1, h2, h3, h4, g1, g2, g3, g4)
        if top > 0.42:
            g1, g2, g3, g4 = two_half_sweeps(h1, h2, h3, h4, g1, g2, g3, g4)
            if top > 0.62:
                g1, g2, g3, g4 = two_half_sweeps(h1, h2, h3, h4, g1, g2, g3, g4)
                if top > 0.72:
                    g1, g2, g3, g4 = two_half_sweeps(h1, h2, h3, h4, g1, g2, g3, g4)
    return g1, g2, g3, g4


@triton.jit
def sweeps_of_pairs(u1, u2, u3, u4, x1, x2, x3, x4, top, TO_BF16: tl.constexpr):
    """`sweeps` of two tiles, u and x, that start in fp16; at least as accurate with two sweeps in fp32 at the end.

    TO_BF16: one sweep less up to TWO_UP_TO and from 0.42 on. e2 is then within 3e-5 |u| in the mean, 2e-4 |u| at most, where bf16 rounds by
    up to 2e-3 |u|; 1e-7 of |u|^2 / 2 are left in the objective.
    """
    w1, w2, w3, w4 = u1, u2, u3, u4
    y1, y2, y3, y4 = x1, x2, x3, x4
    if TO_BF16 or top > TWO_UP_TO:
        g1, g2, g3, g4 = half_sweeps(half_pair(u1, x1), half_pair(u2, x2), half_pair(u3, x3), half_pair(u4, x4), top)
        w1, y1 = half_values(g1)
        w2, y2 = half_values(g2)
        w3, y3 = half_values(g3)
        w4, y4 = half_values(g4)
    again = top > ONE_UP_TO
    if TO_BF16:
        again = (top > TWO_UP_TO) & (top <= 0.42)
    if again:
        w1, w2, w3, w4 = sweep(u1, u2, u3, u4, w1, w2, w3, w4)
        y1, y2, y3, y4 = sweep(x1, x2, x3, x4, y1, y2, y3, y4)
    w1, w2, w3, w4 = sweep(u1, u2, u3, u4, w1, w2, w3, w4)
    y1, y2, y3, y4 = sweep(x1, x2, x3, x4, y1, y2, y3, y4)
    e1, e2, e3, e4 = pair_products(w1, w2, w3, w4)
    f1, f2, f3, f4 = pair_products(y1, y2, y3, y4)
    return e1, e2, e3, e4, f1, f2, f3, f4
