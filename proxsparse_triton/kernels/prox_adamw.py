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
from .block import load_blocks, prox_tile, reciprocal, round_to, some, store_blocks, unpack_blocks
from .launch import fused, interpreted
from .prox import MIN_SCALE

STATISTICS = 4
SMALLEST_LAM = 2.0**-126  # the least normal fp32: anything below acts as 0


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _real(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _upper_half(bits):
    """fp32 bits -> the bf16 number of their upper half, as fp32."""
    return _real(bits & -65536)


@triton.jit
def _rounded(x, random8, dtype: tl.constexpr, STOCHASTIC: tl.constexpr, EXPLICIT: tl.constexpr):
    """A moment as its storage type will hold it; stochastic rounding to bf16 keeps what bf16 can represent."""
    if STOCHASTIC and dtype == tl.bfloat16:
        return _upper_half(_bits(x) + (random8 << 8) + 0x80)
    else:
        return round_to(x, dtype, EXPLICIT).to(tl.float32)


@triton.jit
def _random_unit(random8, STOCHASTIC: tl.constexpr):
    """(random8 + 1/2) / 256 by its bits in [1, 2): conversions run at an eighth of the rate of arithmetic."""
    if STOCHASTIC:
        return _real((random8 << 15) | 0x3F800000) - (1 - 1.0 / 512)
    else:
        return tl.zeros_like(random8).to(tl.float32) + 0.5


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
def _largest(x):
    """Of non-negative numbers, which order like their bits."""
    return _real(tl.max(tl.max(_bits(x), axis=1), axis=0))


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
def _penalty(w, w0, lambda2, frozen_eps):
    """lambda2 r^2 and its derivative 2 lambda2 r a (2w - w0); only a^2 = 1 / (w0 + eps sgn(w0))^2 is needed."""
    ratio = w0 + tl.where(w0 < 0, -frozen_eps, frozen_eps)
    product = w * (w - w0)
    pull = lambda2 * reciprocal(tl.maximum(ratio * ratio, 1e-37)) * product  # a tiny eps must not make 0 / 0
    return pull * product, 2 * pull * (2 * w - w0)


@triton.jit
def _random(seed, counter, lane, STOCHASTIC: tl.constexpr):
    """32 random bits a weight, from one Philox call a block; their order does not depend on tiles or shards."""
    if STOCHASTIC:
        r0, r1, r2, r3 = tl.randint4x(seed, counter.to(tl.uint32, bitcast=True), n_rounds=7)
        words = tl.where(lane < 2, tl.where(lane == 0, r0[:, None], r1[:, None]), tl.where(lane == 2, r2[:, None], r3[:, None]))
        return words.to(tl.int32, bitcast=True)
    else:
        return tl.zeros_like(counter)[:, None] + 0 * lane


@triton.jit
def _split(w, random, dtype: tl.constexpr, RESIDUAL_BITS: tl.constexpr, STOCHASTIC: tl.constexpr, EXPLICIT: tl.constexpr):
    """fp32 w -> what is stored of it, as fp32, and the residual's low bits."""
    bits = tl.where(w == w, _bits(w), 0x7FC00000)  # random bits on top of a NaN of all ones would wrap around to -0.0
    if RESIDUAL_BITS == 0:
        if STOCHASTIC and dtype == tl.bfloat16:
            return _upper_half(bits + (random & 0xFFFF)), bits
        else:
            return round_to(w, dtype, EXPLICIT).to(tl.float32), bits
    else:
        if RESIDUAL_BITS == 8:
            if STOCHASTIC:
                bits = (bits + (random & 0xFF)) & -256
            else:
                bits = (bits + 0x7F + ((bits >> 8) & 1)) & -256
        high = (bits + 0x8000) & -65536
        return _real(high), (bits - high) >> (16 - RESIDUAL_BITS)


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
    m_ptr, v_ptr, m_scale_ptr, v_scale_ptr, m, v, random, block, writable, group_writable,
    EIGHT_BIT: tl.constexpr, STOCHASTIC: tl.constexpr, EXPLICIT: tl.constexpr,
):  # fmt: skip
    m_random = (random >> 16) & 0xFF
    v_random = (random >> 24) & 0xFF
    if EIGHT_BIT:
        offset = block[:, None] * 4 + tl.arange(0, 4)[None, :]
        writing = (block < writable)[:, None]
        m_scale = _largest(tl.abs(m))
        v_scale = _largest(v)
        tl.store(m_ptr + offset, _encode_first(m, m_scale, _random_unit(m_random, STOCHASTIC)), mask=writing)
        tl.store(v_ptr + offset, _encode_second(v, v_scale, _random_unit(v_random, STOCHASTIC)), mask=writing)
        tl.store(m_scale_ptr, m_scale, mask=group_writable)
        tl.store(v_scale_ptr, v_scale, mask=group_writable)
    else:
        store_blocks(m_ptr, _rounded(m, m_random, m_ptr.dtype.element_ty, STOCHASTIC, EXPLICIT), block, writable)
        store_blocks(v_ptr, _rounded(v, v_random, v_ptr.dtype.element_ty, STOCHASTIC, EXPLICIT), block, writable)


