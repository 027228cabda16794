"""Passes and steps, rates of groups, and what is written of the mask while it is learned."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from proxsparse_triton.errors import ConfigError
from proxsparse_triton.ops import mask_24
from proxsparse_triton.optim.prox_adamw import ProxAdamW
from proxsparse_triton.optim.schedules import warmup_linear
from proxsparse_triton.progress import Progress
from proxsparse_triton.training.batches import Batch
from proxsparse_triton.training.loop import LoopConfig, learn, steps_of
from proxsparse_triton.training.objective import Objective
from proxsparse_triton.training.watch import MaskWatch


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=48, hidden_size=16, intermediate_size=28, num_hidden_layers=2, num_attention_heads=4))


def windows(count: int) -> list[Tensor]:
    return list(torch.randint(48, (count, 8), generator=torch.Generator().manual_seed(1)))


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    return {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".mlp." in n}


class Notes(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        self.lines.append(message)


def run(
    config: LoopConfig, count: int = 3, *, lambda1: float = 0.0, **options: Any
) -> tuple[list[Mapping[str, Any]], list[Tensor], list[list[float]]]:
    """Rows, the tokens of every step, and the rates of its groups."""
    model = tiny()
    linears = linears_of(model)
    optimizer = ProxAdamW([{"params": [(n, m.weight)], "lr": 1e-3 * (i + 1)} for i, (n, m) in enumerate(linears.items())], lambda1=lambda1)
    rows: list[Mapping[str, Any]] = []
    seen: list[Tensor] = []
    rates: list[list[float]] = []

    def loss(batch: Batch) -> Tensor:
        seen.append(batch.tokens)
        rates.append([group["lr"] for group in optimizer.param_groups])
        out: Tensor = model(input_ids=batch.tokens, labels=batch.tokens).loss
        return out

    watch = MaskWatch(linears, {}, steps_of(count, config), masked=False) if options.pop("watched", False) else None
    learn(model, windows(count), optimizer, config, loss, watch, record=rows.append, **options)
    return rows, seen, rates


def test_as_many_passes_as_the_steps_take() -> None:
    rows, seen, _ = run(LoopConfig(steps=8))
    assert len(rows) == steps_of(3, LoopConfig(steps=8)) == 8
    passes = [torch.cat(seen[start : start + 3]) for start in (0, 3)]
    assert torch.equal(passes[0], torch.stack(windows(3)))  # the first as given
    assert torch.equal(passes[1].unique(dim=0), passes[0].unique(dim=0))  # every window again
    assert rows[-1]["lr"] == pytest.approx(rows[1]["lr"] / 7)  # one decay over all of them
    epochs, *_ = run(LoopConfig(epochs=2))
    same, *_ = run(LoopConfig(steps=6))
    assert epochs == same


def test_every_pass_has_an_order_of_its_own() -> None:
    """That depends on the seed alone."""

    def orders(seed: int) -> list[list[tuple[int, ...]]]:
        seen = [tuple(tokens[0].tolist()) for tokens in run(LoopConfig(steps=4 * 7), 7, seed=seed)[1]]
        return [seen[start : start + 7] for start in range(0, 28, 7)]

    found = orders(3)
    assert all(found[i] != found[j] for i in range(4) for j in range(i))
    assert all(sorted(order) == sorted(found[0]) for order in found)
    assert orders(3) == found
    assert orders(4)[0] == found[0]
    assert orders(4)[1:] != found[1:]


def test_a_pass_ends_with_a_smaller_batch() -> None:
    """A batch never mixes two passes."""
    rows, seen, _ = run(LoopConfig(steps=5, batch_size=2))
    assert [len(tokens) for tokens in seen] == [2, 1, 2, 1, 2]
    assert len(rows) == 5


def test_fewer_steps_than_windows() -> None:
    rows, seen, _ = run(LoopConfig(steps=2))
    assert len(rows) == 2
    assert torch.equal(torch.cat(seen), torch.stack(windows(3)[:2]))


def test_groups_keep_the_ratio_of_their_rates() -> None:
    rates = torch.tensor(run(LoopConfig(steps=20))[-1])
    torch.testing.assert_close(rates[2], 1e-3 * torch.arange(1, 7))  # the peak
    assert rates[0].max() == 0
    torch.testing.assert_close(rates[10] / rates[2], torch.full((6,), 10 / 18))
    assert set(run(LoopConfig(lr=5e-3, steps=20))[-1][2]) == {5e-3}


def test_rates_are_written_as_the_median_of_the_groups() -> None:
    """And are the schedule's at every step, in every group."""
    rows, _, rates = run(LoopConfig(steps=20, warmup=0.25))
    factors = [warmup_linear(step, 20, 0.25) for step in range(20)]
    assert factors[5] == max(factors) == 1
    torch.testing.assert_close(torch.tensor(rates), torch.tensor(factors)[:, None] * 1e-3 * torch.arange(1, 7))
    assert [row["lr"] for row in rows] == [median(some) for some in rates]


