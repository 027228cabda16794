"""ProxSparse as published on a tiny random Llama: what is learned, what is recorded, and what must not be touched."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from methods.tiny import WINDOWS, Notes, same, task, tiny
from torch import Tensor

from proxsparse_triton.errors import ConfigError, LearningError, ModelError
from proxsparse_triton.methods.base import PruneResult
from proxsparse_triton.methods.magnitude import magnitude_mask
from proxsparse_triton.methods.proxsparse import ProxSparse, default_precision, rms
from proxsparse_triton.models.selection import plan_layers
from proxsparse_triton.sparsity import check_mask
from proxsparse_triton.training import memory
from proxsparse_triton.training.loop import LoopConfig, fast_matmul, learn

STEPS = WINDOWS


def paper(**settings: Any) -> ProxSparse:
    return ProxSparse(recipe="paper", **settings)


def run(device: str, **settings: Any) -> tuple[PruneResult, list[Mapping[str, Any]]]:
    rows: list[Mapping[str, Any]] = []
    return paper(**settings).prune(task(device, rows)), rows


def test_masks_and_what_is_recorded(device: str) -> None:
    result, rows = run(device, lambda1=2.0, lr=1e-2)
    assert result.weights is None  # the caller keeps the original ones
    assert list(result.masks) == list(task(device).linears())
    for name, mask in result.masks.items():
        check_mask("test", name, mask)
        assert mask.device.type == "cpu"
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    shares = [row["share_24"] for row in rows]
    assert shares[-1] > shares[0] + 0.1
    assert result.summary["share_24"] == pytest.approx(shares[-1])
    assert all(row["penalty"] == 0 for row in rows)
    # the whole is the mean over layers, weighted by their size
    sizes = {name: linear.weight.numel() for name, linear in task(device).linears().items()}
    assert list(rows[-1]["layers"]) == list(sizes)
    mean = sum(share * sizes[name] for name, share in rows[-1]["layers"].items()) / sum(sizes.values())
    assert shares[-1] == pytest.approx(mean, abs=1e-6)


def test_unselected_layers_never_see_the_prox(device: str) -> None:
    given = task(device, skip=["mlp"])
    paper(lambda1=50.0, lr=1e-2).prune(given)
    for name, parameter in given.model.named_parameters():
        zeros = int((parameter == 0).sum())
        assert (zeros > 0) == ("self_attn" in name), name


def test_without_lambda1_it_is_plain_training(device: str) -> None:
    """By torch's own AdamW, then the two largest of each block."""
    given, by_hand = task(device), task(device)
    result = paper(lambda1=0.0, lr=1e-2).prune(given)
    optimizer = torch.optim.AdamW(by_hand.model.parameters(), lr=0.0, weight_decay=0.0)
    by_hand.model.train()
    for step, window in enumerate(by_hand.windows):
        optimizer.param_groups[0]["lr"] = 1e-2 * (STEPS - step) / (STEPS - 1) if step else 0.0
        with fast_matmul(torch.device(device)):  # of the same rounding: Adam makes much of it
            by_hand.model(input_ids=window[None].to(device), labels=window[None].to(device)).loss.backward()
        torch.nn.utils.clip_grad_norm_(by_hand.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for name, linear in by_hand.linears().items():
        torch.testing.assert_close(given.linears()[name].weight, linear.weight, rtol=1e-3, atol=1e-4)
        assert torch.equal(result.masks[name], magnitude_mask(given.linears()[name].weight)), name
    assert result.summary["share_24"] == 0
    assert not same(result, run(device, lambda1=2.0, lr=1e-2)[0])


def test_mask_is_that_of_the_learned_weights(device: str) -> None:
    given = task(device)
    start = {name: linear.weight.detach().clone() for name, linear in given.linears().items()}
    result = paper(lambda1=1.0, lr=2e-2).prune(given)
    moved = 0
    for name, linear in given.linears().items():
        assert torch.equal(result.masks[name], magnitude_mask(linear.weight))
        moved += int((result.masks[name] != magnitude_mask(start[name])).sum())
    assert moved > 0


def test_lambda2_changes_the_masks_and_is_recorded(device: str) -> None:
    plain, _ = run(device, lambda1=1.0, lr=2e-2)
    frozen, rows = run(device, lambda1=1.0, lr=2e-2, lambda2=0.5, frozen_eps=0.1)
    assert not same(plain, frozen)
    assert rows[0]["penalty"] == 0  # w = w0 before the first step
    assert all(row["penalty"] > 0 for row in rows[1:])
    assert all(math.isfinite(row["penalty"]) for row in rows)


def test_lambda2_needs_no_activation_memory(device: str) -> None:
    """What autograd saves for the backward pass, byte by byte, is the same with and without the penalty."""

    def saved_bytes(lambda2: float) -> int:
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run(device, lambda1=1.0, lr=1e-2, lambda2=lambda2)
        return total

    assert saved_bytes(0.5) == saved_bytes(0.0) > 0


@pytest.mark.parametrize("lambda2", [0.0, 0.5])
def test_the_optimiser_of_a_model(device: str, lambda2: float) -> None:
    """Selected weights take prox and penalty, all others are plain; W0 is only kept where the penalty needs it."""
    given = task(device, skip=["mlp"])
    linears = given.linears()
    settings = paper(lr=1e-2, lambda1=0.7, lambda2=lambda2, frozen_eps=0.3, clip=2.0)
    optimizer = settings.optimizer(given.model, linears, STEPS, seed=3)
    prox, plain = optimizer.param_groups
    assert (prox["prox"], plain["prox"], prox["lambda1"], prox["frozen_eps"]) == (True, False, 0.7, 0.3)
    assert prox["param_names"] == list(linears)
    assert len(prox["params"]) + len(plain["params"]) == len(list(given.model.parameters()))
    learn(given.model, given.windows, optimizer, LoopConfig(lr=1e-2))
    kept = [name for name, p in given.model.named_parameters() if optimizer.pretrained(p) is not None]
    assert kept == (list(linears) if lambda2 else [])


def test_frozen_parameters_and_models_without_others(device: str) -> None:
    given = task(device)
    linears = given.linears()
    for name, p in given.model.named_parameters():
        p.requires_grad_(name in linears)
    (group,) = paper(lr=1e-2, lambda1=0.7).optimizer(given.model, linears, STEPS, seed=3).param_groups
    assert group["param_names"] == list(linears)
    before = given.model.get_input_embeddings().weight.clone()  # type: ignore[operator]
    paper(lambda1=1.0, lr=1e-2).prune(given)
    assert torch.equal(given.model.get_input_embeddings().weight, before)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("parameters", "dtype", "expected"),
    [
        (28e6, torch.float32, (32, "float32")),
        (7e10, torch.float32, (32, "float32")),
        (28e6, torch.bfloat16, (24, "float32")),
        (7e9, torch.bfloat16, (16, "bfloat16")),
        (14e9, torch.bfloat16, (16, "int8")),
    ],
)
def test_default_precision(parameters: float, dtype: torch.dtype, expected: tuple[int, str]) -> None:
    assert default_precision(int(parameters), dtype) == expected


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, {"exp_avg": torch.float32, "exp_avg_sq": torch.float32, "residual": torch.int8}),
        ({"weight_bits": 32, "moments": "bfloat16"}, {"exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16, "residual": torch.int16}),
        ({"weight_bits": 16, "moments": "int8"}, {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8}),
    ],
)
def test_precision_reaches_the_optimiser(device: str, settings: dict[str, Any], kept: dict[str, torch.dtype]) -> None:
    """What is asked for is kept for the pruned weights, and recorded."""
    given = task(device, model=tiny(device, torch.bfloat16))
    linears = given.linears()
    method = paper(lambda1=1.0, lr=1e-2, **settings)
    optimizer = method.optimizer(given.model, linears, STEPS, seed=3)
    learn(given.model, given.windows, optimizer, LoopConfig(lr=1e-2))
    state = optimizer.state[next(iter(linears.values())).weight]
    found = {key: value.dtype for key, value in state.items() if isinstance(value, Tensor) and "scale" not in key}
    assert found == kept
    summary: Any = method.prune(task(device, model=tiny(device, torch.bfloat16))).summary
    assert (summary["weight_bits"], summary["moments"]) == method.precision(given.model)


