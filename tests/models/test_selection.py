"""Layer selection, family by family, on tiny randomly initialised models: the exact set of names."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from proxsparse_triton.errors import ConfigError, ModelError
from proxsparse_triton.models.selection import (
    HEAD,
    OUTSIDE,
    ROUTER,
    TRANSPOSED,
    UNMATCHED,
    LayerPlan,
    computes_linear,
    decoder_blocks,
    plan_layers,
)

WIDTHS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 32}
GATED = {**WIDTHS, "num_key_value_heads": 2, "intermediate_size": 24, "pad_token_id": 0}
MOE = {**GATED, "moe_intermediate_size": 8, "num_experts_per_tok": 2}

SPLIT_ATTENTION = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
GATED_MLP = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
LLAMA_LIKE = SPLIT_ATTENTION | GATED_MLP

FAMILIES = {
    "llama": (transformers.LlamaConfig(**GATED), "model.layers", LLAMA_LIKE, {"lm_head": HEAD}),
    "mistral": (transformers.MistralConfig(**GATED), "model.layers", LLAMA_LIKE, {"lm_head": HEAD}),
    "qwen2": (transformers.Qwen2Config(**GATED), "model.layers", LLAMA_LIKE, {"lm_head": HEAD}),
    "qwen3": (transformers.Qwen3Config(**GATED, head_dim=8), "model.layers", LLAMA_LIKE, {"lm_head": HEAD}),
    "gemma": (transformers.GemmaConfig(**GATED, head_dim=8), "model.layers", LLAMA_LIKE, {"lm_head": HEAD}),
    "gemma2": (transformers.Gemma2Config(**GATED, head_dim=8), "model.layers", LLAMA_LIKE, {"lm_head": HEAD}),
    "gemma3": (transformers.Gemma3TextConfig(**GATED, head_dim=8), "model.layers", LLAMA_LIKE, {"lm_head": HEAD}),
    "opt": (
        transformers.OPTConfig(**WIDTHS, ffn_dim=24, word_embed_proj_dim=8, max_position_embeddings=32, pad_token_id=0),
        "model.decoder.layers",
        {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"},
        {"model.decoder.project_in": OUTSIDE, "model.decoder.project_out": OUTSIDE, "lm_head": HEAD},
    ),
    "gpt_neox": (
        transformers.GPTNeoXConfig(**WIDTHS, intermediate_size=24, pad_token_id=0),
        "gpt_neox.layers",
        {"attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
        {"lm_head": HEAD},
    ),
    "phi": (
        transformers.PhiConfig(**WIDTHS, intermediate_size=24, pad_token_id=0),
        "model.layers",
        {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense", "mlp.fc1", "mlp.fc2"},
        {"lm_head": HEAD},
    ),
    "phi3": (
        transformers.Phi3Config(**GATED),
        "model.layers",
        {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"},
        {"lm_head": HEAD},
    ),
}


def tiny(config: transformers.PreTrainedConfig) -> nn.Module:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


def llama(**changes: object) -> nn.Module:
    return tiny(transformers.LlamaConfig(**{**GATED, **changes}))


def reasons(plan: LayerPlan) -> dict[str, str]:
    return {choice.name: choice.reason for choice in plan.choices}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_select_exactly_the_block_linears(family: str) -> None:
    config, blocks, leaves, others = FAMILIES[family]
    model = tiny(config)
    plan = plan_layers(model)
    expected = {f"{blocks}.{i}.{leaf}" for i in range(2) for leaf in leaves}
    assert set(plan.selected()) == expected
    assert plan.blocks == blocks
    # older transformers 5 call GPT-NeoX's head embed_out, as its files do
    assert {name.replace("embed_out", "lm_head"): reason for name, reason in reasons(plan).items() if reason} == others
    matrices = {name for name, parameter in model.named_parameters() if name.startswith(f"{blocks}.") and parameter.dim() == 2}
    assert matrices == {f"{name}.weight" for name in plan.selected()}  # no block matrix is forgotten
    order = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert plan.selected() == [name for name in order if name in expected]
    for choice in plan.choices:
        assert choice.shape == tuple(model.get_submodule(choice.name).weight.shape)
        assert choice.block == (int(choice.name.removeprefix(f"{blocks}.")[0]) if choice.name in expected else None)
        assert choice.selected == (choice.reason == "")


def test_gpt2_is_refused_with_the_reason() -> None:
    model = tiny(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=32, n_positions=32))
    assert decoder_blocks(model)[0] == "transformer.h"
    with pytest.raises(ModelError, match=r"got none of 9: Conv1D stores the weight transposed \(GPT-2\): not supported; output head"):
        plan_layers(model)


def test_conv1d_is_listed_beside_linears() -> None:
    model = llama()
    model.model.layers[1].mlp.up_proj = transformers.pytorch_utils.Conv1D(24, 16)
    plan = plan_layers(model)
    assert reasons(plan)["model.layers.1.mlp.up_proj"] == TRANSPOSED
    assert "model.layers.0.mlp.up_proj" in plan.selected()


@pytest.mark.parametrize(
    "config",
    [transformers.MixtralConfig(**GATED, num_local_experts=4), transformers.Qwen3MoeConfig(**MOE, num_experts=4, head_dim=8)],
    ids=["mixtral", "qwen3_moe"],
)
def test_fused_experts_are_reported(config: transformers.PreTrainedConfig) -> None:
    plan = plan_layers(tiny(config))
    assert set(plan.selected()) == {f"model.layers.{i}.{leaf}" for i in range(2) for leaf in SPLIT_ATTENTION}
    fused = [choice for choice in plan.choices if choice.reason == "fused experts (3-D parameter): not an nn.Linear"]
    assert {choice.name for choice in fused} == {
        f"model.layers.{i}.mlp.experts.{leaf}" for i in range(2) for leaf in ("gate_up_proj", "down_proj")
    }
    inner = 24 if config.model_type == "mixtral" else 8
    assert {choice.shape for choice in fused} == {(4 * 2 * inner, 16), (4 * 16, inner)}  # all experts, stacked
    assert {choice.block for choice in fused} == {0, 1}


def test_other_3d_parameters_are_not_called_experts() -> None:
    model = llama()
    model.model.layers[0].mix = nn.Bilinear(4, 4, 4)
    model.model.layers[0].conv = nn.Conv1d(4, 4, 3)
    assert {name: reason for name, reason in reasons(plan_layers(model)).items() if "layers" in name and reason} == {
        "model.layers.0.mix.weight": "3-D parameter: not an nn.Linear"
    }


def test_routers_are_skipped_unless_named() -> None:
    config = transformers.Qwen2MoeConfig(**MOE, num_experts=4, shared_expert_intermediate_size=16)
    model = tiny(config)
    gates = {f"model.layers.{i}.mlp.shared_expert_gate" for i in range(2)}
    plan = plan_layers(model)
    assert {name for name, reason in reasons(plan).items() if reason == ROUTER} == gates
    assert "model.layers.0.mlp.shared_expert.gate_proj" in plan.selected()
    assert not gates & set(plan_layers(model, include=["mlp"]).selected())
    assert gates <= set(plan_layers(model, include=["mlp", "shared_expert_gate"]).selected())


def test_router_linears_of_other_layouts() -> None:
    model = llama()
    mlp = model.model.layers[0].mlp
    mlp.gate = nn.Linear(16, 4)  # DeepSeek's name, beside experts
    mlp.experts = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
    model.model.layers[1].mlp.gate = nn.Linear(16, 24)  # a gate without experts is an ordinary layer
    model.model.layers[1].mlp.router = nn.ModuleDict({"layer": nn.Linear(16, 4)})  # JetMoe's
    plan = plan_layers(model)
    assert {name for name, reason in reasons(plan).items() if reason == ROUTER} == {
        "model.layers.0.mlp.gate",
        "model.layers.1.mlp.router.layer",
    }
    assert {"model.layers.0.mlp.experts.0", "model.layers.0.mlp.experts.1", "model.layers.1.mlp.gate"} <= set(plan.selected())
    assert decoder_blocks(model)[0] == "model.layers"  # not the two experts, though there are two blocks


def test_multimodal_model_uses_the_text_tower() -> None:
    text = transformers.Gemma3TextConfig(**GATED, head_dim=8)
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = transformers.Gemma3ForConditionalGeneration(config)
    plan = plan_layers(model)
    assert plan.blocks == "model.language_model.layers"
    assert len(plan.selected()) == 14
    assert OUTSIDE in {reason for name, reason in reasons(plan).items() if "vision_tower" in name}


def test_towers_of_other_modalities_are_not_the_decoder() -> None:
    def tower() -> nn.ModuleDict:
        return nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})

    assert decoder_blocks(nn.ModuleDict({"audio_tower": tower(), "Vision": tower(), "text": tower()}))[0] == "text.layers"


def test_width_not_divisible_by_four() -> None:
    plan = plan_layers(llama(intermediate_size=190))
    assert reasons(plan)["model.layers.0.mlp.down_proj"] == "in_features 190 not divisible by 4"
    assert "model.layers.0.mlp.up_proj" in plan.selected()
    assert len(plan.selected()) == 12


def test_skip_wins_and_names_its_expression() -> None:
    model = llama()
    plan = plan_layers(model, include=["proj"], skip=["down_", r"layers\.1\."])
    assert set(plan.selected()) == {f"model.layers.0.{leaf}" for leaf in LLAMA_LIKE - {"mlp.down_proj"}}
    assert reasons(plan)["model.layers.0.mlp.down_proj"] == "matched --skip down_"
    assert reasons(plan)["model.layers.1.mlp.up_proj"] == r"matched --skip layers\.1\."


def test_include_narrows_inside_the_blocks() -> None:
    plan = plan_layers(llama(), include=[r"up_proj$", "q_proj"])
    assert plan.selected() == [f"model.layers.{i}.{leaf}" for i in range(2) for leaf in ("self_attn.q_proj", "mlp.up_proj")]
    assert reasons(plan)["model.layers.0.mlp.down_proj"] == UNMATCHED
    assert reasons(plan)["lm_head"] == HEAD


def test_include_names_the_head() -> None:
    plan = plan_layers(llama(tie_word_embeddings=False), include=["lm_head"])
    assert plan.selected() == ["lm_head"]
    tied = llama(tie_word_embeddings=True)
    plan = plan_layers(tied, include=["lm_head", "q_proj"])
    assert reasons(plan)["lm_head"] == "shares its weight with model.embed_tokens"
    assert len(plan.selected()) == 2
    with pytest.raises(ModelError, match=r"shares its weight with model\.embed_tokens"):
        plan_layers(tied, include=["lm_head"])


def test_include_does_not_widen_by_a_parent_name() -> None:
    config, blocks, leaves, _ = FAMILIES["opt"]
    model = tiny(config)
    plan = plan_layers(model, include=["decoder"])
    assert set(plan.selected()) == {f"{blocks}.{i}.{leaf}" for i in range(2) for leaf in leaves}
    assert "model.decoder.project_in" in plan_layers(model, include=["project_in"]).selected()


def test_shared_weights_are_handled_once() -> None:
    model = llama()
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight  # a shared parameter
    layers[1].self_attn = layers[0].self_attn  # a shared module
    layers[0].mlp.gate_proj.weight = nn.Parameter(model.model.embed_tokens.weight[:24].clone())
    model.extra = nn.Linear(16, 24, bias=False)
    model.extra.weight = layers[0].mlp.gate_proj.weight  # shared with something outside the blocks
    layers[1].table = nn.Embedding(16, 24)
    layers[1].table.weight = layers[1].mlp.down_proj.weight  # shared with a table inside them
    plan = plan_layers(model)
    found = reasons(plan)
    assert found["model.layers.1.mlp.down_proj"] == "shares its weight with model.layers.1.table"
    assert found["model.layers.0.mlp.up_proj"] == found["model.layers.0.self_attn.q_proj"] == ""
    assert not {"model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj"} & set(found)
    assert found["model.layers.0.mlp.gate_proj"] == "shares its weight with extra"
    weights = [id(model.get_submodule(name).weight) for name in plan.selected()]
    assert len(weights) == len(set(weights)) == 7


@pytest.mark.parametrize("option", ["include", "skip"])
def test_expression_that_matches_nothing(option: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_layers(llama(), **{option: ["proj", "embed_tokens"]})
    assert str(caught.value) == (
        f"--{option}: expected an expression that matches a layer, got 'embed_tokens', which matches none of 15. "
        "Layers are called model.layers.0.self_attn.q_proj, model.layers.1.self_attn.q_proj, lm_head."
    )


@pytest.mark.parametrize("option", ["include", "skip"])
def test_expression_that_does_not_compile(option: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--{option}: expected a regular expression, got '\[' \(unterminated character set"):
        plan_layers(llama(), **{option: ["["]})
    with pytest.raises(TypeError, match="expected a list of expressions"):
        plan_layers(llama(), **{option: "proj"})


def test_skip_of_an_already_skipped_layer_is_no_error() -> None:
    assert len(plan_layers(llama(), skip=["lm_head"]).selected()) == 14


def test_nothing_left() -> None:
    with pytest.raises(
        ModelError, match=r"expected at least one layer to prune in LlamaForCausalLM, got none of 15: matched --skip proj; output head\. "
    ):
        plan_layers(llama(), skip=["proj"])


def test_model_without_linears() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.LayerNorm(4), nn.Conv1d(2, 2, 3)])

    with pytest.raises(ModelError, match=r"expected a list of decoder blocks with nn\.Linear layers, got none in Bag"):
        plan_layers(Bag())


def test_blocks_without_a_config() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.adapters = nn.ModuleList([nn.Linear(4, 4)])
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 8), nn.ModuleList([nn.Linear(4, 4)] * 9)) for _ in range(3)])

    assert decoder_blocks(Plain())[0] == "blocks"


class Repeats(nn.Linear):
    """As Falcon's: the same product by other words."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias


