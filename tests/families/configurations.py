"""Tiny configurations of the families that are tried: two or three blocks, 32 to 64 wide, a vocabulary of bytes.

Each is as small as the family's code allows, and has every kind of block that the family has.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

VOCABULARY = 272  # two special tokens, 256 bytes, spare rows
WIDTH = 32
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
# What most families call their sizes.
USUAL = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    **HEADS,
}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
# What older families call them.
N_NAMES = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 3, "n_head": 4, "n_positions": 256}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
STATES = {"num_hidden_layers": 3, "hidden_size": WIDTH, "vocab_size": VOCABULARY}


@dataclass(frozen=True)
class Family:
    """kind: transformers' model type. settings: of its configuration class. refused: what is said where it is not pruned; "": it is."""

    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    refused: str = ""
    vision: bool = False  # has a vision tower

    def refused_as(self, words: str) -> Family:
        return replace(self, refused=words)


def usual(kind: str, /, **changes: Any) -> Family:
    return Family(kind, {**USUAL, **SPECIAL, **changes})


def of(kind: str, /, *bases: dict[str, Any], **changes: Any) -> Family:
    settings = dict(SPECIAL)
    for base in bases:
        settings |= base
    return Family(kind, settings | changes)


LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
    "num_key_value_heads": 4,
}
ROUTED = {**EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
MAMBA2 = {**MAMBA, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16}
DELTA = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
MIXED = ["linear_attention", "full_attention", "linear_attention"]
SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
PER_LAYER_INPUTS = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}

