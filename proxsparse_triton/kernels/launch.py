"""Launch configurations as data, each with its measured reason."""

from __future__ import annotations

from dataclasses import dataclass

import triton

# Under the interpreter the cost is per program, not per element.
INTERPRETER_TILE = 1 << 14


@dataclass(frozen=True)
class Launch:
    """How a kernel over blocks is launched: blocks per program, warps per program."""

    tile_blocks: int
    num_warps: int


# One block per thread keeps a block's four weights in one thread's registers (16-byte loads for fp32, 8 for bf16).
BLOCKWISE = Launch(tile_blocks=256, num_warps=4)


def interpreted(kernel: object) -> bool:
    """True under TRITON_INTERPRET=1, where kernels run as numpy."""
    return not isinstance(kernel, triton.JITFunction)


def blockwise(kernel_interpreted: bool) -> Launch:
    return Launch(INTERPRETER_TILE, 4) if kernel_interpreted else BLOCKWISE
