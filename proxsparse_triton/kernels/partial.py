"""Partial sums of several launches, added up by one."""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 1024


@triton.jit
def _segment_sums_kernel(x_ptr, starts_ptr, out_ptr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """out[segment, column] = sum of x[start : stop, column] in fp64, in the same order on every run. One program a segment."""
    segment = tl.program_id(0)
    start = tl.load(starts_ptr + segment)
    stop = tl.load(starts_ptr + segment + 1)
    lane = tl.arange(0, WIDTH)
    total = tl.zeros([ROWS, WIDTH], tl.float64)
    for tile in range(0, tl.cdiv(stop - start, ROWS)):
        row = start + tile * ROWS + tl.arange(0, ROWS)
        total += tl.load(x_ptr + row[:, None] * WIDTH + lane[None, :], mask=(row < stop)[:, None], other=0.0).to(tl.float64)
    tl.store(out_ptr + segment * WIDTH + lane, tl.sum(total, axis=0))


class PartialSums:
    """Room for the partial sums that the launches of a step leave, one tensor after the other, and their totals for all tensors at once.

    A sum for each tensor would cost more than the partial sums themselves: some 10 microseconds and a launch.
    """

    def __init__(self, rows: tuple[int, ...], width: int, device: torch.device) -> None:
        """rows: partial sums of each tensor, each of `width` numbers."""
        self._starts = list(itertools.accumulate(rows, initial=0))
        starts = torch.tensor(self._starts, dtype=torch.int64, pin_memory=device.type == "cuda")  # pinned: no wait for the device
        self._device_starts = starts.to(device, non_blocking=True)
        self._sums = torch.zeros(self._starts[-1], width, dtype=torch.float32, device=device)

    def part(self, index: int) -> Tensor:
        """fp32 [rows of that tensor, width]."""
        return self._sums[self._starts[index] : self._starts[index + 1]]

    def totals(self) -> Tensor:
        """fp64 [tensors, width]."""
        tensors, width = len(self._starts) - 1, self._sums.shape[1]
        out = torch.empty(tensors, width, dtype=torch.float64, device=self._sums.device)
        with torch.cuda.device_of(out):
            _segment_sums_kernel[(tensors,)](self._sums, self._device_starts, out, WIDTH=width, ROWS=ROWS)
        return out
