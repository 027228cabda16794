from __future__ import annotations

import torch
from torch import Tensor

from proxsparse_triton.training.batches import batches


def windows(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 40, (length,), generator=generator) for length in lengths]


def test_equal_windows_need_no_mask() -> None:
    given = windows(5, 5, 5)
    first, second = batches(given, 2)
    assert torch.equal(first.tokens, torch.stack(given[:2]))
    assert torch.equal(second.tokens, given[2][None])  # the last one may be smaller
    assert first.mask is None
    assert second.mask is None


def test_unequal_windows_are_padded_on_the_right() -> None:
    given = windows(3, 5, 4, 4)
    first, second = batches(given, 2)
    assert first.tokens.tolist() == [[*given[0].tolist(), 0, 0], given[1].tolist()]
    assert first.mask is not None
    assert first.mask.tolist() == [[True, True, True, False, False], [True] * 5]
    assert second.mask is None
    assert first.tokens.dtype == torch.int64


def test_to_moves_tokens_and_mask(device: str) -> None:
    (batch,) = batches(windows(3, 5), 2)
    moved = batch.to(torch.device(device))
    assert moved.mask is not None
    assert moved.tokens.device.type == moved.mask.device.type == device
