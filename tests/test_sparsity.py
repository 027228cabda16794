"""The shared vocabulary: block counts and mask checks."""

from __future__ import annotations

import pytest
import torch

from proxsparse_triton.errors import ShapeError
from proxsparse_triton.sparsity import (
    check_mask,
    check_width,
    count_24_blocks,
    count_negative_zeros,
    is_24,
    kept_per_block,
)

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("shape", [(4,), (0,), (3, 8), (0, 8), (5, 0), (2, 3, 12)])
def test_check_width_accepts_blocks_of_four(shape: tuple[int, ...]) -> None:
    check_width("f", shape)


@pytest.mark.parametrize("shape", [(1,), (3, 6), (4, 2), (2, 4, 3)])
def test_check_width_names_the_function_and_the_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"prox: expected the last dimension divisible by 4, got shape \(") as caught:
        check_width("prox", shape)
    assert str(tuple(shape)) in str(caught.value)
    assert "--skip" in str(caught.value)


def test_check_width_refuses_a_scalar() -> None:
    with pytest.raises(ShapeError, match="f: expected a tensor of at least one dimension, got a scalar"):
        check_width("f", ())


def test_kept_per_block_counts_non_zeros_block_by_block() -> None:
    w = torch.tensor([[1.0, 0, 2, 0, 0, 0, 0, 0], [1, 2, 3, 4, 0, 5, 6, 7]])
    assert kept_per_block(w).tolist() == [[2, 0], [4, 3]]


def test_nan_and_infinity_count_as_kept_and_negative_zero_does_not() -> None:
    assert kept_per_block(torch.tensor([NAN, -INF, -0.0, 0.0])).tolist() == [2]
    assert kept_per_block(torch.tensor([NAN, NAN, NAN, -0.0])).tolist() == [3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_count_24_blocks_is_a_scalar_tensor_of_every_dtype(dtype: torch.dtype) -> None:
    w = torch.tensor([[1, 0, 2, 0, 0, 0, 0, 0], [1, 2, 3, 4, 0, 5, 6, 7]], dtype=dtype)
    count = count_24_blocks(w)
    assert (count.shape, count.dtype, count.item()) == (torch.Size([]), torch.int64, 2)


def test_blocks_run_along_the_last_dimension_of_a_view() -> None:
    w = torch.zeros(4, 8)
    w[:3] = 1  # a column holds three of four, a row all or none
    assert not is_24(w)
    assert not is_24(w.t())
    w[2] = 0
    assert is_24(w.t())
    assert not is_24(w)


@pytest.mark.parametrize("shape", [(0, 8), (5, 0), (2, 0, 4), (0,)])
def test_empty_tensors_are_24(shape: tuple[int, ...]) -> None:
    assert is_24(torch.empty(shape))
    assert count_24_blocks(torch.empty(shape)).item() == 0
    check_mask("f", "m", torch.empty(shape, dtype=torch.bool))


@pytest.mark.parametrize("function", [kept_per_block, count_24_blocks, is_24])
def test_counts_refuse_widths_that_do_not_divide(function) -> None:
    with pytest.raises(ShapeError, match="divisible by 4"):
        function(torch.zeros(2, 6))


def test_check_mask_accepts_exactly_two_of_four() -> None:
    check_mask("f", "m", torch.tensor([[True, True, False, False], [False, True, False, True]]))


@pytest.mark.parametrize(("kept", "row"), [(1, [1, 0, 0, 0]), (3, [1, 1, 1, 0]), (4, [1, 1, 1, 1]), (0, [0, 0, 0, 0])])
def test_check_mask_says_which_block_is_wrong(kept: int, row: list[int]) -> None:
    mask = torch.tensor([[1, 1, 0, 0, 0, 1, 1, 0], [0, 0, 1, 1, *row], [*row, 1, 1, 0, 0]]).bool()
    expected = rf"load: expected 2 kept of every 4 in the mask of up_proj, got {kept} in block \(1, 1\) \(2 blocks are wrong\)"
    with pytest.raises(ShapeError, match=expected):
        check_mask("load", "up_proj", mask)


def test_check_mask_refuses_other_dtypes_and_widths() -> None:
    with pytest.raises(ShapeError, match=r"load: expected a bool mask for up_proj, got torch\.uint8"):
        check_mask("load", "up_proj", torch.ones(1, 4, dtype=torch.uint8))
    with pytest.raises(ShapeError, match="divisible by 4"):
        check_mask("load", "up_proj", torch.ones(1, 6, dtype=torch.bool))


def test_count_negative_zeros() -> None:
    assert count_negative_zeros(torch.tensor([[-0.0, 0.0, -1.0, NAN], [-0.0, -INF, 1e-45, -1e-45]])) == 2
    assert count_negative_zeros(torch.zeros(0, 4)) == 0
