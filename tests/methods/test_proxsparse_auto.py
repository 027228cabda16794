"""The recipe with nothing to tune on a tiny random Llama: what it learns from, what each switch changes, and what stays as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import by_hand
import pytest
import torch
import torch.nn.functional as F
from methods.tiny import WINDOWS, Notes, heldout_loss, same, task, tiny, trained_task
from torch import Tensor, nn

from proxsparse_triton.comparison import agreement
from proxsparse_triton.errors import ConfigError
from proxsparse_triton.methods import proxsparse
from proxsparse_triton.methods.base import PruneResult
from proxsparse_triton.methods.proxsparse import ProxSparse, root_mean_square
from proxsparse_triton.methods.wanda import Wanda
from proxsparse_triton.models.selection import plan_layers
from proxsparse_triton.optim.prox_adamw import ProxAdamW
from proxsparse_triton.sparsity import check_mask
from proxsparse_triton.training import memory, pretrained

DEAD = [f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkvo"]


def run(device: str, **settings: Any) -> tuple[PruneResult, list[Mapping[str, Any]]]:
    rows: list[Mapping[str, Any]] = []
    return ProxSparse(**settings).prune(task(device, rows)), rows


def two_largest(scores: Tensor) -> Tensor:
    blocks = scores.detach().cpu().unflatten(-1, (-1, 4))
    return torch.zeros_like(blocks, dtype=torch.bool).scatter_(-1, blocks.topk(2).indices, True).flatten(-2)


@contextmanager
def watched_learning(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ProxAdamW]]:
    """The optimisers that `prune` learns with."""
    seen: list[ProxAdamW] = []
    original = proxsparse.learn

    def learn(model: nn.Module, windows: Any, optimizer: ProxAdamW, *rest: Any, **options: Any) -> None:
        seen.append(optimizer)
        original(model, windows, optimizer, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(proxsparse, "learn", learn)
        yield seen


def test_masks_are_2_4_and_nothing_else_has_changed(device: str) -> None:
    """The defaults: masks alone come back, and of the model only the weights to prune have learned."""
    rows: list[Mapping[str, Any]] = []
    notes = Notes()
    given = task(device, rows, progress=notes)
    before = {name: p.detach().clone() for name, p in given.model.named_parameters()}
    result = ProxSparse().prune(given)
    assert result.weights is None  # the caller keeps the original ones
    assert list(result.masks) == list(given.linears())
    for name, mask in result.masks.items():
        check_mask("test", name, mask)
        assert mask.device.type == "cpu"
    for name, p in given.model.named_parameters():
        assert torch.equal(p, before[name]) == (name not in result.masks), name
        assert p.requires_grad
    assert not any("forward" in linear.__dict__ for linear in given.linears().values())
    assert [row["step"] for row in rows] == list(range(1, 4 * WINDOWS + 1))
    assert "(4 passes over 8)" in notes.lines[0]
    summary: Any = result.summary
    assert {key: value for key, value in summary.items() if key not in ("lambda1", "lr", "weight_rms", "share_24", "agreement")} == {
        "recipe": "auto", "loss": "kl", "forward": "masked", "train": "pruned", "temperature": 1.0, "layer_weight": 1.0,
        "prox_scale": "activations", "lambda2": 0.0, "steps": 4 * WINDOWS, "weight_bits": 32, "moments": "float32", "checkpointing": False,
    }  # fmt: skip
    assert summary["share_24"] == rows[-1]["share_24"] > 0


def test_better_masks_than_without_it(device: str) -> None:
    """On held-out text of a small trained model; the published algorithm has as many steps."""
    loss = {"dense": heldout_loss(device)}
    for name, method in (("wanda", Wanda()), ("paper", ProxSparse(recipe="paper", steps=32)), ("auto", ProxSparse(steps=32))):
        loss[name] = heldout_loss(device, method.prune(trained_task(device)))
    # 1.069, 1.441, 1.398 and 1.279 when this was written
    assert loss["auto"] - loss["dense"] < 0.75 * (min(loss["wanda"], loss["paper"]) - loss["dense"])


def groups_of(optimizer: ProxAdamW) -> list[dict[str, Any]]:
    """As they are before and after learning, whose schedule ends with another lr: that one is left out."""
    keys = ("param_names", "prox", "lambda1", "lambda2")
    return [{**{key: group[key] for key in keys}, "scaled": group["column_scale"] is not None} for group in optimizer.param_groups]


def of_switch(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    with watched_learning(monkeypatch) as seen:
        result, _ = run("cpu", **{"steps": 1, **settings})
    return dict(result.summary), groups_of(seen[0])


@pytest.mark.parametrize(
    ("settings", "summary", "groups"),
    [
        ({"loss": "ce"}, {"loss": "ce"}, {}),
        ({"forward": "learned"}, {"forward": "learned"}, {}),
        ({"prox_scale": "none"}, {"prox_scale": "none"}, {"scaled": False}),
        ({"train": "all"}, {"train": "all"}, {}),
        ({"temperature": 3.0}, {"temperature": 3.0}, {}),
        ({"layer_weight": 0.5}, {"layer_weight": 0.5}, {}),
        ({"layer_weight": 0.0}, {"layer_weight": 0.0}, {}),
        ({"lambda1": 0.25}, {"lambda1": 0.25}, {"lambda1": 0.25}),
        ({"lambda2": 0.5}, {"lambda2": 0.5}, {"lambda2": 0.5}),
        ({"lr": 0.125}, {"lr": 0.125}, {}),
        ({"moments": "int8"}, {"moments": "int8"}, {}),
    ],
)
def test_a_switch_changes_what_it_says_and_nothing_else(
    settings: dict[str, Any], summary: dict[str, Any], groups: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, plain_groups = of_switch(monkeypatch)
    found, found_groups = of_switch(monkeypatch, **settings)
    for figures in (plain, found):
        figures.pop("share_24")
        figures.pop("agreement")
    assert found == {**plain, **summary} != plain
    prox = [group for group in found_groups if group["prox"]]
    assert prox == [{**group, **groups} for group in plain_groups]
    others = [name for group in found_groups if not group["prox"] for name in group["param_names"]]
    named = [name for name, _ in tiny("cpu").named_parameters()]
    assert others == ([name for name in named if name not in {group["param_names"][0] for group in prox}] if "train" in settings else [])


@pytest.mark.parametrize("name", ["auto", "paper"])
def test_the_paper_by_switches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All switches of one recipe set to those of the other: the other, but for the strengths of each tensor."""
    switches: dict[str, Any] = {
        "auto": {"loss": "kl", "forward": "masked", "train": "pruned", "prox_scale": "activations"},
        "paper": {"loss": "ce", "forward": "learned", "train": "all", "prox_scale": "none"},
    }
    fixed: dict[str, Any] = {"lambda1": 0.5, "lr": 0.01, "steps": 4}
    other = "paper" if name == "auto" else "auto"
    one, two = run("cpu", recipe=name, **fixed), run("cpu", recipe=other, **switches[name], **fixed)
    assert same(one[0], two[0])
    assert one[1] == two[1]
    assert not same(one[0], run("cpu", recipe=other, **fixed)[0])
    assert {**two[0].summary, "recipe": name} == one[0].summary


