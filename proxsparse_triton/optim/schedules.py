"""Schedules as pure functions of progress."""

from __future__ import annotations


def warmup_linear(step: int, steps: int, warmup: float = 0.1) -> float:
    """Factor on the learning rate of step 0, 1, ..., steps - 1: rises linearly over the first `warmup` share, then falls linearly to 0.

    The convention of transformers' `get_linear_schedule_with_warmup`, which the authors use: the very first step has factor 0.
    """
    rising = round_up(warmup * steps)
    if step < rising:
        return step / max(1, rising)
    return max(0.0, (steps - step) / max(1, steps - rising))


def round_up(value: float) -> int:
    """Smallest integer >= value, as transformers turns a warm-up share into steps."""
    return -int(-value // 1)
