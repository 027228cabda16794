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
from proxsparse_triton.ops import frozen_penalty, prox_24
from proxsparse_triton.optim.prox_adamw import ProxAdamW
from proxsparse_triton.progress import Progress, Task
from proxsparse_triton.training import loop
from proxsparse_triton.training.loop import LoopConfig, learn, steps_of
from proxsparse_triton.training.loss import NextTokenLoss

VICTIM = "model.layers.1.mlp.up_proj.weight"
LAMBDA1, LAMBDA2, EPS = 5.0, 0.25, 0.1
Row = Mapping[str, Any]


def tiny(device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=48, hidden_size=16, intermediate_size=28, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(config).eval().to(device, dtype)


def windows(count: int = 5, length: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(48, (length,), generator=generator) for _ in range(count)]


def optimizer_of(model: nn.Module, *, max_norm: float | None = 1.0, victim: str | None = VICTIM, **settings: Any) -> ProxAdamW:
    """Prox and penalty on one weight, plain AdamW on all others."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [(name, p)], "prox": True} for name, p in named if name == victim]
    groups.append({"params": [(name, p) for name, p in named if name != victim], "prox": False})
    return ProxAdamW(groups, **{"lambda1": LAMBDA1, "lambda2": LAMBDA2, "frozen_eps": EPS, "max_norm": max_norm, **settings})


def run(model: nn.Module, config: LoopConfig | None = None, *, optimizer: ProxAdamW | None = None, **options: Any) -> list[Row]:
    rows: list[Row] = []
    chosen = optimizer or optimizer_of(model)
    learn(model, options.pop("windows", windows()), chosen, config or LoopConfig(lr=1e-2), record=rows.append, **options)
    return rows


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_equals_the_recipe_written_out() -> None:
    """Algorithm 1 with torch's own parts: penalty by autograd, clip 1.0 over all of it, AdamW without decay, 10 % warm-up, prox."""
    model, by_hand = tiny(), tiny()
    rows = run(model)
    weight = by_hand.get_parameter(VICTIM)
    w0 = weight.detach().clone()
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 1, 5)
    by_hand.train()
    for row, window in zip(rows, windows(), strict=True):
        logits = by_hand(input_ids=window[None]).logits
        loss = F.cross_entropy(logits[0, :-1], window[1:])
        penalty = frozen_penalty(weight, w0, LAMBDA2, EPS)
        (loss + penalty).backward()
        norm = nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        assert row["lr"] == schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        prox_24(weight.data, LAMBDA1, out=weight.data)
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
        assert row["penalty"] == pytest.approx(penalty.item(), rel=1e-4)
        share = (weight.unflatten(-1, (-1, 4)) != 0).sum(-1).le(2).double().mean().item()
        assert row["share_24"] == row["layers"][VICTIM] == pytest.approx(share, abs=1e-6)
    assert max(row["grad_norm"] for row in rows) > 1.0  # the clip was at work
    assert rows[-1]["penalty"] > 0
    for name, tensor in weights(by_hand).items():
        torch.testing.assert_close(model.get_parameter(name).detach(), tensor, rtol=1e-4, atol=1e-5)
    assert not model.training


def test_first_step_has_rate_zero_but_the_prox_acts() -> None:
    """As in the authors' runs: only what the prox touches has changed after step 1."""
    model = tiny()
    before = weights(model)
    seen: list[dict[str, Tensor]] = []
    learn(model, windows(), optimizer_of(model), LoopConfig(lr=1e-2), record=lambda row: seen.append(weights(model)))
    changed = {name for name, tensor in seen[0].items() if not torch.equal(tensor, before[name])}
    assert changed == {VICTIM}
    torch.testing.assert_close(seen[0][VICTIM], prox_24(before[VICTIM], LAMBDA1), rtol=1e-6, atol=0)
    assert all(not torch.equal(tensor, before[name]) for name, tensor in seen[-1].items())


