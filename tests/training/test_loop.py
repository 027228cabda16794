"""The step loop against one written out by hand, and what happens when a number stops being one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, get_linear_schedule_with_warmup

from proxsparse_triton.errors import ConfigError, LearningError
from proxsparse_triton.ops import prox_24
from proxsparse_triton.progress import Progress, Task
from proxsparse_triton.training import loop
from proxsparse_triton.training.loop import LoopConfig, learn, steps_of

VICTIM = "model.layers.1.mlp.up_proj.weight"
Row = Mapping[str, Any]


def tiny(device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=48, hidden_size=16, intermediate_size=28, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(config).eval().to(device)


def windows(count: int = 5, length: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(48, (length,), generator=generator) for _ in range(count)]


class Prox:
    """lambda1 on one weight, a constant pull as the gradient of a penalty of value 0.5."""

    def __init__(self, model: nn.Module) -> None:
        self.weight = model.get_parameter(VICTIM)
        self.calls: list[str] = []

    def add_gradient(self) -> Tensor | None:
        self.calls.append("gradient")
        assert self.weight.grad is not None
        self.weight.grad += 0.01
        return torch.tensor(0.5, device=self.weight.device)

    def after_step(self) -> None:
        self.calls.append("prox")
        prox_24(self.weight.data, 5.0, out=self.weight.data)

    def shares(self) -> dict[str, Tensor]:
        share = (self.weight.unflatten(-1, (-1, 4)) != 0).sum(-1).le(2).float().mean()
        return {VICTIM: share, "all": share}


class Nothing(Prox):
    def add_gradient(self) -> Tensor | None:
        return None

    def after_step(self) -> None:
        pass


def run(model: nn.Module, config: LoopConfig | None = None, **options: Any) -> list[Row]:
    rows: list[Row] = []
    regulariser = options.pop("regulariser", Prox)(model)
    learn(model, options.pop("windows", windows()), regulariser, config or LoopConfig(lr=1e-2), record=rows.append, **options)
    return rows


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_equals_the_recipe_written_out() -> None:
    """AdamW without decay, 10 % warm-up, clip 1.0 over the whole gradient, prox after the step: bit for bit, five steps."""
    model, by_hand = tiny(), tiny()
    rows = run(model)
    prox = Prox(by_hand)
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, 1, 5)
    by_hand.train()
    for row, window in zip(rows, windows(), strict=True):
        logits = by_hand(input_ids=window[None]).logits
        loss = F.cross_entropy(logits[0, :-1].float(), window[1:])
        loss.backward()
        prox.weight.grad += 0.01
        norm = nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        assert row["lr"] == schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        prox_24(prox.weight.data, 5.0, out=prox.weight.data)
        assert row["loss"] == loss.item()
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-6)
        assert row["penalty"] == 0.5
        assert row["share_24"] == row["layers"][VICTIM] == prox.shares()["all"].item()
    assert max(row["grad_norm"] for row in rows) > 1.0  # the clip was at work
    assert equal(weights(model), weights(by_hand))
    assert not model.training


def test_first_step_has_rate_zero_but_the_prox_acts() -> None:
    """As in the authors' runs: only what the prox touches has changed after step 1."""
    model = tiny()
    before = weights(model)
    seen: list[dict[str, Tensor]] = []
    learn(model, windows(), Prox(model), LoopConfig(lr=1e-2), record=lambda row: seen.append(weights(model)))
    changed = {name for name, tensor in seen[0].items() if not torch.equal(tensor, before[name])}
    assert changed == {VICTIM}
    assert torch.equal(seen[0][VICTIM], prox_24(before[VICTIM], 5.0))
    assert all(not torch.equal(tensor, before[name]) for name, tensor in seen[-1].items())


def test_order_of_calls() -> None:
    model = tiny()
    prox = Prox(model)
    learn(model, windows(2), prox, LoopConfig(lr=1e-2))
    assert prox.calls == ["gradient", "prox"] * 2


def test_frozen_parameters_stay(device: str) -> None:
    model = tiny(device)
    model.model.embed_tokens.weight.requires_grad_(False)
    before = weights(model)
    run(model)
    changed = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    assert changed == set(before) - {"model.embed_tokens.weight"}


