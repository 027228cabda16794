"""Launch configurations as data, each with its measured reason."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

# Under the interpreter the cost is per tile, not per element.
INTERPRETER_TILE = 1 << 14
INTERPRETER_PROGRAMS = 3


@dataclass(frozen=True)
class Launch:
    """How a kernel over blocks is launched: blocks of a tile, warps of a program, programs for each multiprocessor of the card, which take
    turns through the tiles (None: a program for each tile)."""

    tile_blocks: int
    num_warps: int
    resident: int | None = None

    def programs(self, n_blocks: int, device: torch.device) -> int:
        tiles = triton.cdiv(n_blocks, self.tile_blocks)
        if self.resident is None:
            return tiles
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        return min(tiles, self.resident * multiprocessors)


# One block per thread keeps a block's four weights in one thread's registers (16-byte loads for fp32, 8 for bf16).
BLOCKWISE = Launch(tile_blocks=256, num_warps=4)
# One warp a program: its branches on the hardness of a tile are then uniform and need no barrier. No more programs than fit at a time:
# starting one for every tile alone takes 2.4 times the copy (bf16, 4096 x 11008, H200), and one for every eight still a quarter of it.
PROX = Launch(tile_blocks=32, num_warps=1, resident=32)
# 8-bit moments: a tile is one group of weights that share a scale.
FUSED = Launch(tile_blocks=32, num_warps=1, resident=28)


def interpreted(kernel: object) -> bool:
    """True under TRITON_INTERPRET=1, where kernels run as numpy."""
    return not isinstance(kernel, triton.JITFunction)


def blockwise(kernel_interpreted: bool) -> Launch:
    return Launch(INTERPRETER_TILE, 4) if kernel_interpreted else BLOCKWISE


def prox(kernel_interpreted: bool) -> Launch:
    return Launch(INTERPRETER_TILE, 1, INTERPRETER_PROGRAMS) if kernel_interpreted else PROX


def fused(kernel_interpreted: bool, eight_bit: bool) -> Launch:
    if kernel_interpreted:
        return Launch(FUSED.tile_blocks if eight_bit else 4096, 1, INTERPRETER_PROGRAMS)
    return FUSED
