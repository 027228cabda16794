"""Launch configurations as data, each with its measured reason."""

from __future__ import annotations

from dataclasses import dataclass

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