def test_clip_modes(device: str) -> None:
    """With a penalty that matters the three differ; no clipping frees each gradient inside the backward pass."""
    settings = {"lambda1": 0.5, "lr": 2e-2, "lambda2": 5.0}
    norms = {mode: [row["grad_norm"] for row in run(device, clip_mode=mode, **settings)[1]] for mode in ("total", "loss", "none")}
    assert norms["total"][0] == pytest.approx(norms["loss"][0])  # w = w0: no penalty yet
    assert norms["total"] != norms["loss"]
    assert norms["total"][-1] != pytest.approx(norms["none"][-1], rel=1e-3)
    given = task(device)
    alive = []
    for p in given.model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: alive.append(sum(q.grad is not None for q in given.model.parameters())))
    paper(clip_mode="none", **settings).prune(given)
    assert set(alive) == {1}


def test_nan_without_clipping_is_found(device: str) -> None:
    given = task(device)
    given.linears()["model.layers.1.mlp.up_proj.weight"].weight.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(LearningError, match=r"at step 1 of 8: ProxAdamW: .* model\.layers\.1\.mlp\.up_proj\.weight;"):
        paper(lambda1=1.0, lr=1e-2, clip_mode="none").prune(given)


@pytest.mark.parametrize(("asked", "limit", "expected"), [(None, None, False), (None, 1, True), (None, 10**12, False), (True, None, True),
                                                          (False, 1, False)])  # fmt: skip