def test_one_wait_for_the_device_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that is recorded comes over in one tensor, whatever the number of layers."""
    waits = []
    original = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: (waits.append(len(self)), original(self))[1])
    monkeypatch.setattr(Tensor, "item", lambda self: pytest.fail("a wait of its own"))
    model = tiny()
    optimizer = optimizer_of(model, lambda2=0.0)
    monkeypatch.setattr(optimizer, "check", lambda: None)  # reads, on a GPU, what the step before sent over
    run(model, optimizer=optimizer)
    assert waits == [4 + 1] * 5


def test_frozen_parameters_stay(device: str) -> None:
    model = tiny(device)
    model.model.embed_tokens.weight.requires_grad_(False)
    before = weights(model)
    run(model)
    changed = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    assert changed == set(before) - {"model.embed_tokens.weight"}


def test_a_layer_that_the_loss_does_not_reach(device: str) -> None:
    """It takes penalty and prox, and counts."""

    class Extra(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny()
            self.unused = nn.Linear(16, 8, bias=False)
            self.config = self.inner.config

        def forward(self, **arguments: Any) -> Any:
            return self.inner(**arguments)

    model = Extra().to(device)
    before = weights(model)
    rows = run(model, optimizer=optimizer_of(model, victim="unused.weight"))
    assert list(rows[0]["layers"]) == ["unused.weight"]
    assert not torch.equal(model.unused.weight, before["unused.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_changes_no_number(device: str, dtype: torch.dtype) -> None:
    """And it is off afterwards."""
    plain, saving = tiny(device, dtype), tiny(device, dtype)
    rows = run(plain)
    calls = []
    saving.model.layers[0].mlp.register_forward_pre_hook(lambda *args: calls.append(1))
    assert run(saving, LoopConfig(lr=1e-2, checkpointing=True)) == rows
    assert equal(weights(plain), weights(saving))
    assert len(calls) == 2 * 5 + 1  # twice a step; once to see how the model is put together
    assert not any(getattr(module, "gradient_checkpointing", False) for module in saving.modules())


def test_a_model_without_checkpointing() -> None:
    model = tiny()
    model.supports_gradient_checkpointing = False
    with pytest.raises(ConfigError, match=r"activation checkpointing, got LlamaForCausalLM\. Use --no-checkpointing"):
        run(model, LoopConfig(lr=1e-2, checkpointing=True))


def test_released_gradients_change_no_number(device: str) -> None:
    """Stepped inside the backward pass: no two gradients at a time, the same weights and rows."""
    plain, released = tiny(device), tiny(device)
    rows = run(plain, optimizer=optimizer_of(plain, max_norm=None))
    alive = []
    for p in released.parameters():
        p.register_post_accumulate_grad_hook(lambda p: alive.append(sum(q.grad is not None for q in released.parameters())))
    optimizer = optimizer_of(released, max_norm=None)
    again = run(released, LoopConfig(lr=1e-2, release_gradients=True), optimizer=optimizer)
    assert set(alive) == {1}
    assert equal(weights(plain), weights(released))
    for row, other in zip(rows, again, strict=True):
        assert row == {**other, "grad_norm": pytest.approx(other["grad_norm"], rel=1e-6)}
    assert all(not p._post_accumulate_grad_hooks or len(p._post_accumulate_grad_hooks) == 1 for p in released.parameters())


def test_released_gradients_cannot_be_clipped() -> None:
    with pytest.raises(ConfigError, match="release_gradients: expected no max_norm"):
        run(tiny(), LoopConfig(lr=1e-2, release_gradients=True))


def test_same_seed_same_weights() -> None:
    """Dropout and the order of the second epoch depend on the seed, and on nothing else: not on the state the caller left."""

    def learned(seed: int, state: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        config = OPTConfig(vocab_size=48, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=16)
        assert config.dropout > 0
        model = OPTForCausalLM(config)
        torch.manual_seed(state)
        learn(model, windows(3), optimizer_of(model), LoopConfig(lr=1e-2, epochs=2), seed=seed)
        return weights(model)

    assert equal(learned(5, state=1), learned(5, state=2))
    assert not equal(learned(5, state=1), learned(6, state=1))


def test_epochs_use_every_window_once_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    class Spy(NextTokenLoss):
        def __call__(self, batch: Any) -> Tensor:
            seen.extend(tuple(row) for row in batch.tokens.tolist())
            return super().__call__(batch)

    monkeypatch.setattr(loop, "NextTokenLoss", Spy)
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


@pytest.mark.parametrize("release", [False, True])
def test_nan_in_a_gradient_stops_the_run(device: str, release: bool) -> None:
    """With a norm nothing has been written; without one, nothing that has anything to do with the broken block."""
    model = tiny(device)
    nan_at(model, 3)
    rows: list[Row] = []
    last: dict[str, Tensor] = {}

    def record(row: Row) -> None:
        rows.append(row)
        last.update(weights(model))

    optimizer = optimizer_of(model, max_norm=None if release else 1.0)
    with pytest.raises(LearningError, match=rf"gradient norm nan at step 3 of 5.* {VICTIM}.* Lower "):
        learn(model, windows(), optimizer, LoopConfig(lr=1e-2, release_gradients=release), record=record)
    assert [row["step"] for row in rows] == [1, 2]
    now = weights(model)
    assert all(tensor.isfinite().all() for tensor in now.values())
    if not release:
        assert equal(now, last)
    block = (3, slice(4, 8))  # row 3, column 5
    assert torch.equal(now[VICTIM][block], last[VICTIM][block])


def test_the_message_names_step_and_parameter() -> None:
    model = tiny()
    nan_at(model, 2)
    with pytest.raises(LearningError, match=rf"gradient norm nan at step 2 of 5, first seen in {VICTIM}\. Lower --lr or --lambda2"):
        run(model)


def test_infinite_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(NextTokenLoss):
        def __call__(self, batch: Any) -> Tensor:
            return super().__call__(batch) / 0.0

    monkeypatch.setattr(loop, "NextTokenLoss", Broken)
    model = tiny()
    before = weights(model)
    with pytest.raises(LearningError, match=r"got loss inf, .* at step 1 of 5"):
        run(model)
    assert equal(weights(model), before)


def test_infinite_penalty() -> None:
    """Finite gradients of the loss, those of the penalty beyond any number: the optimiser says where."""
    model = tiny()
    with pytest.raises(LearningError, match=rf"gradient norm (inf|nan) at step \d of 5: ProxAdamW: .* {VICTIM}; .*raise frozen_eps"):
        run(model, LoopConfig(lr=1e3), optimizer=optimizer_of(model, lambda1=0.0, lambda2=1e38, frozen_eps=1e-30))


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
                model,
                windows(),
                optimizer_of(model),
                LoopConfig(lr=1e-2),
                record=lambda row: during.append(torch.get_float32_matmul_precision()),
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
        ({"lr": 1.0, "batch_size": 0}, "batch_size >= 1, got 0"),
        ({"lr": 1.0, "epochs": 0}, "epochs >= 1, got 0"),
        ({"lr": 1.0, "warmup": 1.0}, "0 <= warmup < 1, got 1.0"),
        ({"lr": 1.0, "warmup": float("nan")}, "0 <= warmup < 1, got nan"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoopConfig(**settings)
