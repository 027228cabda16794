"""The test that restores one layer at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from proxsparse_triton.evaluation import restore
from proxsparse_triton.evaluation.perplexity import perplexity
from proxsparse_triton.evaluation.restore import restore_test

HARMED = "model.layers.1.mlp.down_proj.weight"


def tiny() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=28, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3
    )
    return LlamaForCausalLM(config).eval()


def case() -> tuple[nn.Module, nn.Module, dict[str, Tensor], list[Tensor]]:
    """A model, its twin with one layer that does harm and one that does not differ, and the dense weights of both layers."""
    dense, pruned = tiny(), tiny()
    same = "model.layers.0.self_attn.q_proj.weight"
    with torch.no_grad():
        pruned.get_parameter(HARMED).mul_(-5)
    original = {name: dense.get_parameter(name).detach().clone() for name in (same, HARMED)}
    return dense, pruned, original, list(torch.randint(48, (2, 12), generator=torch.Generator().manual_seed(1)))


def test_each_layer_alone_costliest_first() -> None:
    dense, pruned, original, tokens = case()
    before = {name: p.detach().clone() for name, p in pruned.named_parameters()}
    addresses = {name: p.data_ptr() for name, p in pruned.named_parameters()}
    found = restore_test(pruned, original, tokens)
    expected = sorted([perplexity(dense, tokens), perplexity(pruned, tokens)])
    assert [row["perplexity"] for row in found] == pytest.approx(expected)
    assert (found[0]["layer"] == HARMED) == (perplexity(dense, tokens) < perplexity(pruned, tokens))
    assert expected[1] > 1.01 * expected[0]
    assert all(torch.equal(p, before[name]) for name, p in pruned.named_parameters())
    assert addresses == {name: p.data_ptr() for name, p in pruned.named_parameters()}


def test_the_model_is_whole_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    _, pruned, original, tokens = case()
    before = pruned.get_parameter(HARMED).detach().clone()

    def fail(*args: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(restore, "perplexity", fail)
    with pytest.raises(KeyboardInterrupt):
        restore_test(pruned, {HARMED: original[HARMED]}, tokens)
    assert torch.equal(pruned.get_parameter(HARMED), before)
