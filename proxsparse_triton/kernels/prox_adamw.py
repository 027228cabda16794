"""prox_adamw: the lambda2 gradient, AdamW and the 2:4 prox of one tensor in one pass over the weights, updated in place.

    g = coef (grad + p), p = 2 lambda2 r a (2w - w0)     m += (1 - beta1)(g - m)     v = beta2 v + (1 - beta2) g^2
    w <- prox_lambda1(w (1 - lr decay) - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps))

Bytes per weight, each counted once: w and its residual, m and v read and written, grad and w0 read. bf16 w and moments: 14, with w0 16;
bf16 w with 8-bit moments and w0: 12.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..step import AdamState, StepSettings
from .block import column, inside, join, load_blocks, store_blocks, store_words, unpack_blocks, weights_of
from .frozen_penalty import penalty_terms
from .launch import fused, interpreted
from .prox import load_scale
from .ptx import reciprocal, signed, upper_halves
from .solver import largest, prox_magnitude

STATISTICS = tl.constexpr(4)
PHILOX_ROUNDS = tl.constexpr(7)
PHILOX_MULTIPLIER = tl.constexpr(0xD256D193)
PHILOX_KEY_STEP = tl.constexpr(0x9E3779B9)
SMALLEST_LAM = 2.0**-126  # the least normal fp32: anything below acts as 0


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _real(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _random16(key, counter_high, counter, STOCHASTIC: tl.constexpr):
    """16 random bits for each weight of blocks, Philox2x32-7 of the block's place: independent of tiles and shards. int32
    [TILE_BLOCKS, 4]."""
    if STOCHASTIC:
        key = key.to(tl.uint32, bitcast=True)
        a = counter.to(tl.uint32, bitcast=True)
        b = tl.zeros_like(a) + counter_high.to(tl.uint32, bitcast=True)
        for _ in tl.static_range(PHILOX_ROUNDS):
            product = a.to(tl.uint64) * PHILOX_MULTIPLIER
            a = (product >> 32).to(tl.uint32) ^ b ^ key
            b = product.to(tl.uint32)
            key += PHILOX_KEY_STEP
        words = join(a & 0xFFFF, a >> 16, b & 0xFFFF, b >> 16)
        return words.to(tl.int32, bitcast=True)
    else:
        return tl.zeros_like(counter)[:, None] + 0 * tl.arange(0, 4)[None, :]


@triton.jit
def _store_rounded(ptr, x, random, tile, mask, STOCHASTIC: tl.constexpr):
    """fp32 in the storage type; stochastic rounding to bf16 keeps what bf16 can represent."""
    if STOCHASTIC and ptr.dtype.element_ty == tl.bfloat16:
        x = _real(_bits(x) + random)
        first = upper_halves(column(x, 0), column(x, 1))
        store_words(ptr, first, upper_halves(column(x, 2), column(x, 3)), tile, mask)
    else:
        store_blocks(ptr, x, tile, mask)


@triton.jit
def _random_unit(random, STOCHASTIC: tl.constexpr):
    """(random + 1/2) / 2^16 by its bits in [1, 2): conversions run at an eighth of the rate of arithmetic."""
    if STOCHASTIC:
        return _real((random << 7) | 0x3F800000) - (1 - 1.0 / 131072)
    else:
        return tl.zeros_like(random).to(tl.float32) + 0.5


@triton.jit
def _to_real(code):
    """An integer in [0, 2^23) -> fp32, by its bits."""
    return _real(code | 0x4B000000) - 8388608.0


@triton.jit
def _nearest(x):
    """fp32 in [0, 2^22) -> the nearest integer, as fp32."""
    return (x + 8388608.0) - 8388608.0


@triton.jit
def _to_code(x):
    """A whole fp32 number in [0, 2^23) -> int32, by its bits."""
    return _bits(x + 8388608.0) & 0x7FFFFF


@triton.jit
def _encode_first(m, scale, unit):
    """m = scale sgn(c) (|c| / 127)^2 -> c, rounded between neighbours with probabilities that keep the mean."""
    y = tl.abs(m) * (16129.0 / tl.maximum(scale, 1e-37))
    low = tl.minimum(_nearest(tl.maximum(tl.sqrt(y) - 0.5, 0.0)), 126.0)
    code = _to_code(low + tl.where(unit * (2 * low + 1) < y - low * low, 1.0, 0.0))
    return tl.where(m < 0, -code, code).to(tl.int8)


@triton.jit
def _encode_second(v, scale, unit):
    """v = scale (c / 255)^4 -> c; at least 1 for v > 0, since a second moment of 0 beside a first one would explode the update."""
    y = v * (4228250625.0 / tl.maximum(scale, 1e-37))
    low = tl.minimum(_nearest(tl.maximum(tl.sqrt(tl.sqrt(y)) - 0.5, 0.0)), 254.0)
    square = low * low
    above = (low + 1) * (low + 1)
    code = low + tl.where(unit * (above * above - square * square) < y - square * square, 1.0, 0.0)
    return _to_code(tl.where(v > 0, tl.maximum(code, 1.0), 0.0)).to(tl.uint8)


@triton.jit
def _moments(m_raw, v_raw, m_scale, v_scale, EIGHT_BIT: tl.constexpr):
    if EIGHT_BIT:
        m_code = _to_real(m_raw.to(tl.int32) + 128) - 128
        v_code = _to_real(v_raw.to(tl.int32))
        v_code *= v_code
        return m_code * tl.abs(m_code) * (m_scale * (1.0 / 16129)), v_code * v_code * (v_scale * (1.0 / 4228250625))
    else:
        return unpack_blocks(m_raw), unpack_blocks(v_raw)


@triton.jit
def _adamw(
    w, m, v, grad, pull, coef, step_size, decay, eps, beta1_rest, beta2, beta2_rest, root_correction,
    HAS_W0: tl.constexpr, CLIP_TOTAL: tl.constexpr,
):  # fmt: skip
    """The step without the prox: (w, m, v, squared gradient of each block, whether the block has a gradient that is not finite)."""
    total = grad
    if HAS_W0:
        total = grad + pull
    g = coef * total
    square = tl.sum(total * total, axis=1)
    broken = (square - square) != 0  # infinite or NaN
    if HAS_W0 and not CLIP_TOTAL:
        g = coef * grad + pull
        square = tl.sum(grad * grad, axis=1)
    m += beta1_rest * (g - m)
    v = beta2 * v + beta2_rest * g * g
    return w * decay - step_size * m * reciprocal(tl.sqrt(v) * root_correction + eps), m, v, square, broken


@triton.jit
def _store_moments(
    m_ptr, v_ptr, m_scale_ptr, v_scale_ptr, m, v, random, tile, mask, writing,
    EIGHT_BIT: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    if EIGHT_BIT:
        m_scale = largest(tl.max(_bits(tl.abs(m)), axis=1).to(tl.float32, bitcast=True))
        v_scale = largest(tl.max(_bits(v), axis=1).to(tl.float32, bitcast=True))
        unit = _random_unit(random, STOCHASTIC)
        tl.store(weights_of(m_ptr, tile, mask.shape[0]), _encode_first(m, m_scale, unit), mask=mask[:, None])
        tl.store(weights_of(v_ptr, tile, mask.shape[0]), _encode_second(v, v_scale, unit), mask=mask[:, None])
        tl.store(m_scale_ptr + tile, m_scale, mask=writing)
        tl.store(v_scale_ptr + tile, v_scale, mask=writing)
    else:
        _store_rounded(m_ptr, m, random, tile, mask, STOCHASTIC)
        _store_rounded(v_ptr, v, random, tile, mask, STOCHASTIC)


@triton.jit
def _store_weight(w_ptr, residual_ptr, w, random, tile, mask, RESIDUAL_BITS: tl.constexpr, STOCHASTIC: tl.constexpr):
    """The weight and its residual: the bits below those that bf16, to nearest, keeps."""
    if RESIDUAL_BITS == 0:
        _store_rounded(w_ptr, w, random, tile, mask, STOCHASTIC)
    else:
        bits = _bits(w)
        if RESIDUAL_BITS == 8:
            if STOCHASTIC:
                bits = (bits + (random & 0xFF)) & -256
            else:
                bits = (bits + 0x7F + ((bits >> 8) & 1)) & -256
        nearest = bits + 0x8000
        first = upper_halves(_real(column(nearest, 0)), _real(column(nearest, 1)))
        store_words(w_ptr, first, upper_halves(_real(column(nearest, 2)), _real(column(nearest, 3))), tile, mask)
        low = (bits - (nearest & -65536)) >> (16 - RESIDUAL_BITS)
        tl.store(weights_of(residual_ptr, tile, mask.shape[0]), low.to(residual_ptr.dtype.element_ty), mask=mask[:, None])


@triton.jit
def _step_tile(
    w_ptr, grad_ptr, m_ptr, v_ptr, m_scale_ptr, v_scale_ptr, residual_ptr, w0_ptr, scale_ptr,
    coef, step_size, decay, eps, beta1_rest, beta2, beta2_rest, root_correction, lambda1, rate, lambda2, frozen_eps,
    key, counter_high, first_block, row_blocks, tile, here, writing,
    HAS_W0: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_PROX: tl.constexpr, CLIP_TOTAL: tl.constexpr,
    RESIDUAL_BITS: tl.constexpr, EIGHT_BIT: tl.constexpr, STOCHASTIC: tl.constexpr, TILE_BLOCKS: tl.constexpr,
):  # fmt: skip
    """One tile: (penalty, squared gradient, is 2:4, is broken) of each block."""
    w_raw = load_blocks(w_ptr, tile, here)
    grad = unpack_blocks(load_blocks(grad_ptr, tile, here))
    m_raw = load_blocks(m_ptr, tile, here)
    v_raw = load_blocks(v_ptr, tile, here)
    m_scale = 1.0
    v_scale = 1.0
    if EIGHT_BIT:
        m_scale = tl.load(m_scale_ptr + tile)
        v_scale = tl.load(v_scale_ptr + tile)
    m_old, v_old = _moments(m_raw, v_raw, m_scale, v_scale, EIGHT_BIT)
    w = unpack_blocks(w_raw)
    if RESIDUAL_BITS > 0:
        low = tl.load(weights_of(residual_ptr, tile, TILE_BLOCKS), mask=here[:, None], other=0)
        w = _real(_bits(w) + (low.to(tl.int32) << (16 - RESIDUAL_BITS)))
    penalty = tl.zeros_like(grad)
    pull = tl.zeros_like(grad)
    if HAS_W0:
        penalty, pull = penalty_terms(w, unpack_blocks(load_blocks(w0_ptr, tile, here)), lambda2, frozen_eps)
    w, m, v, square, broken = _adamw(
        w, m_old, v_old, grad, pull, coef, step_size, decay, eps, beta1_rest, beta2, beta2_rest, root_correction, HAS_W0, CLIP_TOTAL
    )
    # The interpreter cannot spread a truth value over a tile, but a number.
    writable = here & (tl.zeros_like(square) + (coef - coef) == 0)
    kept_out = writable & (broken == 0)
    block = tl.arange(0, TILE_BLOCKS)
    random = _random16(key, counter_high, (first_block + tl.cast(tile, tl.int64) * TILE_BLOCKS).to(tl.int32) + block, STOCHASTIC)
    # Before the prox, which then has the registers for itself.
    if EIGHT_BIT:  # its group is coded anew: a block that is left alone keeps its value
        m = tl.where(broken[:, None], m_old, m)
        v = tl.where(broken[:, None], v_old, v)
        _store_moments(m_ptr, v_ptr, m_scale_ptr, v_scale_ptr, m, v, random, tile, writable, writing, True, STOCHASTIC)
    else:
        _store_moments(m_ptr, v_ptr, m_scale_ptr, v_scale_ptr, m, v, random, tile, kept_out, writing, False, STOCHASTIC)
    nan = w != w
    if HAS_PROX:
        scale = w
        if HAS_SCALE:
            scale = load_scale(scale_ptr, tl.cast(tile, tl.int64) * TILE_BLOCKS, tl.arange(0, TILE_BLOCKS), row_blocks)
        w = signed(prox_magnitude(w, scale, lambda1, rate, HAS_SCALE), w)
        first = column(w, 0)
        nan = (first != first)[:, None]  # all of a block or none
    # The card's own NaN is all ones: anything added to its bits would wrap around to -0.0.
    w = tl.where(nan, float("nan"), w)
    _store_weight(w_ptr, residual_ptr, w, random, tile, kept_out, RESIDUAL_BITS, STOCHASTIC)
    is_24 = tl.where(kept_out & (tl.sum(tl.where(w == 0, 1.0, 0.0), axis=1) >= 2), 1.0, 0.0)
    return tl.sum(penalty, axis=1), square, is_24, tl.where(here & broken, 1.0, 0.0)


# A key or an offset must not be a compile-time constant or a reason to compile again.
@triton.jit(do_not_specialize=["key", "counter_high", "first_block", "step_size", "decay", "root_correction", "lambda1", "lambda2"])
def _prox_adamw_kernel(
    w_ptr, grad_ptr, m_ptr, v_ptr, m_scale_ptr, v_scale_ptr, residual_ptr, w0_ptr, scale_ptr, coef_ptr, partial_ptr,
    step_size, decay, eps, beta1_rest, beta2, beta2_rest, root_correction, lambda1, lambda2, frozen_eps,
    key, counter_high, first_block, n_blocks, row_blocks,
    HAS_W0: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_COEF: tl.constexpr, HAS_PROX: tl.constexpr, CLIP_TOTAL: tl.constexpr,
    RESIDUAL_BITS: tl.constexpr, EIGHT_BIT: tl.constexpr, STOCHASTIC: tl.constexpr, EVEN: tl.constexpr,
    TILE_BLOCKS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """A program (one warp) owns TILES consecutive tiles of TILE_BLOCKS blocks; 8-bit moments: a tile is one group of 32 blocks.

    partial[program] = (penalty, sum of squared gradients, 2:4 blocks, blocks with a non-finite gradient). A thread writes only what it has
    read. A non-finite coefficient means that nothing is written; a block with a non-finite gradient keeps its values. EVEN: the last
    tile is whole.
    """
    coef = tl.full((), 1.0, tl.float32)
    if HAS_COEF:
        coef = tl.load(coef_ptr).to(tl.float32)
    writing = (coef - coef) == 0
    rate = 1.0
    if HAS_PROX:
        rate = 1 / lambda1
    program = tl.program_id(0)
    penalty = tl.zeros([TILE_BLOCKS], tl.float32)
    squares = tl.zeros([TILE_BLOCKS], tl.float32)
    count_24 = tl.zeros([TILE_BLOCKS], tl.float32)
    count_broken = tl.zeros([TILE_BLOCKS], tl.float32)
    first = program * TILES
    for tile in range(first, tl.minimum(first + TILES, tl.cdiv(n_blocks, TILE_BLOCKS))):
        value, square, is_24, broken = _step_tile(
            w_ptr, grad_ptr, m_ptr, v_ptr, m_scale_ptr, v_scale_ptr, residual_ptr, w0_ptr, scale_ptr,
            coef, step_size, decay, eps, beta1_rest, beta2, beta2_rest, root_correction, lambda1, rate, lambda2, frozen_eps,
            key, counter_high, first_block, row_blocks, tile, inside(tile, n_blocks, EVEN, TILE_BLOCKS), writing,
            HAS_W0, HAS_SCALE, HAS_PROX, CLIP_TOTAL, RESIDUAL_BITS, EIGHT_BIT, STOCHASTIC, TILE_BLOCKS,
        )  # fmt: skip
        penalty += value
        squares += square
        count_24 += is_24
        count_broken += broken
    at = partial_ptr + program * STATISTICS
    tl.store(at, tl.sum(penalty, axis=0))
    tl.store(at + 1, tl.sum(squares, axis=0))
    tl.store(at + 2, tl.sum(count_24, axis=0))
    tl.store(at + 3, tl.sum(count_broken, axis=0))


def partial_rows(w: Tensor, eight_bit: bool) -> int:
    """Partial sums, STATISTICS numbers each, that a launch leaves; eight_bit: its moments."""
    return fused(interpreted(_prox_adamw_kernel), eight_bit).programs(w.numel() // 4)


def prox_adamw(
    w: Tensor,
    grad: Tensor,
    state: AdamState,
    settings: StepSettings,
    w0: Tensor | None,
    column_scale: Tensor | None,
    grad_coef: Tensor | None,
    partial: Tensor,
) -> None:
    """The step on contiguous tensors, in place. partial: fp32 [partial_rows, STATISTICS] to add up: penalty, squared gradient norm, stepped
    blocks that are 2:4, blocks with a non-finite gradient."""
    n_blocks = w.numel() // 4
    if n_blocks == 0:
        return
    eight_bit = state.exp_avg_scale is not None
    launch = fused(interpreted(_prox_adamw_kernel), eight_bit)
    s = settings
    with torch.cuda.device_of(w):
        _prox_adamw_kernel[(launch.programs(n_blocks),)](
            w,
            grad,
            state.exp_avg,
            state.exp_avg_sq,
            state.exp_avg_scale if eight_bit else partial,
            state.exp_avg_sq_scale if eight_bit else partial,
            w if state.residual is None else state.residual,
            w if w0 is None else w0,
            partial if column_scale is None else column_scale,
            partial if grad_coef is None else grad_coef,
            partial,
            *_scalars(s),
            n_blocks,
            w.shape[-1] // 4,
            HAS_W0=w0 is not None,
            HAS_SCALE=column_scale is not None,
            HAS_COEF=grad_coef is not None,
            HAS_PROX=s.lambda1 >= SMALLEST_LAM,
            CLIP_TOTAL=s.clip_total,
            RESIDUAL_BITS=0 if state.residual is None else 8 * state.residual.element_size(),
            EIGHT_BIT=eight_bit,
            STOCHASTIC=s.stochastic,
            EVEN=n_blocks % launch.tile_blocks == 0,
            TILE_BLOCKS=launch.tile_blocks,
            TILES=launch.tiles,
            num_warps=launch.num_warps,
        )


def _scalars(s: StepSettings) -> tuple[float, ...]:
    """From step_size to first_block, in the kernel's order; corrections and differences in fp64 before they become fp32."""
    adam = (s.lr / (1 - s.beta1**s.step), 1 - s.lr * s.weight_decay, s.eps, 1 - s.beta1, s.beta2, 1 - s.beta2)
    key, counter_high = (half - (1 << 32) if half >= 1 << 31 else half for half in (s.seed & 0xFFFFFFFF, s.seed >> 32))  # signed words
    return *adam, 1 / math.sqrt(1 - s.beta2**s.step), s.lambda1, s.lambda2, s.frozen_eps, key, counter_high, s.offset
