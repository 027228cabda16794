import math

import pytest
import torch
from transformers import get_linear_schedule_with_warmup

from proxsparse_triton.optim.schedules import round_up, warmup_linear


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 29, 30, 400])
@pytest.mark.parametrize("warmup", [0.0, 0.01, 0.1, 0.3, 0.5, 0.99])
def test_equals_transformers(steps: int, warmup: float) -> None:
    """The Trainer turns the share into ceil(steps * share) warm-up steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(steps * warmup), steps)
    for step in range(steps):
        assert warmup_linear(step, steps, warmup) == schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
    assert warmup_linear(steps, steps, warmup) == 0.0


def test_the_papers_shape() -> None:
    factors = [warmup_linear(step, 400) for step in range(400)]
    assert factors[0] == 0.0
    assert factors[40] == max(factors) == 1.0
    assert factors[20] == 0.5
    assert factors[220] == 0.5
    assert factors[-1] == pytest.approx(1 / 360)


@pytest.mark.parametrize(("value", "expected"), [(0.0, 0), (0.1, 1), (1.0, 1), (1.5, 2), (3.0000000000000004, 4)])
def test_round_up(value: float, expected: int) -> None:
    assert round_up(value) == expected == math.ceil(value)
