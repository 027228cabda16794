"""Device functions on blocks held in registers: columns of a tile, order, whole-block loads and stores.

A tile of blocks is a [TILE_BLOCKS, 4] tensor whose rows lie in one thread each, so that `column` and `join` are register renaming.
"""

import triton
import triton.language as tl

from .ptx import halves, nearest_pair, signed, signed_pair


@triton.jit
def column(x, index: tl.constexpr):
    """Column `index` of a [TILE_BLOCKS, 4] tile."""
    lane = tl.arange(0, 4)[None, :]
    if x.dtype == tl.float32:  # as integers: adding 0.0 is not free, it would turn -0.0 into 0.0
        return tl.sum(tl.where(lane == index, x.to(tl.int32, bitcast=True), 0), axis=1).to(tl.float32, bitcast=True)
    else:
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
def inside(tile, n_blocks, EVEN: tl.constexpr, TILE_BLOCKS: tl.constexpr):
    """Which blocks of a tile there are; EVEN: all, and then loads and stores need no mask."""
    block = tl.arange(0, TILE_BLOCKS)
    if EVEN:
        return block == block
    else:
        return block < tl.minimum(n_blocks - tl.cast(tile, tl.int64) * TILE_BLOCKS, TILE_BLOCKS).to(tl.int32)


@triton.jit
def weights_of(ptr, tile, TILE_BLOCKS: tl.constexpr):
    """Pointers [TILE_BLOCKS, 4] to the weights of a tile: 64-bit arithmetic once, then small offsets."""
    return ptr + tl.cast(tile, tl.int64) * (TILE_BLOCKS * 4) + tl.arange(0, TILE_BLOCKS)[:, None] * 4 + tl.arange(0, 4)[None, :]


@triton.jit
def words_of(ptr, tile, TILE_BLOCKS: tl.constexpr):
    """Pointers [TILE_BLOCKS, 2] to the 32-bit words of a tile of bf16 blocks."""
    pairs = ptr.to(tl.pointer_type(tl.int32), bitcast=True) + tl.cast(tile, tl.int64) * (TILE_BLOCKS * 2)
    return pairs + tl.arange(0, TILE_BLOCKS)[:, None] * 2 + tl.arange(0, 2)[None, :]


@triton.jit
def load_blocks(ptr, tile, mask):
    """A raw tile where `mask`, zeros elsewhere: [TILE_BLOCKS, 4], or the words of bf16 blocks, [TILE_BLOCKS, 2] pairs in 32 bits, which
    take fewer instructions and registers."""
    if ptr.dtype.element_ty == tl.bfloat16:
        return tl.load(words_of(ptr, tile, mask.shape[0]), mask=mask[:, None], other=0)
    else:
        return tl.load(weights_of(ptr, tile, mask.shape[0]), mask=mask[:, None], other=0)


@triton.jit
def words(raw):
    """The two words of bf16 blocks as loaded."""
    half = tl.arange(0, 2)[None, :]
    return tl.sum(tl.where(half == 0, raw, 0), axis=1), tl.sum(tl.where(half == 1, raw, 0), axis=1)


@triton.jit
def unpack_words(first, second):
    """The two words of bf16 blocks -> fp32 [TILE_BLOCKS, 4]."""
    a, b = halves(first)
    c, d = halves(second)
    return join(a, b, c, d)


@triton.jit
def unpack_blocks(raw):
    """What `load_blocks` loaded -> fp32 [TILE_BLOCKS, 4]."""
    if raw.dtype == tl.int32:
        first, second = words(raw)
        return unpack_words(first, second)
    else:
        return raw.to(tl.float32)


@triton.jit
def store_words(ptr, first, second, tile, mask):
    """Stores a tile of bf16 blocks given as their two words."""
    both = tl.where(tl.arange(0, 2)[None, :] == 0, first[:, None], second[:, None])
    tl.store(words_of(ptr, tile, mask.shape[0]), both, mask=mask[:, None])


@triton.jit
def store_blocks(ptr, x, tile, mask):
    """Stores fp32 [TILE_BLOCKS, 4] rounded to the nearest."""
    if ptr.dtype.element_ty == tl.bfloat16:
        first = nearest_pair(column(x, 0), column(x, 1))
        store_words(ptr, first, nearest_pair(column(x, 2), column(x, 3)), tile, mask)
    else:
        tl.store(weights_of(ptr, tile, mask.shape[0]), x.to(ptr.dtype.element_ty), mask=mask[:, None])


@triton.jit
def store_signed(ptr, magnitude, raw, tile, mask):
    """Stores max(magnitude, 0) with the signs of `raw` (of ptr's type, as loaded), rounded to the nearest; no -0.0. NaN stays NaN."""
    if ptr.dtype.element_ty == tl.bfloat16:
        first, second = words(raw)
        first = signed_pair(column(magnitude, 0), column(magnitude, 1), first)
        store_words(ptr, first, signed_pair(column(magnitude, 2), column(magnitude, 3), second), tile, mask)
    else:
        w = signed(magnitude, raw.to(tl.float32)).to(ptr.dtype.element_ty)
        if ptr.dtype.element_ty == tl.float16:
            w += 0.0  # a negative weight that underflows
        tl.store(weights_of(ptr, tile, mask.shape[0]), w, mask=mask[:, None])
