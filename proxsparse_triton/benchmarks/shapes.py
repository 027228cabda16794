"""Models of real shapes with random weights: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import ConfigError

INIT_STD = 0.02
TINY = "tiny"  # for machines without a GPU, and smoke tests

_LLAMA_2: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
_LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _decoder(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": False,
    }


# As in the config.json of the published models.
MODELS: dict[str, dict[str, Any]] = {
    "llama-2-7b": {**_LLAMA_2, **_decoder(4096, 11008, 32, 32, 32)},
    "llama-3.1-8b": {
        **_LLAMA_2,
        **_decoder(4096, 14336, 32, 32, 8),
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_parameters": _LLAMA_3_ROPE,
    },
    "llama-2-13b": {**_LLAMA_2, **_decoder(5120, 13824, 40, 40, 40)},
    "qwen2.5-14b": {
        "model_type": "qwen2",
        **_decoder(5120, 13824, 48, 40, 8),
        "vocab_size": 152064,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    TINY: {**_LLAMA_2, **_decoder(128, 256, 2, 4, 2), "vocab_size": 512, "max_position_embeddings": 512},
}


def config_of(name: str) -> Any:
    """The transformers configuration. ConfigError for an unknown name."""
    if name not in MODELS:
        raise ConfigError(f"bench learn: expected --model of {', '.join(MODELS)}, got {name!r}. Choose one of these.")
    from transformers import AutoConfig

    return AutoConfig.for_model(**MODELS[name], use_cache=False)


def build(config: Any, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The model on `device` in training mode: matrices normal with std INIT_STD, norms 1, biases 0. No second copy exists at any time."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.to_empty(device=device)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(0, INIT_STD)
            else:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
    # Buffers that no checkpoint holds (rotary frequencies) are computed when their module is built; to_empty has left them undefined.
    for name, module in list(model.named_modules()):
        if module._non_persistent_buffers_set:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, type(module)(config).to(device))
    return model.train()


def step_flops(model: nn.Module, config: Any, tokens: int) -> int:
    """Model FLOP of one step on one window: 6 N T + 6 L T^2 heads head_dim.

    N: weights of matrix products, the output head among them and the input embedding, a look-up, not; 2 N T forward, twice that backward.
    Attention: scores and values take 2 T^2 per head and channel each, half of it above the causal diagonal; three times that with the
    backward pass. What activation checkpointing computes again does not count.
    """
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1 and p is not embedding)
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    return int(6 * weights * tokens + 6 * config.num_hidden_layers * tokens**2 * width)
