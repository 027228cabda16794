"""torch.distributed.checkpoint makes the state of a fresh optimizer by a step: no weight may move, and nothing else may be taken for it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from optim.small import Model, build, same, train, weights
from torch import nn
from torch.distributed.checkpoint import state_dict as checkpoint

from proxsparse_triton import ProxAdamW, attach_prox, prox_24
from proxsparse_triton.optim.attach import PRETRAINED

KINDS = ["ProxAdamW", "SGD", "momentum", "AdamW", "AdamW with a tensor rate", "Adafactor"]


def optimizer_of(kind: str, model: Model, lambda2: float = 0.05) -> torch.optim.Optimizer:
    if kind == "ProxAdamW":
        return build(model, lambda2=lambda2)
    optimizer: torch.optim.Optimizer = {
        "SGD": lambda p: torch.optim.SGD(p, lr=0.01),
        "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
        "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
        "AdamW with a tensor rate": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
        "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    }[kind](model.parameters())
    # Two handles: what the first leaves in the state must not hide from the second that it is fresh.
    for _, w in model.pruned():
        attach_prox(optimizer, [w], 0.5, lambda2=lambda2)
    return optimizer


@pytest.mark.parametrize("lambda2", [0.0, 0.05])
@pytest.mark.parametrize("kind", KINDS)
def test_reading_the_state_of_a_fresh_optimizer_moves_nothing(kind: str, lambda2: float) -> None:
    model = Model()
    optimizer = optimizer_of(kind, model, lambda2)
    before = weights(model)
    for _ in range(2):
        checkpoint.get_optimizer_state_dict(model, optimizer)
        assert same(weights(model), before)
    train(model, optimizer, range(1))
    assert not same(weights(model), before)


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumed_through_it_goes_on(kind: str, flatten: bool) -> None:
    """The model first, then the optimizer, into fresh ones; W0 of the penalty comes along."""
    # Without momentum SGD keeps nothing itself: only weights with the penalty have a state, which torch takes for incomplete.
    options = checkpoint.StateDictOptions(flatten_optimizer_state_dict=flatten, strict=kind != "SGD")
    model, fresh = Model(), Model()
    optimizer = optimizer_of(kind, model)
    train(model, optimizer, range(3))
    saved = copy.deepcopy(checkpoint.get_state_dict(model, optimizer, options=options))
    for p in fresh.parameters():
        p.data.add_(1)
    resumed = optimizer_of(kind, fresh)
    checkpoint.set_model_state_dict(fresh, saved[0])
    checkpoint.set_optimizer_state_dict(fresh, resumed, saved[1], options=options)
    assert same(weights(fresh), list(saved[0].values()))
    train(model, optimizer, range(3, 6))
    train(fresh, resumed, range(3, 6))
    assert same(weights(fresh), weights(model))


def test_a_first_step_at_rate_zero_takes_the_prox() -> None:
    """A warm-up starts so, and lambda1 is not multiplied by the rate; with gradients, and without."""
    for gradient in (1.0, 0.0):
        for make in (lambda p: ProxAdamW([p], lr=0.0, lambda1=0.3), attached):
            p = nn.Parameter(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)))
            expected = prox_24(p.detach(), 0.3)
            optimizer = make(p)
            p.grad = torch.full_like(p, gradient)
            optimizer.step()
            torch.testing.assert_close(p.detach(), expected)
            assert (p == 0).any()


def attached(p: nn.Parameter) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD([p], lr=0.0)
    attach_prox(optimizer, [p], 0.3)
    return optimizer


@pytest.mark.parametrize("change", [{"lr": 0.1}, {"grad": 1.0}, {"state": True}], ids=str)
def test_what_else_is_called_so_is_a_step(change: dict[str, Any]) -> None:
    """accelerate passes closure=None at every step: a rate, a gradient or a state make a step of it."""
    for make in (lambda p: ProxAdamW([p], lr=0.1, lambda1=0.3), attached):
        p = nn.Parameter(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)))
        optimizer = make(p)
        if change.get("state"):
            p.grad = torch.ones_like(p)
            optimizer.step()
            optimizer.state[p].setdefault("step", 1)
        optimizer.param_groups[0]["lr"] = change.get("lr", 0.0)
        p.grad = torch.full_like(p, change.get("grad", 0.0))
        before = p.detach().clone()
        optimizer.step(closure=None)
        assert not torch.equal(p, before)


# --- W0 in the state of any optimizer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("attach_first", [True, False])
def test_state_dicts_carry_w0(tmp_path: Any, kind: str, attach_first: bool) -> None:
    """Through a file, into a fresh optimizer, in either order."""
    model, fresh = Model(), Model()
    optimizer = optimizer_of(kind, model)
    before = {name: w.detach().clone() for name, w in model.pruned()}
    train(model, optimizer, range(3))
    for name, w in model.pruned():
        assert torch.equal(optimizer.state[w][PRETRAINED], before[name])
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    fresh.load_state_dict(saved[0])
    if attach_first:
        resumed = optimizer_of(kind, fresh)
        resumed.load_state_dict(saved[1])
    else:
        plain = type(optimizer)(fresh.parameters(), lr=0.1)
        plain.load_state_dict(saved[1])
        for _, w in fresh.pruned():
            attach_prox(plain, [w], 0.5, lambda2=0.05)
        resumed = plain
    train(model, optimizer, range(3, 6))
    train(fresh, resumed, range(3, 6))
    assert same(weights(fresh), weights(model))


def test_a_state_without_w0_is_refused() -> None:
    """It would go on with the half-learned weight."""
    from proxsparse_triton.errors import ConfigError

    model, fresh = Model(), Model()
    plain = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, plain, range(2))
    state = plain.state_dict()
    optimizer = torch.optim.AdamW(fresh.parameters(), lr=0.01)
    handle = attach_prox(optimizer, fresh.pruned(), 0.5, lambda2=0.05)
    with pytest.raises(ConfigError, match=r"^attach_prox: expected the pretrained value of middle\.weight .*, got none\. Attach after"):
        optimizer.load_state_dict(state)
    assert not optimizer.state
    handle.remove()
    optimizer.load_state_dict(state)
    attach_prox(optimizer, fresh.pruned(), 0.5, lambda2=0.05)
    optimizer.load_state_dict(optimizer.state_dict())  # as accelerate.prepare does
    train(fresh, optimizer, range(1))