@pytest.mark.parametrize("forward", ["masked", "learned"])
@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("kl", {}),
        ("kl", {"temperature": 0.5}),
        ("kl", {"layer_weight": 0.0}),
        ("kl", {"temperature": 2.0, "layer_weight": 0.25}),
        ("ce", {}),
    ],
)
def test_the_first_loss_by_hand(loss: str, options: dict[str, float], forward: str, device: str) -> None:
    """Before any step: the dense weights, or the dense weights under the mask of |c W0|, against the dense model or the text."""
    given = task(device)
    scales = ProxSparse().column_scales(given)
    window = given.windows[0][None].to(device)
    with torch.no_grad():
        dense = given.model(input_ids=window, output_hidden_states=True)
        if forward == "masked":
            for name, linear in given.linears().items():
                linear.weight *= two_largest(linear.weight.abs() * scales[name]).to(device)
        out = given.model(input_ids=window, output_hidden_states=True)
    expected = by_hand.distance(out, dense, **options) if loss == "kl" else F.cross_entropy(out.logits[0, :-1], window[0, 1:])
    _, rows = run(device, loss=loss, forward=forward, **options, steps=1)
    assert rows[0]["loss"] == pytest.approx(float(expected), rel=1e-3, abs=1e-6)
    assert (rows[0]["loss"] < 1e-6) == (loss == "kl" and forward == "learned")