FAMILIES: dict[str, Family] = {
    # ---- decoders of one kind of block
    "apertus": usual("apertus"),
    "arcee": usual("arcee"),
    "biogpt": usual("biogpt"),
    "bitnet": usual("bitnet"),
    "bloom": of("bloom", STATES, n_head=4),
    "codegen": of("codegen", N_NAMES, rotary_dim=4),
    "cohere": usual("cohere"),
    "cohere2": usual("cohere2", **SLIDING),
    "ctrl": of("ctrl", N_NAMES, dff=48),
    "cwm": usual("cwm"),
    "diffllama": usual("diffllama"),
    "doge": usual("doge"),
    "ernie4_5": usual("ernie4_5"),
    "exaone4": usual("exaone4", **SLIDING),
    "falcon": of("falcon", STATES, num_attention_heads=4, bias=True),
    "falcon, new decoder": of("falcon", STATES, num_attention_heads=4, num_kv_heads=2, new_decoder_architecture=True),
    "gemma": usual("gemma"),
    "gemma2": usual("gemma2", **SLIDING),
    "gemma3_text": usual("gemma3_text", **SLIDING),
    "gemma3n_text": usual(
        "gemma3n_text",
        **PER_LAYER_INPUTS,
        sliding_window=16,
        num_hidden_layers=4,
        intermediate_size=[48] * 4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 4,
        laurel_rank=4,
        num_kv_shared_layers=2,
    ),
    "gemma4_text": usual("gemma4_text", **PER_LAYER_INPUTS, **SLIDING),
    "glm": usual("glm"),
    "glm4": usual("glm4"),
    "gpt_bigcode": of("gpt_bigcode", N_NAMES),
    "gpt_neo": of(
        "gpt_neo", num_layers=2, num_heads=4, hidden_size=WIDTH, vocab_size=VOCABULARY, attention_types=[[["global", "local"], 1]]
    ),
    "gpt_neox": usual("gpt_neox"),
    "gpt_neox_japanese": usual("gpt_neox_japanese"),
    "gptj": of("gptj", N_NAMES, rotary_dim=4),
    "granite": usual("granite"),
    "granite_swa": usual("granite_swa"),
    "helium": usual("helium"),
    "hunyuan_v1_dense": usual("hunyuan_v1_dense"),
    "hyperclovax": usual("hyperclovax"),
    "internlm3": usual("internlm3"),
    "iquestcoder": usual("iquestcoder"),
    "jais2": usual("jais2"),
    "llama": usual("llama"),
    "llama, tied": usual("llama", tie_word_embeddings=True),
    "minicpm3": usual("minicpm3", **LATENT),
    "ministral": usual("ministral", **SLIDING),
    "ministral3": usual("ministral3"),
    "mistral": usual("mistral", sliding_window=16),
    "modernbert-decoder": usual("modernbert-decoder"),
    "mpt": of("mpt", d_model=WIDTH, n_heads=4, n_layers=3, vocab_size=VOCABULARY, max_seq_len=256),
    "nanochat": usual("nanochat"),
    "nemotron": usual("nemotron"),
    "olmo": usual("olmo"),
    "olmo2": usual("olmo2"),
    "olmo3": usual("olmo3", **SLIDING),
    "opt": usual("opt", ffn_dim=48),
    "opt, as opt-350m": usual("opt", ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False),
    "persimmon": usual("persimmon"),
    "phi": usual("phi"),
    "phi3": usual("phi3"),
    "qwen2": usual("qwen2"),
    "qwen3": usual("qwen3"),
    "seed_oss": usual("seed_oss"),
    "smollm3": usual("smollm3"),
    "stablelm": usual("stablelm"),
    "starcoder2": usual("starcoder2"),
    "vaultgemma": usual("vaultgemma", **SLIDING),
    "xglm": of("xglm", d_model=WIDTH, ffn_dim=48, num_layers=3, attention_heads=4, vocab_size=VOCABULARY, max_position_embeddings=256),
    "xlnet": of("xlnet", d_model=WIDTH, n_layer=3, n_head=4, d_inner=48, vocab_size=VOCABULARY),
    # ---- recurrent blocks, alone or beside attention
    "bamba": usual("bamba", **MAMBA2, attn_layer_indices=[1]),
    "falcon_h1": usual("falcon_h1", **MAMBA2, mamba_d_ssm=64),
    "falcon_mamba": of("falcon_mamba", STATES, state_size=8, time_step_rank=8),
    "lfm2": usual("lfm2", block_auto_adjust_ff_dim=False, layer_types=["conv", "full_attention", "conv"]),
    "mamba": of("mamba", STATES, state_size=8, time_step_rank=8),
    "mamba2": of("mamba2", STATES, state_size=8, num_heads=4, head_dim=16, n_groups=1, chunk_size=16),
    "olmo_hybrid": usual("olmo_hybrid", **ROUTED),
    "qwen3_5_text": usual("qwen3_5_text", **DELTA, layer_types=MIXED),
    "recurrent_gemma": usual("recurrent_gemma", attention_window_size=16),
    "rwkv": of("rwkv", STATES, attention_hidden_size=WIDTH, intermediate_size=48, context_length=256),
    "xlstm": of("xlstm", STATES, num_heads=4, ffn_round_up_to_multiple_of=8),
    "zamba": usual(
        "zamba",
        **MAMBA,
        num_hidden_layers=6,
        attention_hidden_size=64,
        attention_head_dim=16,
        num_key_value_heads=4,
        mamba_dt_rank=8,
        attn_layer_period=3,
        attn_layer_offset=2,
        use_mamba_kernels=False,
    ),
    "zamba2": of(
        "zamba2",
        STATES,
        MAMBA,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=48,
        n_mamba_heads=4,
        num_mem_blocks=2,
        chunk_size=16,
        adapter_rank=8,
        layers_block_type=["mamba", "hybrid"] * 3,
        use_mamba_kernels=False,
    ),
    # ---- mixtures of experts
    "afmoe": usual("afmoe", **ROUTED, num_local_experts=4, num_experts=4),
    "dbrx": of(
        "dbrx",
        d_model=WIDTH,
        n_heads=4,
        n_layers=3,
        vocab_size=VOCABULARY,
        max_seq_len=256,
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        ffn_config={"hidden_size": WIDTH, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    "deepseek_v2": usual("deepseek_v2", **LATENT, **ROUTED),
    "deepseek_v3": usual("deepseek_v3", **LATENT, **ROUTED),
    "deepseek_v32": usual("deepseek_v32", **LATENT, **ROUTED, index_topk=8, index_head_dim=8, index_n_heads=2),
    "dots1": usual("dots1", **ROUTED, num_local_experts=4, num_experts=4),
    "ernie4_5_moe": usual("ernie4_5_moe", **ROUTED, num_local_experts=4, num_experts=4),
    "exaone_moe": usual("exaone_moe", **ROUTED, num_local_experts=4, num_experts=4),
    "flex_olmo": usual("flex_olmo", **ROUTED, num_local_experts=4, num_experts=4),
    "glm4_moe": usual("glm4_moe", **ROUTED),
    "glm4_moe_lite": usual("glm4_moe_lite", **LATENT, **ROUTED),
    "glm_moe_dsa": usual(
        "glm_moe_dsa", **LATENT, **ROUTED, indexer_types=["full", "shared", "shared"], index_topk=8, index_head_dim=8, index_n_heads=2
    ),
    "gpt_oss": usual("gpt_oss", **LOCAL, **SLIDING),
    "granitemoe": usual("granitemoe", **LOCAL),
    "granitemoehybrid": usual(
        "granitemoehybrid", **LOCAL, **MAMBA2, shared_intermediate_size=16, layer_types=["mamba", "attention", "mamba"]
    ),
    "granitemoeshared": usual("granitemoeshared", **ROUTED, num_local_experts=4, num_experts=4),
    "hunyuan_v1_moe": usual("hunyuan_v1_moe", **ROUTED, num_local_experts=4, num_experts=4),
    "jamba": usual(
        "jamba",
        **MAMBA,
        num_experts=4,
        num_experts_per_tok=2,
        mamba_dt_rank=8,
        attn_layer_period=3,
        attn_layer_offset=1,
        use_mamba_kernels=False,
    ),
    "jetmoe": usual("jetmoe", **LOCAL, kv_channels=8),
    "llama4_text": usual("llama4_text", **LOCAL, intermediate_size_mlp=48, interleave_moe_layer_step=2, attention_chunk_size=16),
    "minimax": usual("minimax", **LOCAL, block_size=16, layer_types=MIXED),
    "minimax_m2": usual("minimax_m2", **LOCAL, rotary_dim=4),
    "mixtral": usual("mixtral", **LOCAL),
    "olmoe": usual("olmoe", num_experts=4, num_experts_per_tok=2),
    "phimoe": usual("phimoe", **LOCAL),
    "qwen2_moe": usual("qwen2_moe", **EXPERTS, num_experts=4, shared_expert_intermediate_size=16),
    "qwen3_moe": usual("qwen3_moe", **EXPERTS, num_experts=4),
    "qwen3_5_moe_text": usual("qwen3_5_moe_text", **DELTA, **EXPERTS, num_experts=4, shared_expert_intermediate_size=16, layer_types=MIXED),
    "qwen3_next": usual("qwen3_next", **EXPERTS, **DELTA, num_experts=4, shared_expert_intermediate_size=16, layer_types=MIXED),
    "solar_open": usual("solar_open", **ROUTED, num_local_experts=4, num_experts=4),
}

OTHER_NAMES = "stores its weights under other names than it runs with"
VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 28, "patch_size": 14}
QWEN_VISION = {"hidden_size": 16, "depth": 2, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": WIDTH}


def seeing(kind: str, vision: dict[str, Any], /, *text: dict[str, Any], **more: Any) -> Family:
    """A language model with a vision tower."""
    settings = {**USUAL, **SPECIAL}
    for changes in text:
        settings |= changes
    return Family(kind, {"text_config": settings, "vision_config": vision, **more}, vision=True)


REFUSED: dict[str, Family] = {
    "gpt2": of("gpt2", N_NAMES).refused_as("Conv1D stores the weight transposed"),
    "openai-gpt": of("openai-gpt", N_NAMES).refused_as("Conv1D stores the weight transposed"),
    "deepseek_v4": usual(
        "deepseek_v4",
        **EXPERTS,
        n_routed_experts=4,
        n_shared_experts=1,
        num_key_value_heads=1,
        q_lora_rank=16,
        o_groups=2,
        o_lora_rank=8,
        index_n_heads=2,
        index_head_dim=8,
        index_topk=4,
        hc_mult=2,
        sliding_window=16,
    ).refused_as(OTHER_NAMES),
    "kimi_linear": usual(
        "kimi_linear",
        **EXPERTS,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        num_key_value_heads=4,
        num_local_experts=4,
        n_shared_experts=1,
        linear_head_dim=8,
        linear_num_heads=4,
        layer_types=MIXED,
    ).refused_as(OTHER_NAMES),
    "nemotron_h": usual(
        "nemotron_h",
        **EXPERTS,
        layers_block_type=["mamba", "attention", "moe"],
        ssm_state_size=8,
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=1,
        chunk_size=16,
        n_routed_experts=4,
        moe_shared_expert_intermediate_size=16,
    ).refused_as(OTHER_NAMES),
    "gemma3 with vision": seeing("gemma3", VISION, SLIDING, mm_tokens_per_image=4).refused_as(OTHER_NAMES),
    "qwen3_5 with vision": seeing("qwen3_5", QWEN_VISION, DELTA, {"layer_types": MIXED}).refused_as(OTHER_NAMES),
    "llama4 with vision": seeing(
        "llama4",
        {**VISION, "intermediate_size": 64, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
        LOCAL,
        {"intermediate_size_mlp": 48},
    ).refused_as("expected exactly the tensors of the model that config.json describes"),
    "llava": seeing("llava", {**VISION, "model_type": "clip_vision_model", "projection_dim": 16}, {"model_type": "llama"}).refused_as(
        "expected a causal language model, got another kind of model"
    ),
    "qwen2_5_vl": seeing("qwen2_5_vl", QWEN_VISION).refused_as("expected a causal language model, got another kind of model"),
}

# Mixtures at the sizes they are published in: what differs from the defaults of their configuration classes. Depth does not matter
# where all blocks are alike.
PUBLISHED: dict[str, Family] = {
    "Mixtral 8x7B": Family("mixtral", {"num_hidden_layers": 2}),
    "Qwen3-30B-A3B": Family("qwen3_moe", {"num_hidden_layers": 2, "head_dim": 128}),
    "gpt-oss-20b": Family("gpt_oss", {"num_hidden_layers": 2, "num_local_experts": 32}),
    "OLMoE-1B-7B": Family("olmoe", {"num_hidden_layers": 2, "intermediate_size": 1024}),
    "DeepSeek-V3": Family("deepseek_v3"),
    "Llama 4 Scout": Family("llama4_text", {"num_hidden_layers": 4}),
}
