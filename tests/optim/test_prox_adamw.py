"""`ProxAdamW` against AdamW and the chain of operations; precision, clipping, W0, gradient release, broken gradients, errors."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from proxsparse_triton import ProxAdamW, accumulate_frozen_penalty, frozen_penalty, prox_24
from proxsparse_triton.errors import ConfigError, LearningError, ShapeError
from proxsparse_triton.reference.storage import join_residual
from proxsparse_triton.sparsity import count_24_blocks, count_negative_zeros

NAN, INF = float("nan"), float("inf")


class Model(nn.Module):
    """Two weights to prune, a bias, and an embedding-like weight whose width is not a multiple of 4."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(6, 16, dtype=dtype)
        self.middle = nn.Linear(16, 24, bias=False, dtype=dtype)
        self.leave = nn.Linear(24, 8, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.tanh(self.middle(torch.tanh(self.enter(x))))).float().square().mean()

    def pruned(self) -> list[tuple[str, Tensor]]:
        return [("middle.weight", self.middle.weight), ("leave.weight", self.leave.weight)]

    def rest(self) -> list[tuple[str, Tensor]]:
        return [("enter.weight", self.enter.weight), ("enter.bias", self.enter.bias)]


def build(model: Model, **options: object) -> ProxAdamW:
    settings = {"lr": 0.01, "weight_decay": 0.1, "lambda1": 0.5, "lambda2": 0.05, **options}
    return ProxAdamW([{"params": model.pruned()}, {"params": model.rest(), "prox": False}], **settings)


def batch(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(step)).to(dtype)


def backward(model: Model, step: int) -> None:
    model.zero_grad()
    (50 * model(batch(step, model.middle.weight.dtype))).backward()


def train(model: Model, optimizer: torch.optim.Optimizer, steps: range = range(10)) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


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


def test_missing_gradients_are_skipped() -> None:
    model = Model()
    optimizer = build(model)
    before = weights(model)
    optimizer.step()
    assert not optimizer.state
    assert same(weights(model), before)
    backward(model, 0)
    model.leave.weight.grad = model.enter.bias.grad = None
    optimizer.step()
    assert torch.equal(model.leave.weight, before[-1])
    assert not torch.equal(model.middle.weight, before[-2])
    assert list(optimizer.figures().shares) == ["middle.weight"]
    frozen = Model()
    frozen.requires_grad_(False)
    build(frozen).step()


# --- precision ----------------------------------------------------------------------------------------------------------------------


def test_bf16_with_32_bits_is_fp32() -> None:
    """With the same gradients, after many steps, bit for bit."""
    low, full = Model(torch.bfloat16), Model()
    full.load_state_dict(low.state_dict())
    mine, theirs = build(low, weight_bits=32), build(full)
    for step in range(30):
        backward(low, step)
        for p, q in zip(low.parameters(), full.parameters(), strict=True):
            q.grad = p.grad.float()
        mine.step()
        theirs.step()
    for (_, p), (_, q) in zip(low.pruned(), full.pruned(), strict=True):
        assert torch.equal(join_residual(p.detach(), mine.state[p]["residual"]), q)
        assert mine.pretrained(p).dtype == theirs.pretrained(q).dtype == torch.bfloat16
        assert torch.equal(mine.pretrained(p), theirs.pretrained(q))


