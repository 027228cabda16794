"""Random models of real shapes: sizes as published, buffers right, FLOP counted by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from proxsparse_triton.benchmarks.shapes import INIT_STD, MODELS, TINY, build, config_of, step_flops
from proxsparse_triton.errors import ConfigError

CPU = torch.device("cpu")
PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "llama-2-13b": 13_015_864_320,
    "qwen2.5-14b": 14_770_033_664,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes_as_published(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(name), dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_weights() -> None:
    model = build(config_of(TINY), CPU)
    assert model.training
    for name, p in model.named_parameters():
        assert p.dtype == torch.bfloat16, name
        assert p.requires_grad, name
        if p.dim() > 1:
            assert float(p.detach().float().std()) == pytest.approx(INIT_STD, rel=0.1), name
        else:
            assert (p == 1).all(), name


def test_biases_are_zero() -> None:
    config = config_of("qwen2.5-14b")
    config.update({"num_hidden_layers": 1, "hidden_size": 80, "intermediate_size": 16, "vocab_size": 32, "layer_types": ["full_attention"]})
    biases = [p for name, p in build(config, CPU).named_parameters() if name.endswith("bias")]
    assert len(biases) == 3
    assert all((p == 0).all() for p in biases)


@pytest.mark.parametrize("name", [TINY, "llama-3.1-8b"])
def test_rotary_frequencies_are_computed_again(name: str) -> None:
    """Llama 3.1 rescales them: a plain formula would be wrong."""
    config = config_of(name)
    config.update({"num_hidden_layers": 1, "intermediate_size": 16, "vocab_size": 32})
    expected = dict(AutoModelForCausalLM.from_config(config).named_buffers())
    found = dict(build(config, CPU).named_buffers())
    assert set(found) == set(expected) != set()
    for key, value in expected.items():
        assert found[key].dtype == torch.float32
        assert torch.equal(found[key], value)


def test_step_flops_by_hand() -> None:
    """Width 128, 2 layers, 4 heads of 32, 2 of them for keys and values, inner width 256, 512 words, 64 tokens."""
    config = config_of(TINY)
    layer = 128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 256
    weights = 2 * layer + 512 * 128  # the output head, not the embedding
    forward_attention = 2 * (2 * 2 * 64 * 64 * 32 * 4) // 2  # layers x (scores and values, 2 FLOP each) halved by causality
    assert step_flops(build(config, CPU), config, 64) == 3 * (2 * weights * 64 + forward_attention)


def test_unknown_model() -> None:
    with pytest.raises(ConfigError, match=r"bench learn: expected --model of llama-2-7b, .*, got 'gpt'. Choose one of these."):
        config_of("gpt")


def test_nothing_is_named_twice() -> None:
    assert set(MODELS) == {*PARAMETERS, TINY}