@pytest.mark.parametrize("scaled", ["activations", "none"])
def test_mask_is_that_of_the_scaled_learned_weights(scaled: Any, device: str) -> None:
    given = task(device)
    start = {name: linear.weight.detach().clone() for name, linear in given.linears().items()}
    scales = ProxSparse().column_scales(task(device)) if scaled == "activations" else {}
    result = ProxSparse(prox_scale=scaled, steps=6, lr=2e-2).prune(given)
    moved = 0
    for name, linear in given.linears().items():
        scale = scales.get(name, torch.ones(linear.in_features, device=device))
        assert torch.equal(result.masks[name], two_largest(linear.weight.abs() * scale)), name
        moved += int((result.masks[name] != two_largest(start[name].abs() * scale)).sum())
    assert moved > 0
    # and the share of blocks that simpler methods would have chosen alike
    chosen = {"magnitude": {name: two_largest(w.abs()) for name, w in start.items()}}
    if scales:
        chosen["wanda"] = {name: two_largest(w.abs() * scales[name]) for name, w in start.items()}
    assert result.summary["agreement"] == {method: pytest.approx(agreement(result.masks, masks)) for method, masks in chosen.items()}


def test_column_scales_by_hand(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rms of each input over the first windows, in ordinary forward passes; such that c * w is as large as w."""
    monkeypatch.setattr(proxsparse, "STATISTIC_WINDOWS", 3)
    given = task(device)
    seen: dict[str, list[Tensor]] = {name: [] for name in given.linears()}
    handles = [
        linear.register_forward_pre_hook(lambda module, args, name=name: seen[name].append(args[0].flatten(0, -2)))
        for name, linear in given.linears().items()
    ]
    with torch.no_grad():
        for window in given.windows[:3]:
            given.model(input_ids=window[None].to(device))
    for handle in handles:
        handle.remove()
    scales = ProxSparse().column_scales(given)
    assert list(scales) == list(given.linears())
    for name, linear in given.linears().items():
        c, size = scales[name], torch.cat(seen[name]).double().square().mean(0).sqrt()
        torch.testing.assert_close((c / c.mean()).double(), size / size.mean(), rtol=1e-4, atol=1e-5)
        assert root_mean_square(c * linear.weight.detach()) == pytest.approx(root_mean_square(linear.weight.detach()), rel=1e-5)
    assert ProxSparse(prox_scale="none").column_scales(given) == {}
    assert ProxSparse(recipe="paper").column_scales(given) == {}


def test_layers_without_inputs_are_named_and_have_no_scale(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = Notes()
    given = task(device, progress=notes)
    given.model.model.layers[1].input_layernorm.weight.data.zero_()  # type: ignore[union-attr, index]
    with watched_learning(monkeypatch) as seen:
        result = ProxSparse(steps=3).prune(given)
    said = [line for line in notes.lines if "every input that reached it in the calibration text was zero" in line]
    assert [line.split(": ")[0] for line in said] == DEAD
    assert all(line.endswith("Its mask is learned without activations.") for line in said)
    scales = {group["param_names"][0]: group["column_scale"] for group in seen[0].param_groups}
    assert [name for name, scale in scales.items() if scale is None] == DEAD
    for name, mask in result.masks.items():
        check_mask("test", name, mask)
    assert result.summary["steps"] == 3


def test_an_input_that_never_fires_is_pruned_first(device: str) -> None:
    """A feature that is zero beside others that are not: its weights are the first to go, and nothing is not finite."""
    given = task(device, include=["q_proj"])
    for block in given.model.model.layers:  # type: ignore[union-attr]
        block.input_layernorm.weight.data[[0, 1]] = 0.0  # type: ignore[union-attr, index]
    result = ProxSparse(steps=3).prune(given)
    assert len(result.masks) == 2
    for name, mask in result.masks.items():
        check_mask("test", name, mask)
        assert not mask[:, :2].any()


@pytest.mark.parametrize(
    ("settings", "steps", "said"),
    [
        ({"steps": 12}, 12, "12 steps of 1 window (1.5 passes over 8)"),
        ({"steps": 2}, 2, "2 steps of 1 window (0.25 passes over 8)"),
        ({"epochs": 1}, 8, "8 steps of 1 window (1 pass over 8)"),
        ({"epochs": 2, "batch_size": 3}, 6, "6 steps of 3 windows (2 passes over 8)"),
    ],
)
def test_passes_are_told(settings: dict[str, Any], steps: int, said: str, device: str) -> None:
    notes, rows = Notes(), []  # type: ignore[var-annotated]
    result = ProxSparse(**settings).prune(task(device, rows, progress=notes))
    assert result.summary["steps"] == steps == len(rows)
    assert said in notes.lines[0]


def test_without_lambda1(device: str) -> None:
    result, rows = run(device, lambda1=0.0, steps=6, lr=2e-2)
    assert result.summary["lambda1"] == 0.0
    assert all(row["share_24"] == 0 for row in rows)  # no prox, no zeros
    for name, mask in result.masks.items():
        check_mask("test", name, mask)
    assert not same(result, run(device, lambda1=20.0, steps=6, lr=2e-2)[0])


def test_same_seed_same_masks() -> None:
    """On the CPU, bit for bit, the rows as well; another seed, another order of the later passes."""
    found = []
    for seed in (3, 3, 4):
        rows: list[Mapping[str, object]] = []
        given = task("cpu", rows)
        result = ProxSparse(epochs=2, lr=2e-2).prune(replace(given, windows=given.windows[:3], seed=seed))
        found.append((result, rows))
    (one, rows), (other, again), (_, seeded) = found
    assert same(one, other)
    assert rows == again
    assert rows[:3] == seeded[:3]  # the first pass is in the order of the windows
    assert rows != seeded


def test_w0_is_kept_once(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With lambda2 the optimiser's W0 is the one that the mask is put on."""
    kept: list[bool] = []
    held: list[int] = []
    given = task(device)
    linears = given.linears()
    original, prepare = proxsparse.learn, pretrained.compact

    def compact(weight: Tensor) -> Tensor:
        copy = prepare(weight)
        held.append(copy.data_ptr())
        return copy

    monkeypatch.setattr(pretrained, "compact", compact)

    def learn(model: nn.Module, windows: Any, optimizer: ProxAdamW, *rest: Any, **options: Any) -> None:
        original(model, windows, optimizer, *rest, **options)
        for linear in linears.values():
            w0 = optimizer.pretrained(linear.weight)
            assert w0 is not None
            kept.append(w0.data_ptr() in held)

    monkeypatch.setattr(proxsparse, "learn", learn)
    result = ProxSparse(lambda2=0.5, steps=2).prune(given)
    assert kept == [True] * len(linears)
    assert result.summary["lambda2"] == 0.5


def test_checkpointing_changes_no_mask() -> None:
    """The masked weights are formed again when a block is run again."""
    plain, rows = run("cpu", steps=4, lr=2e-2)
    saving, again = run("cpu", steps=4, lr=2e-2, checkpointing=True)
    assert same(plain, saving)
    assert rows == again
    assert saving.summary["checkpointing"] is True


def test_learning_in_bf16(device: str) -> None:
    model = tiny(device, torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = ProxSparse(steps=4, lr=2e-2).prune(task(device, model=model))
    for name, mask in result.masks.items():
        check_mask("test", name, mask)
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == set(result.masks)
    assert (result.summary["weight_bits"], result.summary["moments"]) == (24, "float32")


def test_memory_of_a_step() -> None:
    """W0 always, moments and gradients of the weights that learn alone."""
    model = memory.meta_model(tiny("cpu").config, torch.float32)
    pruned = [f"{name}.weight" for name in plan_layers(model).selected()]
    weights, everything = sum(model.get_parameter(name).nbytes for name in pruned), sum(p.nbytes for p in model.parameters())
    plain = ProxSparse().memory_of_step(model, pruned, 16, checkpointing=False).items
    assert (plain["pretrained"], plain["moments"]) == (weights, 2 * weights)
    assert ProxSparse(lambda2=0.5).memory_of_step(model, pruned, 16, checkpointing=False).items == plain  # one W0 for both
    stored = ProxSparse().memory_of_step(model, pruned, 16, checkpointing=False, stored=torch.bfloat16).items
    assert stored == {**plain, "pretrained": weights // 2}
    more = ProxSparse(train="all").memory_of_step(model, pruned, 16, checkpointing=False).items
    assert more["moments"] == 2 * everything
    gradients = {train: ProxSparse(train=train).memory_of_step(model, pruned, 2, checkpointing=True) for train in ("pruned", "all")}
    assert gradients["pruned"].items["gradients"] < gradients["all"].items["gradients"]
    none = ProxSparse(loss="ce", forward="learned").memory_of_step(model, pruned, 16, checkpointing=False).items
    assert none["pretrained"] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "ce", "temperature": 2.0}, "expected --temperature with --loss kl, got ce (recipe auto). Leave it out."),
        ({"recipe": "paper", "temperature": 2.0}, "expected --temperature with --loss kl, got ce (recipe paper). Leave it out."),
        ({"loss": "ce", "layer_weight": 1.0}, "expected --layer-weight with --loss kl, got ce (recipe auto). Leave it out."),
        ({"recipe": "paper", "layer_weight": 0.0}, "expected --layer-weight with --loss kl, got ce (recipe paper). Leave it out."),
        ({"steps": 5, "epochs": 2}, "expected --steps or --epochs, got both (5 and 2). Leave one out."),
        ({"steps": 5, "epochs": 1}, "expected --steps or --epochs, got both (5 and 1). Leave one out."),
        ({"loss": "mse"}, "expected --loss kl or ce, got 'mse'. Choose one of these."),
        ({"forward": "pruned"}, "expected --forward masked or learned, got 'pruned'. Choose one of these."),
        ({"train": "masks"}, "expected --train pruned or all, got 'masks'. Choose one of these."),
        ({"prox_scale": "wanda"}, "expected prox_scale to be one of none, activations, got 'wanda'. Choose another --prox-scale."),
        ({"temperature": 0.0}, "expected a finite temperature > 0, got 0.0. The default is 1."),
        ({"temperature": float("nan")}, "expected a finite temperature > 0, got nan"),
        ({"layer_weight": -1.0}, "expected a finite layer_weight >= 0, got -1.0. The default is 1."),
        ({"layer_weight": float("nan")}, "expected a finite layer_weight >= 0, got nan"),
        ({"layer_weight": float("inf")}, "expected a finite layer_weight >= 0, got inf"),
        ({"steps": 0}, "expected steps >= 1, got 0. Choose another value."),
        ({"recipe": "best"}, "expected --recipe paper or auto, got 'best'. Choose one of these."),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        ProxSparse(**settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_limit_that_no_step_keeps_is_told(device: str) -> None:
    notes = Notes()
    for limit in (None, 10**9, 1000):
        ProxSparse(steps=2).prune(task(device, progress=notes, memory=limit))
    said = [line for line in notes.lines if "--gpu-memory" in line]
    assert len(said) == 1
    assert said[0].endswith("GB, above --gpu-memory. See --plan.")
