"""Launch configurations."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from proxsparse_triton.kernels import launch, prox


def test_one_block_per_thread_and_step() -> None:
    tile, warps = launch.BLOCKWISE.tile_blocks, launch.BLOCKWISE.num_warps
    assert tile & (tile - 1) == 0  # Triton's tiles are powers of two
    assert tile % (32 * warps) == 0


def test_the_interpreter_gets_large_tiles() -> None:
    assert launch.blockwise(False) is launch.BLOCKWISE
    assert launch.blockwise(True).tile_blocks == launch.INTERPRETER_TILE > launch.BLOCKWISE.tile_blocks


def test_interpreted_knows_how_kernels_run(device: str) -> None:
    assert launch.interpreted(prox._prox_24_kernel) == (device == "cpu")