@pytest.mark.parametrize("moments", [None, "float32", "bfloat16", "int8"])
@pytest.mark.parametrize("bits", [None, 16, 24, 32])
def test_state_of_each_precision(bits: int | None, moments: str | None) -> None:
    model = Model(torch.bfloat16)
    optimizer = build(model, weight_bits=bits, moments=moments)
    train(model, optimizer, range(2))
    for _, p in model.pruned():
        state = optimizer.state[p]
        dtypes = {key: x.dtype for key, x in state.items() if isinstance(x, Tensor)}
        expected = {
            "int8": {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8, "exp_avg_scale": torch.float32, "exp_avg_sq_scale": torch.float32},
            "bfloat16": {"exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16},
        }.get(moments, {"exp_avg": torch.float32, "exp_avg_sq": torch.float32})
        residual = {24: {"residual": torch.int8}, 32: {"residual": torch.int16}}.get(bits, {})
        assert dtypes == {"pretrained": torch.bfloat16, **expected, **residual}
        assert state["step"] == 2
        assert count_negative_zeros(p.detach()) == 0
    assert set(optimizer.state[model.enter.bias]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moments", ["float32", "bfloat16", "int8"])
def test_every_precision_learns(dtype: torch.dtype, moments: str) -> None:
    """The loss of a tiny problem falls about as it does in fp32."""
    losses = []
    for kind, options in ((torch.float32, {}), (dtype, {"moments": moments})):
        model = Model(kind)
        optimizer = build(model, lambda1=0.0, lambda2=0.0, weight_decay=0.0, **options)
        start = model(batch(0, kind)).item()
        for _ in range(60):
            backward(model, 0)
            optimizer.step()
        losses.append(model(batch(0, kind)).item() / start)
    assert losses[0] < 0.02
    assert losses[1] < 0.05


def test_same_seed_same_result() -> None:
    results = []
    for seed in (1, 1, 2):
        model = Model(torch.bfloat16)
        train(model, build(model, moments="int8", seed=seed), range(4))
        results.append(weights(model))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


# --- pretrained weights -------------------------------------------------------------------------------------------------------------


def test_pretrained_is_what_the_first_step_saw() -> None:
    model = Model()
    model.middle.weight.data = model.middle.weight.data.bfloat16().float()
    optimizer = build(model)
    model.leave.weight.data.mul_(2)  # after the optimizer was built
    before = {name: w.detach().clone() for name, w in model.pruned()}
    assert optimizer.pretrained(model.middle.weight) is None
    train(model, optimizer, range(3))
    for name, w in model.pruned():
        w0 = optimizer.pretrained(w)
        assert w0.dtype == (torch.bfloat16 if name == "middle.weight" else torch.float32)  # bf16 where that loses nothing
        assert torch.equal(w0.float(), before[name])
    assert optimizer.pretrained(model.enter.weight) is None
    expected = sum(frozen_penalty(w, before[name], 0.05, 0.1).item() for name, w in model.pruned())
    backward(model, 3)
    optimizer.step()
    assert optimizer.figures().penalty.item() == pytest.approx(expected, rel=1e-5)


def test_pretrained_is_kept_once() -> None:
    model = Model()
    optimizer = build(model)
    shared = {w: torch.randn(w.shape) for _, w in model.pruned()}
    optimizer.share_pretrained(shared)
    train(model, optimizer, range(2))
    assert all(optimizer.pretrained(w).data_ptr() == w0.data_ptr() for w, w0 in shared.items())
    without = Model()
    free = build(without, lambda2=0.0)
    train(without, free, range(2))
    assert all(free.pretrained(w) is None for _, w in without.pruned())
    free.param_groups[0]["lambda2"] = 0.1
    backward(without, 2)
    before = weights(without)
    with pytest.raises(
        ConfigError, match=r"expected lambda2 > 0 from the first step of middle\.weight, got it at step 3.*share_pretrained"
    ):
        free.step()
    assert same(weights(without), before)
    free.share_pretrained({w: w.detach().clone() for _, w in without.pruned()})
    free.step()


def test_share_pretrained_refuses() -> None:
    model = Model()
    optimizer = build(model)
    with pytest.raises(ShapeError, match=r"^share_pretrained: expected W0 of shape \(24, 16\) for middle\.weight, got \(16, 24\)\."):
        optimizer.share_pretrained({model.middle.weight: torch.zeros(16, 24)})
    with pytest.raises(ConfigError, match="expected parameters of groups with prox"):
        optimizer.share_pretrained({model.enter.weight: torch.zeros(16, 6)})
    with pytest.raises(ConfigError, match=r"expected W0 of middle\.weight on cpu"):
        optimizer.share_pretrained({model.middle.weight: torch.zeros(24, 16, device="meta")})


# --- gradient release ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_released_gradients_make_the_same_steps(dtype: torch.dtype) -> None:
    one, other = Model(dtype), Model(dtype)
    mine, theirs = build(one), build(other)
    handle = mine.release_gradients()
    for step in range(4):
        backward(one, step)
        assert all(p.grad is None for p in one.parameters())
        mine.step()
        backward(other, step)
        theirs.step()
    assert same(weights(one), weights(other))
    for name in ("norm", "penalty", "share_24"):
        torch.testing.assert_close(getattr(mine.figures(), name), getattr(theirs.figures(), name), rtol=1e-10, atol=0)
    handle.remove()
    backward(one, 4)
    assert one.middle.weight.grad is not None


def test_released_gradients_after_loading() -> None:
    """The hooks see the groups that a state dict has brought."""
    model = Model()
    optimizer = build(model)
    optimizer.release_gradients()
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["lr"] = state["param_groups"][1]["lr"] = state["param_groups"][0]["lambda1"] = 0.0
    optimizer.load_state_dict(state)
    before = weights(model)
    backward(model, 0)
    assert same(weights(model), before)


def test_release_refuses_clipping() -> None:
    with pytest.raises(ConfigError, match=r"^release_gradients: expected no max_norm, got one: the norm needs all gradients at once\."):
        build(Model(), max_norm=1.0).release_gradients()


# --- gradients that are not finite --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"max_norm": 1.0, "clip": "loss", "moments": "int8"}])
@pytest.mark.parametrize("where", ["leave.weight", "enter.bias"])
def test_a_clipped_step_with_a_broken_gradient_changes_nothing(value: float, options: dict[str, object], where: str) -> None:
    """Neither weights nor state, step counts included; the next steps are those of a run that never saw it."""
    model, healthy = Model(), Model()
    optimizer, other = build(model, **options), build(healthy, **options)
    train(model, optimizer, range(2))
    before = copy.deepcopy(optimizer.state_dict()["state"]), weights(model)
    backward(model, 2)
    dict(model.named_parameters())[where].grad.view(-1)[3] = value
    optimizer.step()
    backward(model, 3)
    with pytest.raises(LearningError, match=rf"expected finite gradients, got inf or nan in {where};"):
        optimizer.step()
    assert same(weights(model), before[1])
    for index, state in optimizer.state_dict()["state"].items():
        for key, x in state.items():
            assert torch.equal(torch.as_tensor(x), torch.as_tensor(before[0][index][key])), key
    optimizer.step()  # once is enough: the gradients in hand are fine
    optimizer.check()
    train(healthy, other, range(2))
    backward(healthy, 3)
    other.step()
    assert same(weights(model), weights(healthy))


def test_an_unclipped_step_leaves_broken_blocks_alone() -> None:
    model = Model()
    optimizer = build(model)
    train(model, optimizer, range(2))
    before = weights(model)
    backward(model, 2)
    model.middle.weight.grad[0, 0] = model.leave.weight.grad[0, 0] = model.enter.bias.grad[0] = NAN
    optimizer.step()
    with pytest.raises(LearningError, match=r"got inf or nan in middle\.weight and 2 more; .*Lower lr or lambda2"):
        optimizer.check()
    optimizer.check()
    after = weights(model)
    assert torch.equal(after[0], before[0])  # plain parameters go together
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[2][0, :4], before[2][0, :4])
    assert not torch.equal(after[2][0, 4:], before[2][0, 4:])
    assert all(x.isfinite().all() for x in after)
    assert all(torch.as_tensor(x).isfinite().all() for state in optimizer.state.values() for x in state.values())


def test_a_norm_that_overflows_is_reported() -> None:
    model = Model()
    optimizer = build(model, max_norm=1.0, lambda2=0.0)
    backward(model, 0)
    before = weights(model)
    model.enter.weight.grad.fill_(3e38)
    optimizer.step()
    with pytest.raises(LearningError, match="got inf or nan in "):
        optimizer.check()
    assert same(weights(model), before)


# --- housekeeping -------------------------------------------------------------------------------------------------------------------


def test_copies_and_pickles() -> None:
    model = Model(torch.bfloat16)
    optimizer = build(model, max_norm=1.0, weight_bits=24)
    train(model, optimizer, range(2))
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    third, third_optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    for m, o in ((model, optimizer), (twin, twin_optimizer), (third, third_optimizer)):
        train(m, o, range(2, 4))
    assert same(weights(model), weights(twin))
    assert same(weights(model), weights(third))


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
