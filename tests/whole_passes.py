"""What layer-by-layer methods must see, by definition: inputs of layers in passes of the whole model. And models that make it hard."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import transformers
from torch import Tensor, nn

from proxsparse_triton.models.selection import LayerPlan

VOCABULARY = 96
SIZE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**SIZE, "num_key_value_heads": 2}
SINGLE = {**SIZE, "num_key_value_heads": 4}
GEMMA = {
    **GROUPED, "head_dim": 8, "sliding_window": 4, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
GEMMA_3N = {**GEMMA, "laurel_rank": 4, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]}
MIXTURE = {"moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 8}

# Whose blocks are given what depends on the text beside the hidden states, or weights that another block has.
FAMILIES: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "gemma3n": lambda: transformers.Gemma3nTextConfig(**GEMMA_3N, num_kv_shared_layers=0),
    "gemma3n, shared keys": lambda: transformers.Gemma3nTextConfig(**GEMMA_3N, num_kv_shared_layers=2),
    "gemma4": lambda: transformers.Gemma4TextConfig(**GEMMA),
    "gemma4, shared keys": lambda: transformers.Gemma4TextConfig(**GEMMA, num_kv_shared_layers=2),
    "zamba": lambda: transformers.ZambaConfig(**SINGLE, layers_block_type=["linear_attention", "hybrid"] * 2, mamba_d_state=8),
    "zamba2": lambda: transformers.Zamba2Config(
        **SINGLE, layers_block_type=["linear_attention", "hybrid"] * 2, mamba_d_state=8, n_mamba_heads=4, chunk_size=16
    ),
    "glm_moe_dsa": lambda: transformers.GlmMoeDsaConfig(
        **SINGLE, **MIXTURE, **LATENT, index_topk=5, index_head_dim=16, index_n_heads=2, indexer_types=["full", "shared"] * 2
    ),
}


def build(family: str, device: str = "cpu") -> nn.Module:
    """A tiny model of the family with larger weights than a fresh one's, and none that is zero: what attends to what must show."""
    torch.manual_seed(0)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]()).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.to(device)


def windows(*lengths: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randint(1, VOCABULARY, (length,), generator=generator) for length in lengths)


def inputs_of_block(model: nn.Module, plan: LayerPlan, index: int, texts: Sequence[Tensor]) -> dict[str, Tensor]:
    """Parameter name -> what the selected layers of a block are given inside it, fp64 [tokens of all windows, in_features].

    A layer that several blocks share has another use for each: only that in this block counts. Empty where a layer is not called.
    """
    block = model.get_submodule(f"{plan.blocks}.{index}")
    names = [name for name in plan.selected() if name.startswith(f"{plan.blocks}.{index}.")]
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    inside: list[bool] = []

    def watch(name: str):  # type: ignore[no-untyped-def]
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if inside:
                seen[name].append(args[0].detach().double().flatten(0, -2))

        return add

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    handles.append(block.register_forward_pre_hook(lambda *_: inside.append(True)))
    handles.append(block.register_forward_hook(lambda *_: inside.clear()))
    with torch.no_grad():
        for text in texts:
            model(input_ids=text[None].to(next(model.parameters()).device), use_cache=False)
    for handle in handles:
        handle.remove()
    empty = {name: torch.empty(0, model.get_submodule(name).in_features, dtype=torch.float64) for name in names}
    return {f"{name}.weight": torch.cat(parts) if parts else empty[name] for name, parts in seen.items()}
