"""Partial sums of several launches, added up by one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from stepping import BF16, SPARSE, case, normal

from proxsparse_triton.errors import ConfigError, ShapeError
from proxsparse_triton.kernels.frozen_penalty import gradient_square_rows
from proxsparse_triton.kernels.partial import ROWS, PartialSums
from proxsparse_triton.kernels.prox_adamw import partial_rows
from proxsparse_triton.ops import gradient_square, prox_adamw_


@pytest.mark.parametrize("width", [1, 4])
def test_totals_are_the_sums_of_each_part(device: str, poisoned: None, width: int) -> None:
    rows = (1, 0, ROWS, 3, ROWS + 1, 5 * ROWS - 7, 0)
    sums = PartialSums(rows, width, torch.device(device))
    for i, count in enumerate(rows):
        assert sums.part(i).shape == (count, width)
        sums.part(i).copy_(normal(count, width, seed=i))
    expected = torch.stack([sums.part(i).double().sum(0) for i in range(len(rows))])
    torch.testing.assert_close(sums.totals(), expected, rtol=1e-12, atol=1e-12)
    sums.part(3).fill_(float("nan"))
    assert sums.totals().isnan().any(1).tolist() == [i == 3 for i in range(len(rows))]


def test_a_step_leaves_the_sums_of_its_statistics(device: str) -> None:
    whole, parts = (case((63, 500), (BF16, 0, "bf16")).to(device) for _ in range(2))
    settings = dataclasses.replace(SPARSE, stochastic=True)
    expected = prox_adamw_(whole.w, whole.grad, whole.state, settings, w0=whole.w0, backend="triton")
    sums = PartialSums((3, partial_rows(parts.w, eight_bit=False)), 4, torch.device(device))
    room = sums.part(1)
    assert prox_adamw_(parts.w, parts.grad, parts.state, settings, w0=parts.w0, backend="triton", partial=room) is room
    torch.testing.assert_close(sums.totals()[1], expected, rtol=1e-12, atol=0)
    assert sums.totals()[0].eq(0).all()
    assert torch.equal(parts.w, whole.w)


def test_room_that_does_not_fit_is_refused(device: str) -> None:
    made = case((63, 500), (BF16, 0, "bf16")).to(device)
    before = made.w.clone()
    rows = partial_rows(made.w, eight_bit=False)
    for room, error in (
        (torch.zeros(rows + 1, 4, device=device), ShapeError),
        (torch.zeros(rows, 4, dtype=torch.float64, device=device), ConfigError),
        (torch.zeros(rows, 8, device=device)[:, ::2], ConfigError),
    ):
        with pytest.raises(error, match="partial"):
            prox_adamw_(made.w, made.grad, made.state, SPARSE, backend="triton", partial=room)
        with pytest.raises(ConfigError, match="reference runs"):
            prox_adamw_(made.w, made.grad, made.state, SPARSE, backend="reference", partial=room)
    assert torch.equal(made.w, before)


def test_a_norm_pass_leaves_the_sums_of_its_squares(device: str) -> None:
    w, w0, grad = (normal(63, 500, seed=seed).to(device) for seed in range(3))
    sums = PartialSums((gradient_square_rows(w), 2), 1, torch.device(device))
    gradient_square(w, w0, 0.5, 0.1, grad, backend="triton", partial=sums.part(0))
    expected = gradient_square(w, w0, 0.5, 0.1, grad, backend="triton")
    torch.testing.assert_close(sums.totals()[0, 0], expected, rtol=1e-12, atol=0)