@triton.jit
def _step_tile(
    w_raw, grad_raw, m_raw, v_raw, w_ptr, m_ptr, v_ptr, m_scale_ptr, v_scale_ptr, residual_ptr, w0_ptr, scale_ptr,
    coef, step_size, decay, eps, beta1_rest, beta2, beta2_rest, root_correction, lambda1, lambda2, frozen_eps,
    seed, counter, block, column_block, left, writable, group_left, group_writable,
    HAS_W0: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_PROX: tl.constexpr, CLIP_TOTAL: tl.constexpr,
    RESIDUAL_BITS: tl.constexpr, EIGHT_BIT: tl.constexpr, STOCHASTIC: tl.constexpr, EXPLICIT: tl.constexpr,
):  # fmt: skip
    """One tile: (penalty, squared gradient, is 2:4, is broken) of each block, [TILE_BLOCKS] each."""
    lane = tl.arange(0, 4)[None, :]
    inside = (block < left)[:, None]
    offset = block[:, None] * 4 + lane
    m_scale = 1.0
    v_scale = 1.0
    if EIGHT_BIT:
        m_scale = tl.load(m_scale_ptr, mask=group_left, other=0.0)
        v_scale = tl.load(v_scale_ptr, mask=group_left, other=0.0)
    m_old, v_old = _moments(m_raw, v_raw, m_scale, v_scale, EIGHT_BIT)
    w_old = unpack_blocks(w_raw)
    if RESIDUAL_BITS > 0:
        w_old = _real(_bits(w_old) + (tl.load(residual_ptr + offset, mask=inside, other=0).to(tl.int32) << (16 - RESIDUAL_BITS)))
    grad = unpack_blocks(grad_raw)
    penalty = tl.zeros_like(grad)
    pull = tl.zeros_like(grad)
    if HAS_W0:
        penalty, pull = _penalty(w_old, unpack_blocks(load_blocks(w0_ptr, block, left)), lambda2, frozen_eps)
    w, m, v, square, broken = _adamw(
        w_old, m_old, v_old, grad, pull, coef, step_size, decay, eps, beta1_rest, beta2, beta2_rest, root_correction, HAS_W0, CLIP_TOTAL
    )
    if HAS_PROX:
        scale = w
        if HAS_SCALE:
            scale = tl.load(scale_ptr + column_block[:, None] * 4 + lane, mask=inside, other=1.0).to(tl.float32)
            scale = tl.maximum(scale, MIN_SCALE)
        w = prox_tile(w, scale, lambda1, HAS_SCALE, EXPLICIT)
    if some(broken):
        w = tl.where(broken[:, None], w_old, w)
        m = tl.where(broken[:, None], m_old, m)
        v = tl.where(broken[:, None], v_old, v)
    random = _random(seed, counter, lane, STOCHASTIC)
    stored, low = _split(w, random, w_ptr.dtype.element_ty, RESIDUAL_BITS, STOCHASTIC, EXPLICIT)
    store_blocks(w_ptr, stored, block, writable)
    if RESIDUAL_BITS > 0:
        tl.store(residual_ptr + offset, low.to(residual_ptr.dtype.element_ty), mask=(block < writable)[:, None])
    _store_moments(m_ptr, v_ptr, m_scale_ptr, v_scale_ptr, m, v, random, block, writable, group_writable, EIGHT_BIT, STOCHASTIC, EXPLICIT)
    is_24 = tl.where((block < left) & (tl.sum(tl.where(stored == 0, 1.0, 0.0), axis=1) >= 2), 1.0, 0.0)
    return tl.sum(penalty, axis=1), square, is_24, tl.where((block < left) & broken, 1.0, 0.0)


