"""y = x @ w.T + bias for any number of tokens, w in its packed 2:4 form, on Hopper's warpgroups, in clusters that part the columns."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compiled import run
from .fragments import hopper_metadata
from .hopper_launch import Warpgroups
from .ptx import round_to
from .staging import commit, copy_once, copy_past, get_four, meet_all, reserve, shared_base, wait
from .warpgroup import finish_24, get_four_of, meet_cluster, publish_copies, put_float, start_24

PAD = tl.constexpr(4)  # fp32 beyond the rows of a token: eight rows of four pairs of tokens then lie in 32 banks
FAR = tl.constexpr(16)  # times 16 bytes that a lane has under way at the end


@triton.jit
def _stage(
    to, pointers, sizes, turn, last_turn, first_group, first_token, thread,
    GROUPS: tl.constexpr, THREADS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Starts the copies of COLUMNS columns: TOKENS rows of x for every 64, GROUPS x 64 rows of weights, their metadata."""
    x_ptr, values_ptr, metadata_ptr = pointers
    tokens, rows, width = sizes
    WEIGHTS: tl.constexpr = TOKENS * COLUMNS * 2  # where they begin
    METADATA: tl.constexpr = WEIGHTS + GROUPS * COLUMNS * 64
    if turn < last_turn:
        CHUNKS: tl.constexpr = COLUMNS // 16
        row = thread // CHUNKS
        chunk = thread % CHUNKS
        weights_to = to + WEIGHTS + row * COLUMNS + (chunk ^ (row % 8 if COLUMNS == 128 else row // 2 % 4)) * 16
        for step in tl.static_range(GROUPS * 64 * CHUNKS // THREADS):
            at = row + step * (THREADS // CHUNKS)
            from_row = tl.minimum(first_group + at // 64, rows // 64 - 1).to(tl.int64) * 64 + at % 64
            copy_once(weights_to + step * (THREADS * 16), values_ptr + from_row * (width // 2) + turn * (COLUMNS // 2) + chunk * 8, 16)
        PIECES: tl.constexpr = COLUMNS // 2  # of 16 bytes of a group's metadata
        for step in tl.static_range((GROUPS * PIECES + THREADS - 1) // THREADS):
            at = thread + step * THREADS
            group = tl.minimum(first_group + at // PIECES, rows // 64 - 1).to(tl.int64)
            source = metadata_ptr + (group * (width // 32) + turn * (COLUMNS // 32)) * 128 + at % PIECES * 8
            copy_past(to + METADATA + at * 16, source, at < GROUPS * PIECES)
        X_CHUNKS: tl.constexpr = COLUMNS // 8
        chunk = thread % X_CHUNKS
        token = thread // X_CHUNKS
        x_to = to + chunk // 8 * (TOKENS * 128) + token * 128 + (chunk % 8 ^ (token % 8)) * 16
        for step in tl.static_range((TOKENS * X_CHUNKS + THREADS - 1) // THREADS):
            at = token + step * (THREADS // X_CHUNKS)
            source = x_ptr + (first_token + at).to(tl.int64) * width + turn * COLUMNS + chunk * 8
            # What lies in the place of other tokens reaches no sum but their own.
            copy_past(x_to + step * (THREADS // X_CHUNKS * 128), source, (at < TOKENS) & (first_token + at < tokens))
    commit()


@triton.jit
def _sums(
    base, pointers, sizes, first_turn, last_turn, first_group, first_token, thread, own,
    GROUPS: tl.constexpr, OWN: tl.constexpr, THREADS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The sums of a warpgroup's OWN groups from `own` on, over the columns of turns first_turn to last_turn - 1."""
    WEIGHTS: tl.constexpr = TOKENS * COLUMNS * 2
    METADATA: tl.constexpr = WEIGHTS + GROUPS * COLUMNS * 64
    STAGE: tl.constexpr = (METADATA + GROUPS * COLUMNS * 8 + 1023) // 1024 * 1024
    DTYPE: tl.constexpr = pointers[1].dtype.element_ty
    lane = thread % 32
    metadata_at = METADATA + own * (COLUMNS * 8) + lane % 4 // 2 * 256 + thread // 32 % 4 * 64 + lane // 4 * 8
    sums = ()
    for _ in tl.static_range(OWN * TOKENS // 2):
        sums = sums + (tl.zeros([THREADS], tl.float32),)
    for stage in tl.static_range(STAGES - 1):
        _stage(
            base + stage * STAGE, pointers, sizes, first_turn + stage, last_turn, first_group, first_token, thread,
            GROUPS, THREADS, TOKENS, COLUMNS,
        )  # fmt: skip
    at = base
    to = base + (STAGES - 1) * STAGE
    for turn in range(first_turn, last_turn):
        wait(STAGES - 2)
        publish_copies()
        meet_all()  # all see what has arrived, and all have multiplied what the next copies overwrite
        metadata = ()
        for piece in tl.static_range(OWN * COLUMNS // 64):
            metadata = metadata + (hopper_metadata(at + metadata_at + piece * 512, lane % 2 == 1),)
        sums = start_24(sums, at + WEIGHTS + own * (COLUMNS * 64), at + thread * 0, metadata, DTYPE, OWN, TOKENS, COLUMNS)
        _stage(
            to, pointers, sizes, turn + STAGES - 1, last_turn, first_group, first_token, thread, GROUPS, THREADS, TOKENS, COLUMNS
        )  # fmt: skip
        sums = finish_24(sums, OWN, TOKENS)
        at = tl.where(at == base + (STAGES - 1) * STAGE, base, at + STAGE)
        to = tl.where(to == base + (STAGES - 1) * STAGE, base, to + STAGE)
    return sums


@triton.jit
def _store_four(y_ptr, bias_ptr, row, token, rows, inside, totals, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The sums of the programs of the cluster, first to last, of rows `row` to `row` + 3, and their bias: 8 bytes of y."""
    word = tl.zeros_like(token)
    for part in tl.static_range(4):
        value = totals[0][part]
        for other in tl.static_range(1, SPLITS):
            value += totals[other][part]
        if HAS_BIAS:
            value += tl.load(bias_ptr + row + part, mask=inside, other=0).to(tl.float32)
        bits = round_to(value, y_ptr.dtype.element_ty).to(tl.int16, bitcast=True)
        word |= (bits.to(tl.int64) & 0xFFFF) << (16 * part)
    tl.store((y_ptr + token * rows + row).to(tl.pointer_type(tl.int64)), word, mask=inside)


@triton.jit
def _finish(
    sums, base, y_ptr, bias_ptr, sizes, first_group, first_token, rank, thread, own,
    HAS_BIAS: tl.constexpr, GROUPS: tl.constexpr, OWN: tl.constexpr, THREADS: tl.constexpr, TOKENS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Adds the sums of the programs of a cluster, in whose shared memory they lie in the ring's place, and stores this program's share."""
    ROW: tl.constexpr = GROUPS * 256 + PAD * 4  # bytes of a token's sums
    FOURS: tl.constexpr = GROUPS * 16  # of rows
    STEPS: tl.constexpr = (TOKENS * FOURS + THREADS * SPLITS - 1) // (THREADS * SPLITS)
    BATCH: tl.constexpr = min(STEPS, FAR // SPLITS, FAR // 2)
    tokens, rows, _width = sizes
    lane = thread % 32
    wait(0)
    meet_all()
    for group in tl.static_range(OWN):
        corner = base + lane % 4 * 2 * ROW + ((own + group) * 64 + thread // 32 % 4 * 16 + lane // 4) * 4
        for n in tl.static_range(TOKENS // 8):
            for k in tl.static_range(4):
                put_float(corner + (n * 8 + k % 2) * ROW + k // 2 * 32, sums[(group * (TOKENS // 8) + n) * 4 + k])
    if SPLITS > 1:
        meet_cluster()
    else:
        meet_all()
    for batch in range(0, (STEPS + BATCH - 1) // BATCH):
        totals = ()
        for k in tl.static_range(BATCH):
            item = tl.minimum(((batch * BATCH + k) * SPLITS + rank) * THREADS + thread, TOKENS * FOURS - 1)
            source = base + item // FOURS * ROW + item % FOURS * 16
            if SPLITS > 1:
                parts = ()
                for other in tl.static_range(SPLITS):
                    parts = parts + (get_four_of(source, other),)
                totals = totals + (parts,)
            else:
                totals = totals + ((get_four(source),),)
        for k in tl.static_range(BATCH):
            item = ((batch * BATCH + k) * SPLITS + rank) * THREADS + thread
            row = first_group * 64 + item % FOURS * 4
            token = item // FOURS
            inside = (row < rows) & (token < TOKENS) & (first_token + token < tokens)
            _store_four(y_ptr, bias_ptr, row, (first_token + token).to(tl.int64), rows, inside, totals[k], SPLITS, HAS_BIAS)
    if SPLITS > 1:
        meet_cluster()  # nobody leaves whose sums are still read


@triton.jit(do_not_specialize=["tokens"])
def _hopper_kernel(
    x_ptr, values_ptr, metadata_ptr, bias_ptr, y_ptr, tokens, rows, width,
    HAS_BIAS: tl.constexpr, GROUPS: tl.constexpr, WARPGROUPS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
    STAGES: tl.constexpr, SPLITS: tl.constexpr, RESERVED: tl.constexpr,
):  # fmt: skip
    """y[token, row] = sum over blocks and kept weights of value * x[token, 4 block + position] (+ bias[row]), summed in fp32.

    One program owns 64 GROUPS rows, TOKENS tokens, and every turn of COLUMNS columns that is its share of the SPLITS programs of its
    cluster; these add their sums through each other's shared memory, in a fixed order. Read are 9/8 bytes a weight of 2 bytes, again for
    every TOKENS tokens, and x once for every 64 GROUPS rows. Both go through a ring of STAGES in shared memory, from which the tensor
    cores read them as they are: 64 bytes of x a token and 2 KB of values for each 64 rows x 32 columns, which is what limits many tokens.
    """
    THREADS: tl.constexpr = WARPGROUPS * 128
    OWN: tl.constexpr = GROUPS // WARPGROUPS  # groups of a warpgroup
    thread = tl.arange(0, THREADS)
    own = thread // 128 * OWN
    rank = tl.program_id(0) % SPLITS
    first_group = tl.program_id(0) // SPLITS * GROUPS
    first_token = tl.program_id(1) * TOKENS
    turns = width // COLUMNS
    base = (shared_base() + 1023) & -1024
    sizes = (tokens, rows, width)
    sums = _sums(
        base, (x_ptr, values_ptr, metadata_ptr), sizes, turns * rank // SPLITS, turns * (rank + 1) // SPLITS, first_group, first_token,
        thread, own, GROUPS, OWN, THREADS, TOKENS, COLUMNS, STAGES,
    )  # fmt: skip
    _finish(
        sums, base, y_ptr, bias_ptr, sizes, first_group, first_token, rank, thread, own,
        HAS_BIAS, GROUPS, OWN, THREADS, TOKENS, SPLITS,
    )  # fmt: skip
    if RESERVED > 0 and tokens < 0:
        reserve(y_ptr, RESERVED)


def sparse_linear(
    x: Tensor, values: Tensor | int, metadata: Tensor | int, bias: Tensor | None, y: Tensor, order: str, launch: Warpgroups
) -> None:
    """Writes x @ w.T + bias into y [..., out]; x [tokens, in] and all others contiguous, 16-byte aligned, of one 16-bit dtype.

    values, metadata: tensors or their addresses. order: "hopper". out divides by 64, in by `launch.columns`. Compute capability 9.0.
    """
    tokens, width = x.shape
    rows = y.shape[-1]
    if tokens == 0:
        return
    kind, device, given = x.dtype, x.device, None if bias is None else bias.dtype
    run(
        _hopper_kernel, ("hopper", device, kind, rows, width, given, launch), (-(-rows // launch.rows), -(-tokens // launch.tokens), 1),
        (x, values, metadata, values if bias is None else bias, y, tokens, rows, width),
        (kind, kind, torch.int16, given or kind, kind, tokens, rows, width), lambda: settings(launch, bias is not None), launch, device,
    )  # fmt: skip


def settings(launch: Warpgroups, has_bias: bool) -> dict[str, object]:
    """The constants of the kernel, in its order."""
    return {
        "HAS_BIAS": has_bias, "GROUPS": launch.groups, "WARPGROUPS": launch.warpgroups, "TOKENS": launch.tokens,
        "COLUMNS": launch.columns, "STAGES": launch.stages, "SPLITS": launch.splits,
    }  # fmt: skip
