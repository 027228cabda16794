"""Gradients that `ProxAdamW` misses, releases, or finds broken."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from optim.small import INF, NAN, Model, backward, build, same, train, weights

from proxsparse_triton import ProxAdamW
from proxsparse_triton.errors import ConfigError, LearningError

# --- missing gradients --------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("copied", [lambda o: o.state_dict()["state"], lambda o: copy.deepcopy(o).state_dict()["state"]])
def test_a_state_dict_counts_no_step_that_was_none(copied: Callable[[ProxAdamW], dict[int, dict[str, object]]]) -> None:
    """Saved right after it, before anyone has asked how it went; the error comes all the same."""
    model = Model()
    optimizer = build(model, max_norm=1.0)
    train(model, optimizer, range(2))
    backward(model, 2)
    model.leave.weight.grad[0, 0] = INF
    optimizer.step()
    assert {float(state["step"]) for state in copied(optimizer).values()} == {2.0}
    with pytest.raises(LearningError, match=r"leave\.weight"):
        optimizer.check()
    assert {float(state["step"]) for state in copied(optimizer).values()} == {2.0}


def test_gradients_after_a_clipped_step() -> None:
    """As the docstring of step says: those of prox parameters as they were, those of plain ones clipped."""
    model = Model()
    optimizer = build(model, max_norm=1e-3)
    backward(model, 0)
    before = [p.grad.clone() for p in (model.leave.weight, model.enter.weight)]
    optimizer.step()
    assert torch.equal(model.leave.weight.grad, before[0])
    torch.testing.assert_close(model.enter.weight.grad, before[1] * (1e-3 / optimizer.figures().norm).float(), rtol=1e-3, atol=0)


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
