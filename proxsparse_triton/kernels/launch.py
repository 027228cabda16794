"""Launch configurations as data, each with its measured reason."""

from __future__ import annotations

from dataclasses import dataclass, replace

import triton

# Under the interpreter the cost is per tile, not per element.
INTERPRETER_TILE = 1 << 14
INTERPRETER_TILES = 2


@dataclass(frozen=True)
class Launch:
    """How a kernel over blocks is launched: blocks of a tile, warps per program, tiles that a program works off in a loop."""

    tile_blocks: int
    num_warps: int
    tiles: int = 1

    def programs(self, n_blocks: int) -> int:
        return int(triton.cdiv(n_blocks, self.tile_blocks * self.tiles))


# One block per thread keeps a block's four weights in one thread's registers (16-byte loads for fp32, 8 for bf16).
BLOCKWISE = Launch(tile_blocks=256, num_warps=4)
# One warp a program: its branches on the hardness of a tile are then uniform and need no barrier. A multiprocessor holds 32 programs; what
# limits easy tiles is how many bytes so few warps keep in flight, and how many instructions they need: hence pairs of tiles, loaded two
# pairs ahead and unrolled. Programs of 4, 8 and 16 tiles reach 78, 92 and 90 % of the copy bandwidth at lambda1 x rms 0.005; a loop over
# two pairs instead of unrolling all four 92 %, but 86 instead of 90 % at 0.05, and over one pair 86 and 79 % (bf16, 4096 x 11008, H200).
PROX = Launch(tile_blocks=32, num_warps=1, tiles=8)
# 8-bit moments: a tile is one group of weights that share a scale. Five streams are in flight without loading ahead, and registers decide
# how many programs fit: 28 with 72 registers each.
FUSED = Launch(tile_blocks=32, num_warps=1, tiles=8)


def interpreted(kernel: object) -> bool:
    """True under TRITON_INTERPRET=1, where kernels run as numpy."""
    return not isinstance(kernel, triton.JITFunction)


def blockwise(kernel_interpreted: bool) -> Launch:
    return Launch(INTERPRETER_TILE, 4) if kernel_interpreted else BLOCKWISE


def prox(kernel_interpreted: bool) -> Launch:
    return Launch(INTERPRETER_TILE, 1, INTERPRETER_TILES) if kernel_interpreted else PROX


def fused(kernel_interpreted: bool, eight_bit: bool) -> Launch:
    if kernel_interpreted:
        return Launch(FUSED.tile_blocks if eight_bit else 4096, 1, INTERPRETER_TILES)
    return FUSED


@dataclass(frozen=True)
class Decode:
    """How `sparse_linear` parts its work: see the kernel.

    tiles: of 16 rows, of a warp. column_warps (at most 15), row_warps: of a program. segments: of 64 columns, of a warp and turn.
    stages: of the ring. token_tiles: of 8 tokens, of a program. tokens: how many of them are staged.
    """

    tiles: int
    column_warps: int
    row_warps: int
    segments: int
    stages: int
    token_tiles: int
    tokens: int

    cluster = 1

    @property
    def warps(self) -> int:
        return self.column_warps * self.row_warps

    @property
    def rows(self) -> int:
        return 16 * self.tiles * self.row_warps

    @property
    def bytes(self) -> int:
        """Shared memory: the ring, or what the sums of the column warps take in its place."""
        stage = self.segments * (self.warps * self.tiles * 1152 + self.column_warps * self.tokens * 128)
        return max(self.stages * stage, self.warps * self.tiles * self.token_tiles * 512)