def test_checkpointing_where_a_step_does_not_fit(asked: bool | None, limit: int | None, expected: bool) -> None:
    """Asked for, or decided by the limit; on the CPU there is none by default. It changes no mask."""
    notes = Notes()
    settings: Any = {"lambda1": 2.0, "lr": 1e-2}
    result = paper(checkpointing=asked, **settings).prune(task("cpu", memory=limit, progress=notes))
    assert result.summary["checkpointing"] is expected
    assert any("checkpointing" in line for line in notes.lines) == expected
    assert same(result, run("cpu", **settings)[0])


def test_checkpointing_of_models_that_have_none_or_cannot_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is never asked to; for the second the careful choice is made."""
    model = tiny("cpu")
    model.supports_gradient_checkpointing = False
    assert paper(lr=1e-2).prune(task("cpu", model=model, memory=1)).summary["checkpointing"] is False

    def refuse(*args: object, **options: object) -> None:
        raise ModelError("plan: expected something else")

    monkeypatch.setattr(memory, "meta_model", refuse)
    assert paper(lr=1e-2).prune(task("cpu", memory=10**12)).summary["checkpointing"] is True


def test_memory_of_a_step() -> None:
    """W0 only with lambda2, in the dtype of the file; gradients all at once unless they are freed."""
    model = memory.meta_model(tiny("cpu").config, torch.float32)
    pruned = [f"{name}.weight" for name in plan_layers(model).selected()]
    plain = paper().memory_of_step(model, pruned, 16, checkpointing=False).items
    frozen = paper(lambda2=0.5).memory_of_step(model, pruned, 16, checkpointing=False).items
    stored = paper(lambda2=0.5).memory_of_step(model, pruned, 16, checkpointing=False, stored=torch.bfloat16).items
    weights = sum(model.get_parameter(name).nbytes for name in pruned)
    assert (plain["pretrained"], frozen["pretrained"], stored["pretrained"]) == (0, weights, weights // 2)
    assert {key: value for key, value in plain.items() if key != "pretrained"} == {
        key: value for key, value in stored.items() if key != "pretrained"
    }
    clipped, released = (paper(clip_mode=mode).memory_of_step(model, pruned, 2, checkpointing=True) for mode in ("total", "none"))
    assert released.peak < clipped.peak
    assert clipped.items["gradients"] > 2 * released.items["gradients"]


def test_derived_strengths_are_dimensionless(device: str) -> None:
    """lambda1 T sigma = 2 and lr T / sigma = 2, whatever the scale of the model and the number of steps."""
    given = task(device)
    flat = torch.cat([linear.weight.detach().flatten() for linear in given.linears().values()]).double()
    sigma = float(flat.square().mean().sqrt())
    assert rms(given.linears()) == pytest.approx(sigma, rel=1e-6)
    for settings, steps in (({}, STEPS), ({"batch_size": 3}, 3), ({"epochs": 2}, 2 * STEPS)):
        result, rows = run(device, **settings)
        summary: Any = result.summary
        assert summary["steps"] == steps == len(rows)
        assert summary["weight_rms"] == pytest.approx(sigma, rel=1e-6)
        assert summary["lambda1"] * steps * sigma == pytest.approx(2.0)
        assert summary["lr"] * steps / sigma == pytest.approx(2.0)
        assert max(row["lr"] for row in rows) == pytest.approx(summary["lr"])
    given_both = run(device, lambda1=0.3, lr=0.004)[0].summary
    assert (given_both["lambda1"], given_both["lr"]) == (0.3, 0.004)


def test_strength_scales_with_the_model(device: str) -> None:
    """Twice the weights, half of lambda1: the share of 2:4 blocks after a step of rate zero stays."""
    shares = []
    for scale in (1.0, 2.0):
        rows: list[Mapping[str, Any]] = []
        given = task(device, rows)
        for linear in given.linears().values():
            linear.weight.data *= scale
        paper(lambda1=4.0 / scale, lr=1e-9).prune(given)
        shares.append(rows[0]["share_24"])
    assert shares[0] == pytest.approx(shares[1], abs=0.01)
    assert 0.05 < shares[0] < 1


def test_learning_in_bf16(device: str) -> None:
    model = tiny(device, torch.bfloat16)
    result = paper(lambda1=1.0, lr=1e-2, lambda2=0.1).prune(task(device, model=model))
    for name, mask in result.masks.items():
        check_mask("test", name, mask)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())


def test_same_seed_same_masks() -> None:
    """On the CPU, bit for bit; the rows as well."""
    one, rows = run("cpu", lambda1=1.0, lr=1e-2, epochs=2)
    other, again = run("cpu", lambda1=1.0, lr=1e-2, epochs=2)
    assert same(one, other)
    assert rows == again


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_weights_without_a_scale(device: str, value: float) -> None:
    given = task(device)
    for linear in given.linears().values():
        linear.weight.data.fill_(value)
    with pytest.raises(ModelError, match="proxsparse: expected finite weights that are not all zero"):
        paper().prune(given)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lambda1": -1.0}, "finite lambda1 >= 0, got -1.0"),
        ({"lambda2": float("nan")}, "finite lambda2 >= 0, got nan"),
        ({"frozen_eps": 0.0}, "finite frozen_eps > 0, got 0.0. Choose another --frozen-eps"),
        ({"clip": 0.0}, "finite clip > 0, got 0.0"),
        ({"clip": float("inf")}, "finite clip > 0, got inf"),
        ({"lr": 0.0}, "finite lr > 0, got 0.0"),
        ({"weight_bits": 8}, "weight_bits to be one of 16, 24, 32, got 8. Choose another --weight-bits"),
        ({"moments": "int4"}, "moments to be one of float32, bfloat16, int8, got 'int4'. Choose another --moments"),
        ({"clip_mode": "norm"}, "clip_mode to be one of total, loss, none, got 'norm'. Choose another --clip-mode"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        paper(**settings)


def test_low_bits_of_fp32_weights(device: str) -> None:
    with pytest.raises(ConfigError, match=r"--weight-bits 24 with bf16 weights only, got torch\.float32\. Learn with --dtype bfloat16"):
        paper(weight_bits=24).prune(task(device))
