"""What `ProxAdamW` keeps between steps: every precision, pretrained weights, copies and pickles."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from optim.small import Model, backward, batch, build, same, train, weights
from torch import Tensor

from proxsparse_triton import frozen_penalty
from proxsparse_triton.errors import ConfigError, ShapeError
from proxsparse_triton.reference.storage import join_residual
from proxsparse_triton.sparsity import count_negative_zeros

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


# --- copies ----------------------------------------------------------------------------------------------------------------------------


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
