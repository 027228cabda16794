"""Room for the partial sums of many launches, for a caller who adds them up at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ..kernels.partial import PartialSums as PartialSums  # noqa: PLC0414 - for other modules' annotations


def partial_sums(rows: Sequence[int | None], width: int, device: torch.device) -> PartialSums | None:
    """Room for the sums of operations that leave so many rows each (`prox_adamw_rows`, `gradient_square_rows`); None where one leaves
    none, or where there are fewer than two."""
    counts = [count for count in rows if count is not None]
    if len(counts) < len(rows) or len(rows) < 2:
        return None
    from ..kernels.partial import PartialSums

    return PartialSums(tuple(counts), width, device)
