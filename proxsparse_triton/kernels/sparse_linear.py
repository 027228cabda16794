"""y = x @ w.T + bias for few tokens, w in its packed 2:4 form: 9/16 of the bytes, read once, at the roof of memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compiled import run
from .fragments import hopper_metadata, load_matrices, mma_24
from .launch import Decode
from .ptx import PTX, round_to
from .staging import (
    commit,
    copy_again,
    copy_once,
    copy_word,
    get_four,
    get_word,
    meet,
    meet_all,
    put_four,
    reserve,
    shared_base,
    wait,
)

LINEAR, HOPPER, AMPERE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
ORDERS = {"linear": LINEAR, "hopper": HOPPER, "ampere": AMPERE}


@triton.jit
def _pairs(pointer, at, inside):
    """Two 16-bit numbers as one word."""
    return tl.load(pointer.to(tl.pointer_type(tl.int32)) + at // 2, mask=inside, other=0)


@triton.jit
def _hopper_at(tile, column_half, width):
    """Where cuSPARSELt's order has the metadata of 16 rows x 32 columns, 32 words: tiles of 64 x 32 one after the other along the rows."""
    return (tile // 4 * (width // 32) + column_half) * 128 + tile % 4 * 32


@triton.jit
def _ampere_at(tile, column_half, lane, rows):
    """Where CUTLASS's order has a lane's metadata as `mma_24` takes it, in pairs of words: tiles of 32 x 32 one below the other."""
    return ((column_half * (rows // 32) + tile // 2) * 8 + lane // 4) * 4 + tile % 2 * 2 + lane % 2


@triton.jit
def _metadata(metadata_ptr, tile, segment, lane, rows, width, ORDER: tl.constexpr):
    """A lane's metadata as `mma_24` takes it, straight from memory; beyond the last column positions 0 and 1, or zeros."""
    g = lane // 4
    word = segment * 4 + lane % 4
    inside = word < (width + 15) // 16
    if ORDER == HOPPER:
        # A word a block b = 0..3, of nibbles (g, b), (g + 8, b), (g, b + 4), (g + 8, b + 4).
        at = metadata_ptr + _hopper_at(tile, word // 2, width) + g * 4
        low = tl.zeros_like(word)
        high = tl.zeros_like(word)
        for block in tl.static_range(4):
            pair = tl.load(at + block, mask=inside, other=0).to(tl.int32) >> (word % 2 * 8)
            low |= (pair & 15) << (4 * block)
            high |= ((pair >> 4) & 15) << (4 * block)
        return low | (high << 16)
    elif ORDER == AMPERE:
        return _pairs(metadata_ptr, _ampere_at(tile, word // 2, lane, rows) * 2, inside)
    else:
        at = metadata_ptr + (tile * 16 + g).to(tl.int64) * ((width + 15) // 16) + word
        low = tl.load(at, mask=inside, other=0x4444).to(tl.int32)
        high = tl.load(at + 8 * ((width + 15) // 16), mask=inside, other=0x4444).to(tl.int32)
        return (low & 0xFFFF) | (high << 16)


@triton.jit
def _stage(
    to, ring, pointers, sizes, segment, tile, last_tile, first_token, lane, row_warp,
    TILES: tl.constexpr, SEGMENTS: tl.constexpr, ROW_WARPS: tl.constexpr, TOKENS: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """Starts the copies of SEGMENTS x 64 columns: this warp's weights and metadata, and its share of the x of its row warps.

    Chunks of 16 bytes are stored at chunk ^ row, so that no two rows that `load_matrices` reads together share banks.
    """
    weights_to, metadata_to, x_to = ring[0] + to, ring[1] + to, ring[2] + to
    x_ptr, values_ptr, metadata_ptr = pointers
    tokens, rows, width = sizes
    CHUNKS: tl.constexpr = 4 * SEGMENTS  # of a row's values
    row = lane // CHUNKS
    chunk = lane % CHUNKS
    size = tl.where(segment * 64 + chunk * 16 < width, 16, 0)
    for step in tl.static_range(TILES * 2 * SEGMENTS):
        at = row + step * (32 // CHUNKS)
        place = at * CHUNKS + (chunk ^ (at % 8 if SEGMENTS > 1 else at // 2 % 4))
        from_row = tl.minimum(tile + at // 16, last_tile).to(tl.int64) * 16 + at % 16
        copy_once(weights_to + place * 16, values_ptr + from_row * (width // 2) + segment * 32 + chunk * 8, size)
    if ORDER != LINEAR:
        for s in tl.static_range(SEGMENTS):
            half = (segment + s) * 2 + (lane // 16 if ORDER == HOPPER else lane % 4 // 2)
            half = tl.minimum(half, width // 32 - 1)
            for r in tl.static_range(TILES):
                group = tl.minimum(tile + r, last_tile)
                if ORDER == HOPPER:
                    place = _hopper_at(group, half, width) + lane % 16 * 2
                else:
                    place = _ampere_at(group, half, lane, rows) * 2
                copy_word(metadata_to + (s * TILES + r) * 128 + lane * 4, metadata_ptr + place)
    X_CHUNKS: tl.constexpr = 8 * SEGMENTS  # of a token's x
    for step in tl.static_range((TOKENS * X_CHUNKS + ROW_WARPS * 32 - 1) // (ROW_WARPS * 32)):
        index = step * (ROW_WARPS * 32) + row_warp * 32 + lane
        token = index // X_CHUNKS
        chunk = index % X_CHUNKS
        here = (token < TOKENS) & (first_token + token < tokens)
        size = tl.where(segment * 64 + chunk * 8 < width, 16, 0)
        source = x_ptr + (first_token + token).to(tl.int64) * width + segment * 64 + chunk * 8
        copy_again(x_to + (token * X_CHUNKS + (chunk ^ (token % 8))) * 16, source, size, here)
    commit()


@triton.jit
def _store_four(y_ptr, bias_ptr, row, token, rows, tokens, a, b, c, d, here, HAS_BIAS: tl.constexpr):
    """The sums of (row, token), (row, token + 1), (row + 8, token), (row + 8, token + 1), in fp32 until here."""
    first = here & (row < rows)
    at = y_ptr + token.to(tl.int64) * rows + row
    if HAS_BIAS:
        low = tl.load(bias_ptr + row, mask=first, other=0).to(tl.float32)
        high = tl.load(bias_ptr + row + 8, mask=first, other=0).to(tl.float32)
        a, b, c, d = a + low, b + low, c + high, d + high
    tl.store(at, round_to(a, y_ptr.dtype.element_ty), mask=first & (token < tokens))
    tl.store(at + rows, round_to(b, y_ptr.dtype.element_ty), mask=first & (token + 1 < tokens))
    tl.store(at + 8, round_to(c, y_ptr.dtype.element_ty), mask=first & (token < tokens))
    tl.store(at + rows + 8, round_to(d, y_ptr.dtype.element_ty), mask=first & (token + 1 < tokens))


@triton.jit
def _weights(values_ptr, staged, tile, segment, s, lane, width, SEGMENTS: tl.constexpr):
    """Values of 16 rows x 64 columns as `mma_24` takes them: the registers of the first 32 columns, then of the others."""
    found = ()
    for half in tl.static_range(2):
        if PTX:
            row = lane % 16
            chunk = (s * 4 + half * 2 + lane // 16) ^ (row % 8 if SEGMENTS > 1 else row // 2 % 4)
            found = found + load_matrices(staged + (row * (4 * SEGMENTS) + chunk) * 16)
        else:
            column = segment * 32 + half * 16 + lane % 4 * 2
            place = (tile * 16 + lane // 4).to(tl.int64) * (width // 2) + column
            below = place + 8 * (width // 2)
            near, far = column < width // 2, column + 8 < width // 2
            found = found + (_pairs(values_ptr, place, near), _pairs(values_ptr, below, near))
            found = found + (_pairs(values_ptr, place + 8, far), _pairs(values_ptr, below + 8, far))
    return found


@triton.jit
def _tokens(x_ptr, staged, staged_row, segment, s, token, tokens, lane, width, SEGMENTS: tl.constexpr):
    """x of 8 tokens x 64 columns as `mma_24` takes it."""
    found = ()
    for half in tl.static_range(2):
        if PTX:
            chunk = (s * 8 + half * 4 + lane // 8) ^ staged_row
            found = found + load_matrices(staged + chunk * 16)
        else:
            for part in tl.static_range(4):
                column = segment * 64 + half * 32 + part * 8 + lane % 4 * 2
                found = found + (_pairs(x_ptr, token.to(tl.int64) * width + column, (token < tokens) & (column < width)),)
    return found


@triton.jit
def _multiply(
    sums, at, ring, pointers, sizes, staged_row, segment, s, tile, last_tile, first_token, lane,
    ORDER: tl.constexpr, TILES: tl.constexpr, SEGMENTS: tl.constexpr, TOKEN_TILES: tl.constexpr,
):  # fmt: skip
    """The sums with the products of 64 columns added."""
    weights_at, metadata_at, x_at = ring[0] + at, ring[1] + at, ring[2] + at + staged_row * (SEGMENTS * 128)
    x_ptr, values_ptr, metadata_ptr = pointers
    tokens, rows, width = sizes
    DTYPE: tl.constexpr = values_ptr.dtype.element_ty
    weights = ()
    metadata = ()
    for r in tl.static_range(TILES):
        group = tl.minimum(tile + r, last_tile)
        weights = weights + (_weights(values_ptr, weights_at + r * (SEGMENTS * 1024), group, segment, s, lane, width, SEGMENTS),)
        staged = metadata_at + (s * TILES + r) * 128
        if PTX and ORDER == HOPPER:
            metadata = metadata + (hopper_metadata(staged + lane % 4 // 2 * 64 + lane // 4 * 8, lane % 2 == 1),)
        elif PTX and ORDER == AMPERE:
            metadata = metadata + (get_word(staged + lane * 4),)
        else:
            metadata = metadata + (_metadata(metadata_ptr, group, segment, lane, rows, width, ORDER),)
    added = ()
    for n in tl.static_range(TOKEN_TILES):
        staged = x_at + n * (SEGMENTS * 1024)
        x = _tokens(x_ptr, staged, staged_row, segment, s, first_token + n * 8 + lane // 4, tokens, lane, width, SEGMENTS)
        for r in tl.static_range(TILES):
            w = weights[r]
            c = mma_24(
                w[0], w[1], w[2], w[3], x[0], x[1], x[2], x[3], sums[(n * TILES + r) * 4], sums[(n * TILES + r) * 4 + 1],
                sums[(n * TILES + r) * 4 + 2], sums[(n * TILES + r) * 4 + 3], metadata[r], DTYPE, 0,
            )  # fmt: skip
            added = added + mma_24(
                w[4], w[5], w[6], w[7], x[4], x[5], x[6], x[7], c[0], c[1], c[2], c[3], metadata[r], DTYPE, 1
            )  # fmt: skip
    return added


@triton.jit
def _sums(
    ring, pointers, sizes, column_warp, row_warp, lane, tile, last_tile, first_token,
    ORDER: tl.constexpr, TILES: tl.constexpr, COLUMN_WARPS: tl.constexpr, ROW_WARPS: tl.constexpr, SEGMENTS: tl.constexpr,
    STAGES: tl.constexpr, STAGE: tl.constexpr, TOKEN_TILES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """The sums of a warp over its columns: four of `mma_24` for each tile of 16 rows and 8 tokens."""
    width = sizes[2]
    staged_row = tl.minimum(lane % 8, TOKENS - 1)  # tokens beyond those staged repeat: their sums are not stored
    sums = ()
    for _ in tl.static_range(TILES * TOKEN_TILES * 4):
        sums = sums + (tl.zeros(lane.shape, tl.float32),)
    if PTX:
        for stage in tl.static_range(STAGES - 1):
            _stage(
                stage * STAGE, ring, pointers, sizes, (stage * COLUMN_WARPS + column_warp) * SEGMENTS, tile, last_tile, first_token,
                lane, row_warp, TILES, SEGMENTS, ROW_WARPS, TOKENS, ORDER,
            )  # fmt: skip
    at = 0
    to = (STAGES - 1) * STAGE
    for turn in range(0, tl.cdiv(tl.cdiv(width, 64), COLUMN_WARPS * SEGMENTS)):
        segment = (turn * COLUMN_WARPS + column_warp) * SEGMENTS
        if PTX:
            wait(STAGES - 2)
            meet(column_warp + 1, ROW_WARPS)  # all see what has arrived, and all have read what the next copies overwrite
            _stage(
                to, ring, pointers, sizes, segment + (STAGES - 1) * COLUMN_WARPS * SEGMENTS, tile, last_tile, first_token,
                lane, row_warp, TILES, SEGMENTS, ROW_WARPS, TOKENS, ORDER,
            )  # fmt: skip
        for s in tl.static_range(SEGMENTS):
            sums = _multiply(
                sums, at, ring, pointers, sizes, staged_row, segment + s, s, tile, last_tile, first_token, lane,
                ORDER, TILES, SEGMENTS, TOKEN_TILES,
            )  # fmt: skip
        at = tl.where(at == (STAGES - 1) * STAGE, 0, at + STAGE)
        to = tl.where(to == (STAGES - 1) * STAGE, 0, to + STAGE)
    return sums


@triton.jit(do_not_specialize=["tokens"])
def _sparse_linear_kernel(
    x_ptr, values_ptr, metadata_ptr, bias_ptr, y_ptr, tokens, rows, width,
    HAS_BIAS: tl.constexpr, ORDER: tl.constexpr, TILES: tl.constexpr, COLUMN_WARPS: tl.constexpr, ROW_WARPS: tl.constexpr,
    SEGMENTS: tl.constexpr, STAGES: tl.constexpr, TOKEN_TILES: tl.constexpr, TOKENS: tl.constexpr, RESERVED: tl.constexpr,
):  # fmt: skip
    """y[token, row] = sum over blocks and kept weights of value * x[token, 4 block + position] (+ bias[row]), summed in fp32.

    One program owns 16 TILES ROW_WARPS rows and 8 TOKEN_TILES tokens. Its warps part the rows in ROW_WARPS and the columns in
    COLUMN_WARPS, by turns of SEGMENTS x 64; the sums of the column warps are added in a fixed order. Reads the packed weight, 9/8 bytes a
    weight of 2 bytes, once; x passes from L2 once for every row of programs. Weights, metadata and x go through a ring of STAGES in
    shared memory, and `mma_24` takes the weights as they are: nothing is unpacked.
    """
    WARPS: tl.constexpr = COLUMN_WARPS * ROW_WARPS
    WEIGHT_BYTES: tl.constexpr = WARPS * SEGMENTS * TILES * 1024
    METADATA_BYTES: tl.constexpr = WARPS * SEGMENTS * TILES * 128
    X_BYTES: tl.constexpr = TOKENS * SEGMENTS * 128  # of one column warp
    STAGE: tl.constexpr = WEIGHT_BYTES + METADATA_BYTES + COLUMN_WARPS * X_BYTES
    thread = tl.arange(0, WARPS * 32)
    lane = thread % 32
    warp = thread // 32
    column_warp = warp % COLUMN_WARPS
    row_warp = warp // COLUMN_WARPS
    tile = (tl.program_id(0) * ROW_WARPS + row_warp) * TILES
    first_token = tl.program_id(1) * (TOKEN_TILES * 8)
    pointers, sizes = (x_ptr, values_ptr, metadata_ptr), (tokens, rows, width)
    base = shared_base() if PTX else 0
    ring = (
        base + warp * (SEGMENTS * TILES * 1024),
        base + WEIGHT_BYTES + warp * (SEGMENTS * TILES * 128),
        base + WEIGHT_BYTES + METADATA_BYTES + column_warp * X_BYTES,
    )
    sums = _sums(
        ring, pointers, sizes, column_warp, row_warp, lane, tile, rows // 16 - 1, first_token,
        ORDER, TILES, COLUMN_WARPS, ROW_WARPS, SEGMENTS, STAGES, STAGE, TOKEN_TILES, TOKENS,
    )  # fmt: skip
    _finish(
        sums, y_ptr, bias_ptr, warp, row_warp, column_warp, lane, tile, first_token, rows, tokens,
        HAS_BIAS, TILES, COLUMN_WARPS, ROW_WARPS, TOKEN_TILES,
    )  # fmt: skip
    if PTX and RESERVED > 0 and tokens < 0:
        reserve(y_ptr, RESERVED)


@triton.jit
def _finish(
    sums, y_ptr, bias_ptr, warp, row_warp, column_warp, lane, tile, first_token, rows, tokens,
    HAS_BIAS: tl.constexpr, TILES: tl.constexpr, COLUMN_WARPS: tl.constexpr, ROW_WARPS: tl.constexpr, TOKEN_TILES: tl.constexpr,
):  # fmt: skip
    """Adds the sums of the column warps, first to last, and stores them; on the card through the ring, 16 rows and 8 tokens a warp."""
    WARPS: tl.constexpr = COLUMN_WARPS * ROW_WARPS
    FRAGMENTS: tl.constexpr = ROW_WARPS * TILES * TOKEN_TILES
    g = lane // 4
    t = lane % 4
    if PTX:
        ring = shared_base()
        wait(0)
        meet_all()
        for n in tl.static_range(TOKEN_TILES):
            for r in tl.static_range(TILES):
                place = ((row_warp * TILES + r) * TOKEN_TILES + n) * COLUMN_WARPS + column_warp
                put_four(
                    ring + place * 512 + lane * 16,
                    sums[(n * TILES + r) * 4], sums[(n * TILES + r) * 4 + 1], sums[(n * TILES + r) * 4 + 2], sums[(n * TILES + r) * 4 + 3],
                )  # fmt: skip
        meet_all()
        for step in tl.static_range((FRAGMENTS + WARPS - 1) // WARPS):
            fragment = tl.minimum(step * WARPS + warp, FRAGMENTS - 1)
            source = ring + fragment * (COLUMN_WARPS * 512) + lane * 16
            a, b, c, d = get_four(source)
            for k in tl.static_range(1, COLUMN_WARPS):
                more = get_four(source + k * 512)
                a, b, c, d = a + more[0], b + more[1], c + more[2], d + more[3]
            row = (tl.program_id(0) * ROW_WARPS * TILES + fragment // TOKEN_TILES) * 16 + g
            token = first_token + fragment % TOKEN_TILES * 8 + t * 2
            _store_four(y_ptr, bias_ptr, row, token, rows, tokens, a, b, c, d, step * WARPS + warp < FRAGMENTS, HAS_BIAS)
    else:
        for n in tl.static_range(TOKEN_TILES):
            for r in tl.static_range(TILES):
                total = ()
                for k in tl.static_range(4):
                    parts = tl.reshape(sums[(n * TILES + r) * 4 + k], [ROW_WARPS, COLUMN_WARPS, 32])
                    part = tl.sum(parts, axis=1)[:, None, :]
                    total = total + (tl.reshape(tl.broadcast_to(part, [ROW_WARPS, COLUMN_WARPS, 32]), [WARPS * 32]),)
                token = first_token + n * 8 + t * 2
                _store_four(
                    y_ptr, bias_ptr, (tile + r) * 16 + g, token, rows, tokens, total[0], total[1], total[2], total[3],
                    column_warp == 0, HAS_BIAS,
                )  # fmt: skip


def sparse_linear(
    x: Tensor, values: Tensor | int, metadata: Tensor | int, bias: Tensor | None, y: Tensor, order: str, launch: Decode
) -> None:
    """Writes x @ w.T + bias into y [..., out]; x [tokens, in] and all others contiguous, 16-byte aligned, of one 16-bit dtype.

    values, metadata: tensors, or on a GPU their addresses. out and in divide by 16, in the "hopper" order by 64 and 32, in the "ampere"
    order by 32.
    """
    tokens, width = x.shape
    rows = y.shape[-1]
    if tokens == 0:
        return
    grid = (-(-rows // launch.rows), -(-tokens // (launch.token_tiles * 8)), 1)
    arguments = (x, values, metadata, values if bias is None else bias, y, tokens, rows, width)
    if not x.is_cuda:
        _sparse_linear_kernel[grid](*arguments, **_settings(launch, order, bias is not None), RESERVED=0, num_warps=launch.warps)
        return
    kind, device, given = x.dtype, x.device, None if bias is None else bias.dtype
    run(
        _sparse_linear_kernel, (device, kind, rows, width, given, order, launch), grid, arguments,
        (kind, kind, torch.int16, given or kind, kind, tokens, rows, width), lambda: _settings(launch, order, bias is not None), launch,
        device,
    )  # fmt: skip


def _settings(launch: Decode, order: str, has_bias: bool) -> dict[str, object]:
    """The constants of the kernel, in its order."""
    return {
        "HAS_BIAS": has_bias, "ORDER": ORDERS[order].value, "TILES": launch.tiles, "COLUMN_WARPS": launch.column_warps,
        "ROW_WARPS": launch.row_warps, "SEGMENTS": launch.segments, "STAGES": launch.stages, "TOKEN_TILES": launch.token_tiles,
        "TOKENS": launch.tokens,
    }  # fmt: skip
