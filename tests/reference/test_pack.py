"""Packing in plain torch against a loop in Python and against PyTorch's own conversion."""

from __future__ import annotations

import itertools

import pytest
import torch
from adversarial import same_bits
from torch.sparse import _semi_structured_conversions as pytorch

from proxsparse_triton.errors import ShapeError
from proxsparse_triton.reference.mask import mask_24
from proxsparse_triton.reference.pack import pack_24, unpack_24

NAN, INF = float("nan"), float("inf")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BEHIND_THE_END = 0x4440  # three nibbles of positions 0 and 1 behind the only block of a row


def special_blocks(dtype: torch.dtype) -> list[tuple[float, ...]]:
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the smallest denormal
    return list(itertools.product((NAN, -INF, 1.5, tiny, -0.0, 0.0), repeat=4))


def by_hand(block: tuple[float, ...]) -> tuple[list[float], int]:
    kept = [i for i in range(4) if block[i] != 0]
    free = [i for i in range(4) if block[i] == 0]
    i0, i1 = sorted([*kept, *free[: 2 - len(kept)]])
    return [block[i] if block[i] != 0 else 0.0 for i in (i0, i1)], i0 | i1 << 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_block_of_special_values(dtype: torch.dtype) -> None:
    blocks = [block for block in special_blocks(dtype) if sum(x != 0 for x in block) <= 2]
    w = torch.tensor(blocks, dtype=dtype)
    values, metadata = pack_24(w, None)
    expected, nibbles = zip(*(by_hand(block) for block in blocks), strict=True)
    assert same_bits(values, torch.tensor(expected, dtype=dtype))
    assert metadata.dtype == torch.int16
    assert metadata.tolist() == [[BEHIND_THE_END | nibble] for nibble in nibbles]
    assert same_bits(unpack_24(values, metadata), torch.where(w == 0, 0.0, w))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kept", itertools.combinations(range(4), 2))
def test_a_mask_keeps_bits_and_drops_anything(kept: tuple[int, int], dtype: torch.dtype) -> None:
    w = torch.tensor(special_blocks(dtype), dtype=dtype)
    mask = torch.zeros_like(w, dtype=torch.bool)
    mask[:, kept] = True
    values, metadata = pack_24(w, mask)
    assert same_bits(values, w[:, kept])
    assert set(metadata.flatten().tolist()) == {BEHIND_THE_END | kept[0] | kept[1] << 2}
    assert same_bits(unpack_24(values, metadata), torch.where(mask, w, 0.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(32, 32), (64, 96), (96, 32), (160, 256)])
def test_metadata_is_pytorchs_before_it_reorders(shape: tuple[int, int], dtype: torch.dtype) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    w = torch.where(mask_24(w.abs()), w, 0.0)
    values, reordered = pytorch.sparse_semi_structured_from_dense_cutlass(w)
    place = pytorch._calculate_meta_reordering_scatter_offsets(*reordered.shape, torch.int16, "cpu")
    ours = pack_24(w, None)
    assert same_bits(ours[0], values)
    assert torch.equal(ours[1], reordered.flatten()[place].view(reordered.shape))


def test_positions_that_do_not_ascend_are_refused() -> None:
    metadata = torch.full((2, 2), 0x4444, dtype=torch.int16)
    metadata[1, 0] = 0x4A44  # 2, 2
    metadata[1, 1] = 0x4463  # 3, 0 and 2, 1
    message = r"got \(2, 2\) in block \(1, 2\) \(2 blocks are wrong\)\. Pass metadata in linear order, as pack_24 returns it\."
    with pytest.raises(ShapeError, match=r"unpack_24: expected ascending positions of the two kept weights in metadata, " + message):
        unpack_24(torch.ones(2, 10), metadata)


def test_nobody_looks_behind_the_end_of_a_row() -> None:
    metadata = torch.full((2, 1), 0x0F44, dtype=torch.int16)
    assert unpack_24(torch.ones(2, 4), metadata).tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]] * 2