# Measured on an H200 in bf16 at 11008 x 4096, 4096 x 11008, 14336 x 4096, 28672 x 8192 and 4096 x 4096, from 32 tokens on also at 12288 x
# 4096 and 22016 x 4096, 2026-11-26: the best of 25 to 100 launches for each shape and count. What decides: bytes in flight (some 32 KB a
# multiprocessor), so few rows want many column warps; how often x passes from L2 to the multiprocessors, once for the rows of each program,
# so many tokens want many rows; and from 64 tokens on, when a program fills a multiprocessor, that all of those are busy.
# At most this many tokens -> (out_features from which on, launch), the most rows first.
BY_ROWS = {
    2: ((8192, Decode(2, 4, 1, 2, 2, 1, 2)), (0, Decode(1, 4, 1, 2, 4, 1, 2))),
    8: ((20480, Decode(4, 2, 2, 1, 3, 1, 8)), (8192, Decode(2, 4, 1, 1, 3, 1, 8)), (0, Decode(1, 4, 1, 1, 5, 1, 8))),
    16: ((20480, Decode(4, 2, 2, 1, 3, 2, 16)), (8192, Decode(2, 2, 4, 2, 3, 2, 16)), (0, Decode(2, 4, 1, 1, 5, 2, 16))),
    32: ((20480, Decode(4, 2, 4, 1, 3, 4, 32)), (8192, Decode(2, 2, 4, 2, 3, 4, 32)), (0, Decode(2, 4, 2, 1, 3, 4, 32))),
}
# At most this many tokens -> launches, the fewest bytes from L2 first: the first is taken whose programs fill the card as well as any's.
BY_BALANCE = {
    64: (Decode(4, 2, 4, 1, 3, 8, 64), Decode(3, 2, 4, 1, 3, 8, 64), Decode(6, 2, 2, 1, 4, 4, 32), Decode(2, 2, 4, 1, 3, 8, 64),
         Decode(3, 4, 2, 1, 3, 4, 32), Decode(2, 4, 2, 1, 3, 4, 32)),
    96: (Decode(3, 2, 4, 1, 3, 12, 96), Decode(4, 2, 4, 1, 4, 6, 48), Decode(3, 2, 4, 1, 3, 6, 48), Decode(3, 2, 2, 1, 4, 4, 32)),
    128: (Decode(4, 2, 4, 1, 3, 8, 64), Decode(3, 2, 4, 1, 3, 8, 64), Decode(4, 4, 2, 1, 2, 8, 64), Decode(4, 4, 2, 1, 3, 4, 32)),
}  # fmt: skip
AS_WELL = 0.85
INTERPRETED_DECODE = {8: Decode(2, 2, 1, 1, 2, 1, 8), 64: Decode(2, 2, 2, 2, 2, 2, 16)}


def decode(tokens: int, rows: int, multiprocessors: int, shared: int) -> Decode:
    """The launch for so many tokens and out_features on a card with `shared` bytes of shared memory a program."""
    if tokens <= max(BY_ROWS):
        choices = BY_ROWS[min(most for most in BY_ROWS if most >= tokens)]
        return _fitted(next(launch for least, launch in choices if rows >= least), shared)
    launches = BY_BALANCE[min((most for most in BY_BALANCE if most >= tokens), default=max(BY_BALANCE))]
    programs = [triton.cdiv(rows, launch.rows) * triton.cdiv(tokens, 8 * launch.token_tiles) for launch in launches]
    busy = [count / (multiprocessors * triton.cdiv(count, multiprocessors)) for count in programs]
    chosen = next(index for index, share in enumerate(busy) if share >= AS_WELL * max(busy))
    launch = launches[chosen]
    if tokens > max(BY_ROWS) * 2 and programs[chosen] > multiprocessors:  # smaller programs, of which several fit
        launch = replace(launch, column_warps=1)
    return _fitted(launch, shared)


def _fitted(launch: Decode, shared: int) -> Decode:
    """The launch with less in flight, where cards have less than the 227 KB of those it was measured on."""
    while launch.bytes > shared and launch.stages > 2:
        launch = replace(launch, stages=launch.stages - 1)
    while launch.bytes > shared:
        halved = max(1, launch.column_warps // 2)
        launch = replace(launch, column_warps=halved, row_warps=launch.row_warps if halved < launch.column_warps else launch.row_warps // 2)
    return launch