def test_same_seed_same_weights() -> None:
    """Dropout and the order of the second epoch depend on the seed, and on nothing else: not on the state the caller left."""

    class Free:
        def add_gradient(self) -> Tensor | None:
            return None

        def after_step(self) -> None:
            pass

        def shares(self) -> dict[str, Tensor]:
            return {"all": torch.zeros(())}

    def learned(seed: int, state: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        config = OPTConfig(vocab_size=48, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=16)
        assert config.dropout > 0
        model = OPTForCausalLM(config)
        torch.manual_seed(state)
        learn(model, windows(3), Free(), LoopConfig(lr=1e-2, epochs=2), seed=seed)
        return weights(model)

    assert equal(learned(5, state=1), learned(5, state=2))
    assert not equal(learned(5, state=1), learned(6, state=1))


def test_epochs_use_every_window_once_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    def spy(model: nn.Module, batch: Any) -> Tensor:
        seen.extend(tuple(row) for row in batch.tokens.tolist())
        return original(model, batch)

    original = loop.cross_entropy
    monkeypatch.setattr(loop, "cross_entropy", spy)
    given = windows(5)
    rows = run(tiny(), LoopConfig(lr=1e-3, epochs=2, batch_size=2), windows=given)
    order = [tuple(window.tolist()) for window in given]
    assert seen[:5] == order  # calibration windows come shuffled
    assert seen[5:] != order
    assert sorted(seen[5:]) == sorted(order)
    assert len(rows) == steps_of(5, LoopConfig(lr=1e-3, epochs=2, batch_size=2)) == 6


def nan_at(model: nn.Module, step: int) -> Callable[[Tensor], Tensor]:
    """A hook that makes one entry of the gradient NaN in that backward pass."""
    count = 0

    def hook(gradient: Tensor) -> Tensor:
        nonlocal count
        count += 1
        gradient = gradient.clone()
        if count == step:
            gradient[3, 5] = torch.nan
        return gradient

    model.get_parameter(VICTIM).register_hook(hook)
    return hook


def test_nan_in_a_gradient_stops_before_the_optimiser(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps_taken = []
    original = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *args: (steps_taken.append(1), original(self, *args))[1])
    model = tiny(device)
    nan_at(model, 3)
    rows: list[Row] = []
    last: dict[str, Tensor] = {}

    def record(row: Row) -> None:
        rows.append(row)
        last.update(weights(model))

    with pytest.raises(LearningError, match=rf"gradient norm nan at step 3 of 5, first seen in {VICTIM}\. Lower --lr"):
        learn(model, windows(), Prox(model), LoopConfig(lr=1e-2), record=record)
    assert [row["step"] for row in rows] == [1, 2]
    assert len(steps_taken) == 2
    assert equal(weights(model), last)
    assert all(tensor.isfinite().all() for tensor in last.values())


def test_infinite_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    original = loop.cross_entropy
    monkeypatch.setattr(loop, "cross_entropy", lambda model, batch: original(model, batch) / 0.0)
    model = tiny()
    before = weights(model)
    with pytest.raises(LearningError, match=r"got loss inf, .* at step 1 of 5"):
        run(model)
    assert equal(weights(model), before)


def test_infinite_penalty() -> None:
    class Broken(Prox):
        def add_gradient(self) -> Tensor | None:
            return torch.tensor(torch.inf)

    with pytest.raises(LearningError, match=r"penalty inf, .* at step 1 of 5, first seen in no single parameter.*--frozen-eps"):
        run(tiny(), regulariser=Broken)


def test_a_weight_that_is_nan_from_the_start() -> None:
    model = tiny()
    model.get_parameter(VICTIM).data[0, 0] = torch.nan
    with pytest.raises(LearningError, match=r"loss nan, .* at step 1 of 5, first seen in model\."):
        run(model)


def test_rows_and_bar(device: str) -> None:
    class Bar(Task):
        def __init__(self) -> None:
            self.fields: list[dict[str, object]] = []

        def advance(self, amount: int = 1, **fields: object) -> None:
            assert amount == 1
            self.fields.append(fields)

    class Listener(Progress):
        def task(self, description: str, total: int | None = None) -> Task:
            assert (description, total) == ("learning the mask", 5)
            return bar

    bar = Bar()
    rows = run(tiny(device), progress=Listener())
    assert [set(fields) for fields in bar.fields] == [{"loss", "sparse"}] * 5
    assert bar.fields[-1]["loss"] == f"{rows[-1]['loss']:.3f}"
    assert all(set(row) == {"step", "loss", "penalty", "grad_norm", "lr", "share_24", "layers"} for row in rows)
    assert rows[-1]["loss"] < 5.0


@pytest.mark.parametrize("fail", [False, True])
def test_matmul_precision_is_put_back(device: str, fail: bool) -> None:
    before = torch.get_float32_matmul_precision()
    during = []
    model = tiny(device)
    if fail:
        nan_at(model, 2)
    torch.set_float32_matmul_precision("medium")
    try:
        if fail:
            with pytest.raises(LearningError):
                run(model)
        else:
            learn(
                model, windows(), Prox(model), LoopConfig(lr=1e-2), record=lambda row: during.append(torch.get_float32_matmul_precision())
            )
            assert set(during) == {"high" if device == "cuda" else "medium"}
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "finite lr > 0, got 0.0"),
        ({"lr": -1.0}, "finite lr > 0, got -1.0"),
        ({"lr": float("inf")}, "finite lr > 0, got inf"),
        ({"lr": 1.0, "clip": 0.0}, "finite clip > 0"),
        ({"lr": 1.0, "adam_eps": float("nan")}, "finite adam_eps > 0, got nan"),
        ({"lr": 1.0, "batch_size": 0}, "batch_size >= 1, got 0"),
        ({"lr": 1.0, "epochs": 0}, "epochs >= 1, got 0"),
        ({"lr": 1.0, "warmup": 1.0}, "0 <= warmup < 1, got 1.0"),
        ({"lr": 1.0, "warmup": float("nan")}, "0 <= warmup < 1, got nan"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoopConfig(**settings)
