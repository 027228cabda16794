"""Token windows -> batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """tokens [batch, length] int64, padded with 0 where mask is False; mask None when nothing is padded."""

    tokens: Tensor
    mask: Tensor | None

    def to(self, device: torch.device) -> Batch:
        return Batch(self.tokens.to(device), None if self.mask is None else self.mask.to(device))


def batches(windows: Sequence[Tensor], batch_size: int) -> Iterator[Batch]:
    """Batches of consecutive windows; the last one may be smaller. Windows of unequal length are padded on the right."""
    for start in range(0, len(windows), batch_size):
        part = list(windows[start : start + batch_size])
        longest = max(len(window) for window in part)
        if all(len(window) == longest for window in part):
            yield Batch(torch.stack(part), None)
            continue
        tokens = torch.stack([F.pad(window, (0, longest - len(window))) for window in part])
        mask = torch.stack([torch.arange(longest) < len(window) for window in part])
        yield Batch(tokens, mask)