def only_elsewhere(original: Callable[..., Any]) -> Callable[..., Any]:
    """transformers looks at its masks of attention; this package's code looks at no tensor."""

    def method(self: Tensor, *args: Any) -> Any:
        if sys._getframe(1).f_globals["__name__"].startswith("proxsparse_triton."):
            pytest.fail("a wait of its own")
        return original(self, *args)

    return method


def test_one_wait_for_the_device_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the mask is looked at: what changed comes over with all else."""
    waits: list[int] = []
    original = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: (waits.append(len(self)), original(self))[1])
    for name in ("item", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(Tensor, name, only_elsewhere(getattr(Tensor, name)))
    monkeypatch.setattr(ProxAdamW, "check", lambda self: None)  # reads, on a GPU, what the step before sent over
    model = tiny()
    linears = linears_of(model)
    optimizer = ProxAdamW([{"params": [(n, m.weight) for n, m in linears.items()]}], lr=1e-2, lambda1=1.0)
    given = windows(45)
    with Objective().of(model, linears, given[0]) as prepared:
        watch = MaskWatch(linears, {}, 45, masked=True)
        learn(model, given, optimizer, LoopConfig(), prepared.loss, watch)
    looks = [step for step in range(1, 46) if step % 2 == 0 or step == 45]
    assert waits == [4 + 6 + 6 * (step in looks) for step in range(1, 46)]


def test_changes_are_of_the_masks_between_the_looks() -> None:
    """Against masks taken after every step."""
    model = tiny()
    linears = linears_of(model)
    masks = [{name: mask_24(linear.weight.detach().abs()) for name, linear in linears.items()}]
    rows: list[Mapping[str, Any]] = []

    def record(row: Mapping[str, Any]) -> None:
        rows.append(row)
        masks.append({name: mask_24(linear.weight.detach().abs()) for name, linear in linears.items()})

    optimizer = ProxAdamW([{"params": [(n, m.weight) for n, m in linears.items()]}], lambda1=0.2)
    watch = MaskWatch(linears, {}, 61, masked=False)
    learn(model, windows(2), optimizer, LoopConfig(lr=3e-2, steps=61), watch=watch, record=record)
    looked = [0, *(row["step"] for row in rows if "mask_changes" in row)]
    assert looked == [*range(0, 61, 3), 61]
    total = 0.0
    for before, now in pairwise(looked):
        for name, share in rows[now - 1]["mask_changes"].items():
            changed = (masks[before][name] != masks[now][name]).unflatten(-1, (-1, 4)).any(-1).double().mean()
            assert share == pytest.approx(changed.item(), abs=1e-12)
            total += share
    assert total > 0.1


def test_changes_of_the_mask_now_and_then() -> None:
    rows, *_ = run(LoopConfig(lr=2e-2, steps=50), watched=True)
    looked = [row["step"] for row in rows if "mask_changes" in row]
    assert looked == list(range(2, 51, 2))
    assert list(rows[1]["mask_changes"]) == list(linears_of(tiny()))
    assert max(rows[9]["mask_changes"].values()) > 0
    short, *_ = run(LoopConfig(lr=2e-2, steps=43), watched=True)
    assert "mask_changes" in short[-1]  # always after the last step
    plain, *_ = run(LoopConfig(lr=2e-2, steps=50))
    assert [row["loss"] for row in plain] == [row["loss"] for row in rows]
    assert not any("mask_changes" in row or "warnings" in row for row in plain)


def test_warnings_are_noted_and_recorded() -> None:
    notes = Notes()
    rows, *_ = run(LoopConfig(steps=20), lambda1=500.0, watched=True, progress=notes)
    warned = {row["step"]: row["warnings"] for row in rows if "warnings" in row}
    assert list(warned) == [3] == [max(rows, key=lambda row: row["lr"])["step"]]
    assert warned[3] == notes.lines
    assert "before the learning rate peaked (step 3 of 20)" in notes.lines[0]
    rows, *_ = run(LoopConfig(steps=20), watched=True, progress=notes)
    assert [row["step"] for row in rows if "warnings" in row] == [18]
    assert "undecided with 2 of 20 steps left: raise --lambda1, or learn longer with --epochs or --steps." in notes.lines[-1]


def test_a_rate_too_high_for_the_mask_is_told() -> None:
    """The losses of the run itself reach the watch: climbing by a tenth a step, the mean of 1 to 5 against that of 21 to 25."""
    model, notes = tiny(), Notes()
    linears = linears_of(model)
    optimizer = ProxAdamW([{"params": [(n, m.weight) for n, m in linears.items()]}], lambda1=0.0)
    rows: list[Mapping[str, Any]] = []

    def climbing(batch: Batch) -> Tensor:
        out: Tensor = model(input_ids=batch.tokens, labels=batch.tokens).loss
        return out - out.detach() + 1 + 0.1 * len(rows)

    watch = MaskWatch(linears, {}, 100, masked=True)
    learn(model, windows(4), optimizer, LoopConfig(lr=1e-4, steps=100), climbing, watch, record=rows.append, progress=notes)
    assert [row["step"] for row in rows if "warnings" in row] == [25]
    assert rows[24]["warnings"] == notes.lines
    assert notes.lines[0].startswith("The loss is 3.200 after a quarter of the steps and was 1.200 at the start")


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"steps": 0}, "expected steps >= 1, got 0"), ({"steps": 5, "epochs": 2}, r"expected --steps or --epochs, got both \(5 and 2\)")],
)
def test_settings_that_contradict(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoopConfig(**settings)


def test_the_rates_of_the_groups_are_theirs_again() -> None:
    """A second run with the same optimiser peaks as high as the first; also where the first has failed."""
    model = tiny()
    optimizer = ProxAdamW([(name, linear.weight) for name, linear in linears_of(model).items()], lr=1e-2)
    for _ in range(2):
        rows: list[Mapping[str, Any]] = []
        learn(model, windows(3), optimizer, LoopConfig(steps=10), record=rows.append)
        assert max(row["lr"] for row in rows) == 1e-2
    with pytest.raises(ZeroDivisionError):
        learn(model, windows(3), optimizer, LoopConfig(steps=10), lambda batch: 1 / 0)  # type: ignore[arg-type, return-value]
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2]


def test_no_window_is_an_error_and_not_an_endless_loop() -> None:
    model = tiny()
    optimizer = ProxAdamW([(name, linear.weight) for name, linear in linears_of(model).items()])
    with pytest.raises(ConfigError, match="expected at least one window of tokens, got none"):
        learn(model, [], optimizer, LoopConfig(steps=3), lambda batch: batch.tokens.sum())