class Keeps(nn.Linear):
    """Another name, the same forward."""


class Grouped(nn.Linear):
    """As DeepSeek-V4's: one product for each group of inputs."""

    groups = 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        w = self.weight.view(self.groups, -1, x.shape[-1]).transpose(1, 2)
        return torch.bmm(x.reshape(-1, self.groups, x.shape[-1]).transpose(0, 1), w).transpose(0, 1)


class Scaled(nn.Linear):
    """Like nn.Linear only for this value of what it was built with."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.scale = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x) * self.scale


class Clipped(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x).clamp(-448, 448)


class Noisy(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x) + (torch.rand(()) if self.training else 0)


class Coarse(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return nn.functional.linear(x.bfloat16(), self.weight.bfloat16()).to(x.dtype)


@pytest.mark.parametrize("kind", [nn.Linear, Keeps, Repeats])
def test_layers_that_compute_as_linear(kind: type[nn.Linear]) -> None:
    assert computes_linear(kind(8, 12))
    with torch.device("meta"):
        assert computes_linear(kind(8, 12, bias=False))


def test_only_the_forward_of_a_class_is_judged() -> None:
    """A class made on top of another, with a weight that is read in another way."""
    for kind, right in ((nn.Linear, True), (Repeats, True), (Grouped, False)):
        layer = kind(8, 12)
        layer.__class__ = type("Read", (kind,), {"weight": property(lambda self: self._parameters["weight"])})
        assert computes_linear(layer) is right


@pytest.mark.parametrize("kind", [Grouped, Scaled, Clipped, Noisy, Coarse, nn.Identity])
def test_layers_that_compute_something_else(kind: type[nn.Linear]) -> None:
    assert not computes_linear(kind(8, 12))


def test_a_linear_with_another_forward_stays_dense() -> None:
    model = llama()
    layers = model.model.layers
    layers[0].mlp.up_proj, layers[1].mlp.up_proj = Grouped(16, 24), Repeats(16, 24)
    layers[1].mlp.gate_proj.weight = layers[0].mlp.up_proj.weight  # its holders must all compute as nn.Linear
    plan = plan_layers(model)
    found = reasons(plan)
    assert found["model.layers.0.mlp.up_proj"] == "computes something else than nn.Linear with its weight"
    assert "model.layers.1.mlp.gate_proj" not in found  # a weight is named once
    assert len(plan.selected()) == 12
    assert "model.layers.1.mlp.up_proj" in plan.selected()
