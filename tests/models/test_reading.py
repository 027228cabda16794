"""Who reads a parameter gets the substitute in forward passes, whichever way; everybody else the parameter."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import MambaConfig, MambaForCausalLM

from proxsparse_triton.models.modes import evaluating
from proxsparse_triton.models.reading import read_as, unread


class Mixer(nn.Module):
    """Reads one weight by a call, one past its `forward`, one in a function that is checkpointed, and one not at all."""

    def __init__(self, shared: nn.Linear) -> None:
        super().__init__()
        self.called, self.multiplied, self.again, self.idle = (nn.Linear(4, 4, bias=False) for _ in range(4))
        self.same = nn.Linear(4, 4, bias=False)
        self.same.weight = shared.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.called(x) + x @ self.multiplied.weight.T
        x = checkpoint(lambda y: torch.tanh(F.linear(y, self.again.weight)), x, use_reentrant=False)
        return x + self.same(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4, bias=False)
        self.mixer = Mixer(self.first)
        self.trained = nn.Linear(4, 4, bias=False)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        x = self.mixer(self.first(torch.ones(*input_ids.shape, 4)))
        return self.trained(x) if self.training else x


TOKENS = torch.zeros(1, 3, dtype=torch.int64)


def doubled(model: Model) -> Any:
    return read_as(model, dict.fromkeys(model.parameters(), lambda p: 2 * p))


def test_every_reader_gets_the_substitute() -> None:
    """Calls, products with a weight, checkpointed functions and their second run, a parameter that two modules hold."""
    model, other = Model().train(), Model().train()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    other(TOKENS).sum().backward()
    with doubled(model):
        out = model(TOKENS)
        out.sum().backward()
        assert torch.equal(out, other(TOKENS))
    for name, p in model.named_parameters():
        expected = other.get_parameter(name).grad
        assert (p.grad is None) == (expected is None) == (name == "mixer.idle.weight")
        if expected is not None:
            torch.testing.assert_close(p.grad, 2 * expected)


def test_outside_of_a_forward_pass_it_is_the_parameter() -> None:
    model = Model()
    parameters = dict(model.named_parameters())
    with doubled(model):
        assert model.mixer.called.weight is parameters["mixer.called.weight"]
        assert dict(model.named_parameters()) == parameters
        assert model.state_dict().keys() == parameters.keys() | {"mixer.same.weight"}
        with torch.no_grad():
            model.mixer.called.weight *= 3  # an optimiser's way, or a user's
        assert model.mixer.called.weight is parameters["mixer.called.weight"]
        with pytest.raises(AttributeError):
            model(None)
        assert model.mixer.called.weight is parameters["mixer.called.weight"]  # also after a forward pass that failed


def test_a_forward_pass_that_fails_before_it_begins() -> None:
    """A hook that stops it must not make the next reader believe that it is inside of one, or outside."""
    model = Model()
    with doubled(model):
        handle = model.mixer.register_forward_pre_hook(lambda *_: 1 / 0, prepend=True)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                model(TOKENS)
            assert model.first.weight is model._parameters.get("weight", model.first._parameters["weight"])
        handle.remove()
        expected = 4 * F.linear(torch.ones(4), model.first._parameters["weight"])
        assert torch.allclose(2 * model.first(torch.ones(4)), expected)


def test_classes_and_hooks_are_given_back() -> None:
    model = Model()
    with pytest.raises(ZeroDivisionError), doubled(model):
        raise ZeroDivisionError
    assert all(type(module) in (Model, Mixer, nn.Linear) for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_nothing_is_held_afterwards() -> None:
    """What readers hold, pretrained weights among them, goes with the last reference, not with the next collection of garbage."""
    model, tensor = Model(), torch.zeros(4, 4)
    gone = weakref.ref(tensor)
    gc.collect()
    gc.disable()
    try:
        with read_as(model, dict.fromkeys(model.parameters(), lambda p, tensor=tensor: p + tensor)):
            model(TOKENS)
        del tensor
        assert gone() is None
    finally:
        gc.enable()


def test_a_reader_that_fails_is_heard() -> None:
    """nn.Module takes an AttributeError for a missing attribute, and would answer with the parameter."""
    model = Model()

    def broken(parameter: nn.Parameter) -> Tensor:
        raise AttributeError("no such thing")

    with read_as(model, {model.first.weight: broken}), pytest.raises(RuntimeError, match=r"Linear\.weight could not be read: no such"):
        model(TOKENS)


def test_what_nothing_reads() -> None:
    """A layer that only train mode uses counts as read."""
    model = Model().eval()
    parameters = dict(model.named_parameters())
    assert unread(model, parameters, [TOKENS[0]]) == ["mixer.idle.weight"]
    assert not any(module.training for module in model.modules())


def test_mamba_reads_a_weight_without_a_call() -> None:
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, state_size=4)).eval()
    parameters = {n: p for n, p in model.named_parameters() if n.endswith("dt_proj.weight")}
    assert len(parameters) == 2
    assert unread(model, parameters, [torch.arange(5)]) == []
    dense = model(input_ids=torch.arange(5)[None]).logits
    with torch.no_grad(), read_as(model, dict.fromkeys(parameters.values(), torch.zeros_like)):
        changed = model(input_ids=torch.arange(5)[None]).logits
    assert not torch.equal(changed, dense)


def test_modes_are_put_back_module_by_module() -> None:
    model = Model().train()
    model.mixer.called.eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [name for name, module in model.named_modules() if not module.training] == ["mixer.called"]
