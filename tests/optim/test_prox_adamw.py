"""`ProxAdamW` against AdamW and the chain of operations; figures, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from optim.small import INF, NAN, Model, backward, batch, build, same, train, weights
from torch import Tensor, nn

from proxsparse_triton import ProxAdamW, accumulate_frozen_penalty, prox_24
from proxsparse_triton.errors import ConfigError, ShapeError
from proxsparse_triton.sparsity import count_24_blocks

# --- against AdamW and the chain ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prox", [True, False])
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_without_strengths_it_is_adamw(prox: bool, max_norm: float | None) -> None:
    """Both kinds of groups."""
    mine, theirs = Model(), Model()
    optimizer = ProxAdamW([{"params": mine.pruned(), "prox": prox}, {"params": mine.rest(), "prox": False}], lr=0.01, max_norm=max_norm)
    adamw = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.0)
    for step in range(10):
        backward(mine, step)
        backward(theirs, step)
        if max_norm is not None:
            norm = nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
            assert norm > max_norm
        adamw.step()
        optimizer.step()
        if max_norm is not None:
            torch.testing.assert_close(optimizer.figures().norm.float(), norm, rtol=1e-5, atol=0)
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip", ["total", "loss"])
def test_it_is_the_chain(clip: str) -> None:
    """Penalty gradient, global clipping, AdamW, prox, one after the other, in fp64 where no rounding hides a difference."""
    mine, theirs = Model(torch.float64), Model(torch.float64)
    optimizer = build(mine, max_norm=0.3, clip=clip)
    adamw = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1)
    pretrained = {name: w.detach().clone() for name, w in theirs.pruned()}
    for step in range(10):
        backward(mine, step)
        backward(theirs, step)
        values = []
        norm = nn.utils.get_total_norm([p.grad for p in theirs.parameters()])
        if clip == "loss":
            nn.utils.clip_grad_norm_(theirs.parameters(), 0.3)
        for name, w in theirs.pruned():
            values.append(accumulate_frozen_penalty(w, pretrained[name], 0.05, 0.1, w.grad))
        if clip == "total":
            norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.3)
        assert norm > 0.3
        adamw.step()
        for _, w in theirs.pruned():
            prox_24(w.data, 0.5, out=w.data)
        optimizer.step()
        figures = optimizer.figures()
        torch.testing.assert_close(figures.norm, norm, rtol=1e-6, atol=0)
        torch.testing.assert_close(figures.penalty, torch.stack(values).sum(), rtol=1e-6, atol=1e-30)
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)  # plain groups take the coefficient in fp32
        counts = {name: count_24_blocks(w).item() / (w.numel() // 4) for name, w in theirs.pruned()}
        assert {name: share.item() for name, share in figures.shares.items()} == counts
    assert 0 < figures.share_24 < 1


def test_settings_belong_to_groups() -> None:
    """Each weight with its own strengths and scale is stepped as if it were alone."""
    model = Model()
    scale = torch.linspace(0.5, 2, 24)
    groups = [
        {"params": [model.middle.weight], "lambda1": 0.3, "lr": 0.02, "betas": (0.8, 0.9)},
        {"params": [model.leave.weight], "lambda1": 0.7, "column_scale": scale, "eps": 1e-3},
    ]
    alone = [copy.deepcopy(model), copy.deepcopy(model)]
    optimizers = [ProxAdamW(groups, lr=0.01)]
    for other, group in zip(alone, groups, strict=True):
        weight = other.middle.weight if group is groups[0] else other.leave.weight
        optimizers.append(ProxAdamW([{**{k: v for k, v in group.items() if k != "params"}, "params": [weight]}], lr=0.01))
    for other, optimizer in zip((model, *alone), optimizers, strict=True):
        backward(other, 0)
        optimizer.step()
    assert torch.equal(model.middle.weight, alone[0].middle.weight)
    assert torch.equal(model.leave.weight, alone[1].leave.weight)
    assert not torch.equal(model.leave.weight, Model().leave.weight)


def test_learning_rate_schedulers_and_closures() -> None:
    model = Model()
    optimizer = build(model, lambda1=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step)

    def closure() -> Tensor:
        model.zero_grad()
        loss = model(batch(0))
        loss.backward()
        return loss

    before = weights(model)
    assert optimizer.step(closure).requires_grad  # factor 0: no movement
    assert same(weights(model), before)
    schedule.step()
    optimizer.step(closure)
    assert not same(weights(model), before)


# --- housekeeping -------------------------------------------------------------------------------------------------------------------


def test_figures_need_a_step_and_leave_no_graph() -> None:
    model = Model()
    optimizer = build(model)
    with pytest.raises(ConfigError, match="expected at least one step, got none"):
        optimizer.figures()
    train(model, optimizer, range(1))
    figures = optimizer.figures()
    tensors = [figures.norm, figures.penalty, figures.share_24, *figures.shares.values()]
    assert all(x.shape == () and not x.requires_grad for x in tensors)
    assert all(dataclasses.is_dataclass(x) for x in (figures,))


def test_empty_weights() -> None:
    w = nn.Parameter(torch.zeros(0, 8))
    w.grad = torch.zeros(0, 8)
    optimizer = ProxAdamW([("empty", w)], lambda1=1.0, lambda2=1.0, max_norm=1.0)
    optimizer.step()
    assert optimizer.figures().share_24 == optimizer.figures().shares["empty"] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"max_norm": 1.0}, {"max_norm": 1.0, "clip": "loss"}])
def test_a_step_never_waits_for_the_card(options: dict[str, object]) -> None:
    """After the first step, which may look at W0."""
    model = Model(torch.bfloat16).to("cuda")
    optimizer = build(model, weight_bits=24, moments="int8", **options)
    for step in range(3):
        model.zero_grad()
        (50 * model(batch(step, torch.bfloat16).to("cuda"))).backward()
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            optimizer.step()
            optimizer.figures()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    optimizer.check()


# --- errors -------------------------------------------------------------------------------------------------------------------------

P = [("lm.weight", nn.Parameter(torch.zeros(4, 8)))]
LOW = [("lm.weight", nn.Parameter(torch.zeros(4, 8, dtype=torch.bfloat16)))]
HALF = [("lm.weight", nn.Parameter(torch.zeros(4, 8, dtype=torch.float16)))]
DOUBLE = [("lm.weight", nn.Parameter(torch.zeros(4, 8, dtype=torch.float64)))]
ODD = [("odd.weight", nn.Parameter(torch.zeros(4, 6)))]
ERRORS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: ProxAdamW(P, lr=-1), ConfigError, "expected a finite lr >= 0, got -1.0"),
    (lambda: ProxAdamW(P, eps=NAN), ConfigError, "expected a finite eps >= 0, got nan"),
    (lambda: ProxAdamW(P, weight_decay=-1), ConfigError, "expected a finite weight_decay >= 0"),
    (lambda: ProxAdamW(P, lambda1=-1), ConfigError, "expected a finite lambda1 >= 0"),
    (lambda: ProxAdamW(P, lambda2=INF), ConfigError, "expected a finite lambda2 >= 0"),
    (lambda: ProxAdamW(P, frozen_eps=0), ConfigError, "expected a finite frozen_eps > 0"),
    (lambda: ProxAdamW(P, betas=(0.9, 1.0)), ConfigError, "expected two betas in [0, 1), got (0.9, 1.0)"),
    (lambda: ProxAdamW(P, max_norm=0), ConfigError, "expected a finite max_norm > 0, got 0"),
    (lambda: ProxAdamW(P, clip="none"), ConfigError, "expected clip 'total' or 'loss', got 'none'"),
    (lambda: ProxAdamW(P, weight_bits=8), ConfigError, "expected weight_bits 16, 24, 32 or None, got 8"),
    (lambda: ProxAdamW(P, moments="fp8"), ConfigError, "expected moments float32, bfloat16, int8 or None, got 'fp8'"),
    (lambda: ProxAdamW(P, weight_bits=24), ConfigError, "expected bfloat16 weights for weight_bits=24, got torch.float32 in lm.weight"),
    (lambda: ProxAdamW(DOUBLE, moments="int8"), ConfigError, "expected moments='float32' for float64 weights, got 'int8' for lm.weight"),
    (lambda: ProxAdamW(HALF), TypeError, "expected float32 or bfloat16 weights, got torch.float16 in lm.weight"),
    (lambda: ProxAdamW(ODD), ShapeError, "expected the last dimension divisible by 4, got shape (4, 6) in odd.weight"),
    (lambda: ProxAdamW([ODD[0][1]]), ShapeError, "got shape (4, 6) in parameter 0 of group 0. Put it in a group with prox=False."),
    (lambda: ProxAdamW([nn.Parameter(torch.zeros(()))]), ShapeError, "got shape () in parameter 0 of group 0"),
    (
        lambda: ProxAdamW([*P, ("norm.weight", nn.Parameter(torch.zeros(8)))]),
        ShapeError,
        "expected weights [..., in_features] for the prox, got shape (8,) in norm.weight. Put it in a group with prox=False; prunable_",
    ),
    (
        lambda: ProxAdamW([{"params": [("wave", nn.Parameter(torch.zeros(4, dtype=torch.complex64)))], "prox": False}]),
        TypeError,
        "expected real floating parameters, got torch.complex64 in wave.",
    ),
    (
        lambda: ProxAdamW([{"params": P, "column_scale": torch.ones(4)}]),
        ShapeError,
        "expected column_scale of shape (8,) for lm.weight, got (4,). Give each weight a group of its own.",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), ERRORS, ids=[message[:50] for _, _, message in ERRORS])
def test_errors(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value).startswith("ProxAdamW: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_the_prox_cannot_take_may_be_plain() -> None:
    ProxAdamW([{"params": ODD, "prox": False}, {"params": HALF, "prox": False}, {"params": LOW}], weight_bits=24)


def test_a_refused_group_is_not_added() -> None:
    optimizer = ProxAdamW(P)
    with pytest.raises(ShapeError, match=r"odd\.weight"):
        optimizer.add_param_group({"params": ODD})
    assert len(optimizer.param_groups) == 1


def test_step_refuses_before_it_changes_anything() -> None:
    """Sparse gradients and several devices, by name."""
    first, embedding = nn.Parameter(torch.ones(4, 8)), nn.Embedding(4, 8, sparse=True)
    optimizer = ProxAdamW([("first", first), ("embedding", embedding.weight)], lambda1=1.0)
    first.grad = torch.ones(4, 8)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"^ProxAdamW: expected a dense gradient of embedding, got torch\.sparse_coo\. "):
        optimizer.step()
    assert (first == 1).all()
    elsewhere = nn.Parameter(torch.ones(4, 8, device="meta"))
    elsewhere.grad = torch.ones(4, 8, device="meta")
    optimizer = ProxAdamW([("first", first), ("elsewhere", elsewhere)], lambda1=1.0)
    with pytest.raises(
        ConfigError, match=r"^ProxAdamW: expected all parameters on cpu, got elsewhere on meta\. Use one optimizer a device\."
    ):
        optimizer.step()
    assert (first == 1).all()


def test_settings_out_of_range_are_found_before_the_first_write() -> None:
    """In whichever group, prox or plain, changed after the optimizer was built."""
    changes: list[tuple[dict[str, object], type[Exception], str]] = [
        ({"lr": -1.0}, ConfigError, "expected a finite lr >= 0, got -1.0"),
        ({"betas": (0.9, 1.0)}, ConfigError, "expected two betas in [0, 1), got (0.9, 1.0)"),
        ({"betas": (0.9,)}, ConfigError, "expected two betas in [0, 1), got (0.9,)"),
        ({"eps": NAN}, ConfigError, "expected a finite eps >= 0, got nan"),
        ({"weight_decay": None}, ConfigError, "expected a finite weight_decay >= 0, got None"),
        ({"lambda1": -1.0}, ConfigError, "expected a finite lambda1 >= 0, got -1.0"),
        ({"column_scale": torch.ones(4)}, ShapeError, "expected column_scale of shape (24,) for leave.weight, got (4,)"),
        ({"column_scale": [1.0] * 24}, TypeError, "expected a floating tensor as column_scale for leave.weight, got list"),
        ({"column_scale": torch.ones(24, device="meta")}, ConfigError, "expected column_scale of leave.weight on cpu, got meta"),
    ]
    for number in (1, 2):
        for change, error, message in changes[: 5 if number == 2 else None]:
            model = Model()
            groups = [{"params": [pair]} for pair in model.pruned()] + [{"params": model.rest(), "prox": False}]
            optimizer = ProxAdamW(groups, lr=0.01, lambda1=0.5, max_norm=1.0)
            optimizer.param_groups[number].update(change)
            backward(model, 0)
            before = weights(model)
            with pytest.raises(error) as caught:
                optimizer.step()
            assert str(caught.value).startswith(f"ProxAdamW: {message}")
            assert same(weights(model), before)
            assert all(float(state["step"]) == 0 for state in optimizer.state.values())


def test_prox_cannot_change_under_way() -> None:
    """The two kinds of groups keep other states."""
    for number in (0, 1):
        model = Model()
        optimizer = build(model)
        train(model, optimizer, range(1))
        optimizer.param_groups[number]["prox"] = number == 1
        backward(model, 1)
        before = weights(model)
        with pytest.raises(
            ConfigError, match=rf"^ProxAdamW: expected prox={number == 0} of .* as in its first step, got prox={number == 1}"
        ):
            optimizer.step()
        assert same(weights(model), before)


def test_keys_that_no_step_looks_at_are_refused() -> None:
    for key in ("amsgrad", "maximize", "max_norm", "lamda1"):
        with pytest.raises(ConfigError, match=rf"^ProxAdamW: expected settings of a group \(lr, .*\), got '{key}'\. Leave it out, or give"):
            ProxAdamW([{"params": P, key: True}])
    optimizer = ProxAdamW([{"params": P, "name": "decoder", "initial_lr": 0.1}])
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=3)
    ProxAdamW([{key: value for key, value in group.items() if key != "params"} | {"params": P} for group in optimizer.param_groups])
