"""What is seen of the mask while it is learned."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from proxsparse_triton.training import watch
from proxsparse_triton.training.watch import MaskWatch, Pace


def after(pace: Pace, step: int, share: float) -> list[str]:
    """What is said after that step (0-based), with losses that fall."""
    return pace.warnings(share, [1.0 / (1 + i) for i in range(step + 1)])


def test_shares_of_blocks_that_changed() -> None:
    linear = nn.Linear(8, 4, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([4.0, 3.0, 2.0, 1.0]).repeat(4, 2))
    seen = MaskWatch({"w": linear}, {}, steps=40, masked=True)
    assert seen.every == 2
    assert seen.changes()["w"].item() == 0
    with torch.no_grad():
        linear.weight[0, 2] = 9.0  # another mask
        linear.weight[1, 0] = -8.0  # the same
        linear.weight[3, 4:] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert seen.changes()["w"].item() == 2 / 8
    assert seen.changes()["w"].item() == 0  # since the last look


def test_the_mask_is_that_of_the_scaled_weights() -> None:
    linear = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    plain, scaled = (MaskWatch({"w": linear}, scales, 1, masked=True) for scales in ({}, {"w": torch.tensor([0.0, 1.0, 1.0, 1.0])}))
    with torch.no_grad():
        linear.weight[0, 0] = 0.5  # magnitude's mask changes, the other had no room for it
    assert plain.changes()["w"].item() == 1
    assert scaled.changes()["w"].item() == 0


def test_large_layers_are_sampled_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SAMPLE", 64)
    linear = nn.Linear(8, 32, bias=False)  # 256 weights: every fourth row
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([4.0, 3.0, 2.0, 1.0]).repeat(32, 2))
        seen = MaskWatch({"w": linear}, {}, 100, masked=False)
        linear.weight[[1, 2, 3, 31]] = linear.weight[1].flip(0)
        assert seen.changes()["w"].item() == 0
        linear.weight[28, :4] = linear.weight[28, :4].flip(0)
        linear.weight[0] = linear.weight[0].flip(0)
    assert seen.changes()["w"].item() == 3 / 16


@pytest.mark.parametrize(("steps", "every"), [(1, 1), (19, 1), (39, 1), (40, 2), (400, 20)])
def test_some_twenty_looks_a_run(steps: int, every: int) -> None:
    assert MaskWatch({"w": nn.Linear(4, 1)}, {}, steps, masked=True).every == every


def test_shares_are_of_each_layer() -> None:
    layers = {name: nn.Linear(8, 4, bias=False) for name in "ab"}
    with torch.no_grad():
        for linear in layers.values():
            linear.weight.copy_(torch.tensor([4.0, 3.0, 2.0, 1.0]).repeat(4, 2))
        seen = MaskWatch(layers, {}, 20, masked=True)
        layers["b"].weight[2, 5] = 0
    weights = {name: linear.weight.clone() for name, linear in layers.items()}
    assert {name: share.item() for name, share in seen.changes().items()} == {"a": 0, "b": 1 / 8}
    assert all(torch.equal(linear.weight, weights[name]) for name, linear in layers.items())  # looking changes nothing


@pytest.mark.parametrize(
    ("step", "share", "masked", "warned"),
    [
        (10, 0.51, True, "51 % of the blocks committed before the learning rate peaked (step 11 of 100)"),
        (10, 0.50, True, None),
        (9, 0.99, True, None),
        (11, 0.99, True, None),
        (89, 0.69, False, "31 % of the blocks undecided with 10 of 100 steps left"),
        (89, 0.71, False, None),
        (89, 0.10, True, None),  # the loss has seen the mask
        (88, 0.10, False, None),
        (90, 0.10, False, None),
    ],
)
def test_warnings_come_while_there_is_time(step: int, share: float, masked: bool, warned: str | None) -> None:
    found = after(Pace(100, 10, masked), step, share)
    assert len(found) == (warned is not None)
    assert all(text.startswith(warned or "") and "--lambda1" in text for text in found)


@pytest.mark.parametrize(("steps", "last"), [(5, 4), (10, 8), (19, 17), (20, 17), (30, 26), (1000, 899)])
def test_the_last_tenth_of_the_steps(steps: int, last: int) -> None:
    """One step speaks, whatever the number of them; the peak speaks too where a run has one."""
    pace = Pace(steps, 1, False)
    assert [step for step in range(steps) if after(pace, step, 0.2)] == [last]
    assert [step for step in range(steps) if after(pace, step, 0.8)] == [1]
    assert [step for step in range(steps) if after(pace, step, float("nan"))] == []


def test_a_run_of_one_step() -> None:
    assert after(Pace(1, 1, False), 0, 0.0)


def test_a_loss_that_rises_from_the_start() -> None:
    """Five steps each: 1 to 5 against 21 to 25 of 100, said once."""
    pace = Pace(100, 10, True)
    losses = [2.0, 3.0, 2.0, 3.0, 2.0, *(15 * [9.0]), 2.6, 2.4, 2.5, 2.3, 2.3, *(75 * [9.0])]
    heard = {count: pace.warnings(0.0, losses[:count]) for count in range(1, 101)}
    assert {count: texts for count, texts in heard.items() if texts} == {
        25: [
            "The loss is 2.420 after a quarter of the steps and was 2.400 at the start, so the mask is getting worse than the one it "
            "began with: lower --lr."
        ]
    }
    assert pace.warnings(0.0, [*losses[:24], 2.2]) == []  # 2.400: no worse
    assert Pace(100, 10, False).warnings(0.0, losses[:25]) == []  # the loss at learned weights starts as the dense model's
    assert Pace(99, 10, True).warnings(0.0, losses[:24]) == []  # four texts say nothing
    assert Pace(100, 24, True).warnings(0.9, losses[:25])[1].startswith("The loss is 2.420")  # beside another warning
