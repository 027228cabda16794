"""Launch configurations."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from proxsparse_triton.kernels import launch, prox
from proxsparse_triton.step import MOMENT_GROUP


def test_one_block_per_thread_and_step() -> None:
    tile, warps = launch.BLOCKWISE.tile_blocks, launch.BLOCKWISE.num_warps
    assert tile & (tile - 1) == 0  # Triton's tiles are powers of two
    assert tile % (32 * warps) == 0


@pytest.mark.parametrize("settings", [launch.PROX, launch.FUSED], ids=["prox", "fused"])
def test_one_warp_a_program_and_one_block_a_thread(settings: launch.Launch) -> None:
    """The solver's branches are uniform in a tile, and a program that skips a path must not make others wait."""
    assert (settings.tile_blocks, settings.num_warps) == (32, 1)


@pytest.mark.parametrize(("tiles", "n_blocks", "programs"), [(1, 100, 4), (3, 100, 2), (2, 64, 1), (8, 1, 1)])
def test_programs_of_several_tiles(tiles: int, n_blocks: int, programs: int) -> None:
    assert launch.Launch(32, 1, tiles).programs(n_blocks) == programs


@pytest.mark.parametrize("kernel_interpreted", [False, True])
def test_a_tile_of_the_fused_step_is_a_group_of_8_bit_moments(kernel_interpreted: bool) -> None:
    assert 4 * launch.fused(kernel_interpreted, eight_bit=True).tile_blocks == MOMENT_GROUP


def test_the_interpreter_gets_large_tiles() -> None:
    assert launch.blockwise(False) is launch.BLOCKWISE
    assert launch.prox(False) is launch.PROX
    assert launch.fused(False, eight_bit=False) is launch.fused(False, eight_bit=True) is launch.FUSED
    assert launch.blockwise(True).tile_blocks == launch.INTERPRETER_TILE > launch.BLOCKWISE.tile_blocks
    assert launch.prox(True).tile_blocks == launch.INTERPRETER_TILE
    assert launch.fused(True, eight_bit=False).tile_blocks > launch.FUSED.tile_blocks


def test_interpreted_knows_how_kernels_run(device: str) -> None:
    assert launch.interpreted(prox._prox_24_kernel) == (device == "cpu")
