"""Device functions on blocks held in registers: columns of a tile, order, whole-block loads and stores.

A tile of blocks is a [TILE_BLOCKS, 4] tensor whose rows, of tensors aligned to 16 bytes, lie in one thread each, so that `column` and
`join` are register renaming.
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
def weights_at(ptr, first, block):
    """Pointers [TILE_BLOCKS, 4] to the weights of the blocks first + block: 64-bit arithmetic once, then small offsets."""
    return ptr + tl.cast(first, tl.int64) * 4 + block[:, None] * 4 + tl.arange(0, 4)[None, :]


@triton.jit
def words_at(ptr, first, block, N: tl.constexpr):
    """Pointers [TILE_BLOCKS, N] to 32-bit words from the bf16 blocks first + block on: 2 are the block, 4 the next one too."""
    pairs = ptr.to(tl.pointer_type(tl.int32), bitcast=True) + tl.cast(first, tl.int64) * 2
    return pairs + block[:, None] * 2 + tl.arange(0, N)[None, :]


@triton.jit
def weights_of(ptr, tile, TILE_BLOCKS: tl.constexpr):
    """Pointers [TILE_BLOCKS, 4] to the weights of a tile."""
    return weights_at(ptr, tl.cast(tile, tl.int64) * TILE_BLOCKS, tl.arange(0, TILE_BLOCKS))


@triton.jit
def load_blocks_at(ptr, first, block, mask):
    """Raw blocks where `mask`, zeros elsewhere: [TILE_BLOCKS, 4], or the words of bf16 blocks, [TILE_BLOCKS, 2] pairs in 32 bits, which
    take fewer instructions and registers."""
    if ptr.dtype.element_ty == tl.bfloat16:
        return tl.load(words_at(ptr, first, block, 2), mask=mask[:, None], other=0)
    else:
        return tl.load(weights_at(ptr, first, block), mask=mask[:, None], other=0)


@triton.jit
def load_blocks(ptr, tile, mask):
    """`load_blocks_at` of a tile."""
    return load_blocks_at(ptr, tl.cast(tile, tl.int64) * mask.shape[0], tl.arange(0, mask.shape[0]), mask)


@triton.jit
def words(raw):
    """The two words of bf16 blocks as loaded."""
    half = tl.arange(0, 2)[None, :]
    return tl.sum(tl.where(half == 0, raw, 0), axis=1), tl.sum(tl.where(half == 1, raw, 0), axis=1)


@triton.jit
def both_words(first, second):
    """Raw bf16 blocks [TILE_BLOCKS, 2] of their two words."""
    return tl.where(tl.arange(0, 2)[None, :] == 0, first[:, None], second[:, None])


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
    store_raw_at(ptr, both_words(first, second), tl.cast(tile, tl.int64) * mask.shape[0], tl.arange(0, mask.shape[0]), mask)


@triton.jit
def store_blocks(ptr, x, tile, mask):
    """Stores fp32 [TILE_BLOCKS, 4] rounded to the nearest."""
    if ptr.dtype.element_ty == tl.bfloat16:
        first = nearest_pair(column(x, 0), column(x, 1))
        store_words(ptr, first, nearest_pair(column(x, 2), column(x, 3)), tile, mask)
    else:
        tl.store(weights_of(ptr, tile, mask.shape[0]), x.to(ptr.dtype.element_ty), mask=mask[:, None])


@triton.jit
def signed_raw(magnitude, raw, dtype: tl.constexpr):
    """max(magnitude, 0) with the signs of `raw` (as `load_blocks` loaded it), rounded to the nearest of dtype, in the form of `raw`; no
    -0.0. NaN stays NaN."""
    if dtype == tl.bfloat16:
        first, second = words(raw)
        first = signed_pair(column(magnitude, 0), column(magnitude, 1), first)
        second = signed_pair(column(magnitude, 2), column(magnitude, 3), second)
        return both_words(first, second)
    else:
        w = signed(magnitude, raw.to(tl.float32)).to(dtype)
        if dtype == tl.float16:
            w += 0.0  # a negative weight that underflows
        return w


@triton.jit
def store_raw_at(ptr, raw, first, block, mask):
    """Stores blocks in the form of `load_blocks_at`."""
    if ptr.dtype.element_ty == tl.bfloat16:
        tl.store(words_at(ptr, first, block, 2), raw, mask=mask[:, None])
    else:
        tl.store(weights_at(ptr, first, block), raw, mask=mask[:, None])