# A key or an offset must not be a compile-time constant or a reason to compile again.
@triton.jit(do_not_specialize=["seed", "first_block", "step_size", "decay", "root_correction", "lambda1", "lambda2"])
def _prox_adamw_kernel(
    w_ptr, grad_ptr, m_ptr, v_ptr, m_scale_ptr, v_scale_ptr, residual_ptr, w0_ptr, scale_ptr, coef_ptr, partial_ptr,
    step_size, decay, eps, beta1_rest, beta2, beta2_rest, root_correction, lambda1, lambda2, frozen_eps,
    seed, first_block, n_blocks, row_blocks,
    HAS_W0: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_COEF: tl.constexpr, HAS_PROX: tl.constexpr, CLIP_TOTAL: tl.constexpr,
    RESIDUAL_BITS: tl.constexpr, EIGHT_BIT: tl.constexpr, STOCHASTIC: tl.constexpr,
    TILE_BLOCKS: tl.constexpr, TILES: tl.constexpr, EXPLICIT: tl.constexpr,
):  # fmt: skip
    """One program (one warp) owns TILES consecutive tiles of TILE_BLOCKS blocks; 8-bit moments: a tile is one group of 32 blocks.

    The next tile is loaded before the current one is stepped. partial[program] = (penalty, sum of squared gradients, 2:4 blocks, blocks
    with a non-finite gradient). A thread writes only what it has read. A non-finite coefficient means that nothing is written; a block
    with a non-finite gradient keeps its values.
    """
    penalty = tl.zeros([TILE_BLOCKS], tl.float32)
    squares = tl.zeros([TILE_BLOCKS], tl.float32)
    count_24 = tl.zeros([TILE_BLOCKS], tl.float32)
    count_broken = tl.zeros([TILE_BLOCKS], tl.float32)
    coef = tl.full((), 1.0, tl.float32)
    if HAS_COEF:
        coef = tl.load(coef_ptr).to(tl.float32)
    # 64-bit arithmetic once a program; within it offsets are small.
    program = tl.program_id(0).to(tl.int64)
    first = program * (TILE_BLOCKS * TILES)
    at = first * 4
    left = tl.minimum(n_blocks - first, TILE_BLOCKS * TILES).to(tl.int32)
    writable = tl.where((coef - coef) == 0, left, 0)  # nothing where the coefficient is not finite
    column = (first % row_blocks).to(tl.int32)
    counter = (first_block + first).to(tl.int32)
    block = tl.arange(0, TILE_BLOCKS)
    w_raw = load_blocks(w_ptr + at, block, left)
    grad_raw = load_blocks(grad_ptr + at, block, left)
    m_raw = load_blocks(m_ptr + at, block, left)
    v_raw = load_blocks(v_ptr + at, block, left)
    for tile in range(TILES):
        w, grad, m, v = w_raw, grad_raw, m_raw, v_raw
        following = block + TILE_BLOCKS
        w_raw = load_blocks(w_ptr + at, following, left)
        grad_raw = load_blocks(grad_ptr + at, following, left)
        m_raw = load_blocks(m_ptr + at, following, left)
        v_raw = load_blocks(v_ptr + at, following, left)
        group = program * TILES + tile
        value, square, is_24, broken = _step_tile(
            w, grad, m, v, w_ptr + at, m_ptr + at, v_ptr + at, m_scale_ptr + group, v_scale_ptr + group,
            residual_ptr + at, w0_ptr + at, scale_ptr,
            coef, step_size, decay, eps, beta1_rest, beta2, beta2_rest, root_correction, lambda1, lambda2, frozen_eps,
            seed, counter + block, block, (column + block) % row_blocks, left, writable,
            tile * TILE_BLOCKS < left, tile * TILE_BLOCKS < writable,
            HAS_W0, HAS_SCALE, HAS_PROX, CLIP_TOTAL, RESIDUAL_BITS, EIGHT_BIT, STOCHASTIC, EXPLICIT,
        )  # fmt: skip
        penalty += value
        squares += square
        count_24 += is_24
        count_broken += broken
        block = following
    tl.store(partial_ptr + program * 4, tl.sum(penalty, axis=0))
    tl.store(partial_ptr + program * 4 + 1, tl.sum(squares, axis=0))
    tl.store(partial_ptr + program * 4 + 2, tl.sum(count_24, axis=0))
    tl.store(partial_ptr + program * 4 + 3, tl.sum(count_broken, axis=0))


def prox_adamw(
    w: Tensor,
    grad: Tensor,
    state: AdamState,
    settings: StepSettings,
    w0: Tensor | None,
    column_scale: Tensor | None,
    grad_coef: Tensor | None,
) -> Tensor:
    """The step on contiguous tensors, in place; fp64 [4]: penalty, squared gradient norm, 2:4 blocks, blocks with a non-finite gradient."""
    n_blocks = w.numel() // 4
    eight_bit = state.exp_avg_scale is not None
    explicit = interpreted(_prox_adamw_kernel)
    launch = fused(explicit, eight_bit)
    programs = triton.cdiv(n_blocks, launch.tile_blocks * launch.tiles)
    if programs == 0:
        return torch.zeros(STATISTICS, dtype=torch.float64, device=w.device)
    partial = torch.empty(programs, STATISTICS, dtype=torch.float32, device=w.device)
    s = settings
    with torch.cuda.device_of(w):
        _prox_adamw_kernel[(programs,)](
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
            TILE_BLOCKS=launch.tile_blocks,
            TILES=launch.tiles,
            EXPLICIT=explicit,
            num_warps=launch.num_warps,
        )
    return partial.sum(0, dtype=torch.float64)


def _scalars(s: StepSettings) -> tuple[float, ...]:
    """From step_size to first_block, in the kernel's order; corrections and differences in fp64 before they become fp32."""
    adam = (s.lr / (1 - s.beta1**s.step), 1 - s.lr * s.weight_decay, s.eps, 1 - s.beta1, s.beta2, 1 - s.beta2)
    key = s.seed - (1 << 64) if s.seed >= 1 << 63 else s.seed  # a launcher passes 64 bits as a signed integer
    return *adam, 1 / math.sqrt(1 - s.beta2**s.step), s.lambda1, s.lambda2, s.frozen_eps, key, s.offset
