from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from proxsparse_triton.errors import ModelError
from proxsparse_triton.models.finite import check_finite


def tiny(device: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    shape = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True)).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("model.layers.1.mlp.up_proj.weight", (3, 5)),
        ("model.embed_tokens.weight", (47, 0)),
        ("model.layers.0.input_layernorm.weight", (2,)),
        ("model.norm.weight", (15,)),
    ],
)
def test_every_weight_is_looked_at(name: str, at: tuple[int, ...], value: float, dtype: torch.dtype, device: str) -> None:
    model = tiny(device, dtype)
    check_finite("prune", model)
    model.get_parameter(name).data[at] = value
    expected = re.escape(f"prune: expected finite weights, got {value} in {name} at {list(at)} (1 of its ")
    with pytest.raises(ModelError, match=expected):
        check_finite("prune", model)


def test_buffers(device: str) -> None:
    """Those that are saved may hold inf, as masks do, and no NaN; what is made anew may hold anything."""
    model = tiny(device)
    model.register_buffer("bias", torch.tensor([0.0, -math.inf], device=device))
    model.register_buffer("scratch", torch.tensor([math.nan], device=device), persistent=False)
    model.register_buffer("empty", torch.empty(0, device=device))
    model.register_buffer("steps", torch.tensor([1], device=device))
    check_finite("prune", model)
    model.bias[0] = math.nan
    with pytest.raises(ModelError, match=r"got nan in bias at \[0\] \(1 of its 2"):
        check_finite("prune", model)


def test_largest_numbers_are_numbers() -> None:
    model = nn.Linear(4, 4)
    model.weight.data[0] = torch.finfo(torch.float32).max
    check_finite("prune", model)
    check_finite("prune", nn.ReLU())
