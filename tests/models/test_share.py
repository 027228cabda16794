from __future__ import annotations

import json
from typing import Any

import pytest
import transformers
from torch import nn

from proxsparse_triton.models.selection import plan_layers
from proxsparse_triton.models.share import Part, Share, part_name, percent, read_share, share_of, weights_in_files

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
ATTENTION = 2 * (16 * 16 + 16 * 8)  # of a block
EXPERTS, ROUTER = 4 * 3 * 24 * 16, 4 * 16


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, vocab_size=32, num_local_experts=4))


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, vocab_size=32))


def test_all_of_a_llama() -> None:
    share = plan_layers(llama()).share()
    assert (share.pruned, share.total, share.dense, share.warning) == (2 * (ATTENTION + 3 * 24 * 16), share.pruned, (), "")
    assert (share.fraction, str(share)) == (1.0, "100 % of the decoder's weights")


def test_a_mixture_warns_and_names_its_experts() -> None:
    share = plan_layers(mixtral()).share()
    assert (share.pruned, share.total) == (2 * ATTENTION, 2 * (ATTENTION + EXPERTS + ROUTER))
    assert [(part.name, part.weights) for part in share.dense] == [
        ("model.layers.*.mlp.experts", 2 * EXPERTS),
        ("model.layers.*.mlp.gate", 2 * ROUTER),
    ]
    assert share.warning == (
        "Warning: only 14.1 % of the decoder's weights are 2:4. The largest part left dense: experts (model.layers.*.mlp.experts), "
        "84.7 % of the decoder's weights (fused experts (3-D parameter): not an nn.Linear)."
    )


def test_what_is_skipped_counts_as_dense() -> None:
    plan = plan_layers(llama(), skip=["mlp"])
    assert plan.share().dense[0].reason == "matched --skip mlp"
    assert "only 40.0 % of the decoder's weights" in plan.share().warning
    assert plan_layers(llama(), skip=["down_proj"]).share().warning == ""


def test_what_a_method_leaves_out_counts_as_dense() -> None:
    plan = plan_layers(llama())
    names = [f"{name}.weight" for name in plan.selected()]
    (part,) = plan.share([name for name in names if "q_proj" not in name]).dense
    assert part == Part("model.layers.*.self_attn.q_proj", 2 * 16 * 16, "left dense by the method")


def test_a_shared_weight_counts_once() -> None:
    model = llama()
    one, two = model.model.layers
    two.mlp = one.mlp
    two.self_attn.q_proj.weight = one.self_attn.q_proj.weight
    plan = plan_layers(model)
    share = plan.share()
    assert share.pruned == share.total == ATTENTION + 3 * 24 * 16 + ATTENTION - 16 * 16
    assert len(plan.choices) == 7 + 3 + 1
    skipped = plan_layers(model, skip=[r"layers\.1\.mlp"])  # its other name
    assert {choice.name for choice in skipped.choices if choice.reason == r"matched --skip layers\.1\.mlp"} == {
        f"model.layers.0.mlp.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")
    }


def test_layers_outside_the_blocks_do_not_count() -> None:
    share = plan_layers(llama(), include=["lm_head"]).share()
    assert (share.pruned, share.fraction) == (0, 0.0)
    assert str(share) == "0 % of the decoder's weights"


def test_files_with_a_matrix_for_each_expert_count_the_same() -> None:
    plan = plan_layers(mixtral())
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32, 16), "lm_head.weight": (32, 16), "model.norm.weight": (16,)}
    for block in range(2):
        prefix = f"model.layers.{block}"
        for leaf, rows in (("q", 16), ("k", 8), ("v", 8), ("o", 16)):
            shapes[f"{prefix}.self_attn.{leaf}_proj.weight"] = (rows, 16)
        shapes[f"{prefix}.block_sparse_moe.gate.weight"] = (4, 16)
        shapes[f"{prefix}.input_layernorm.weight"] = (16,)
        for expert in range(4):
            for leaf, shape in (("w1", (24, 16)), ("w2", (16, 24)), ("w3", (24, 16))):
                shapes[f"{prefix}.block_sparse_moe.experts.{expert}.{leaf}.weight"] = shape
    pruned = [key for key in shapes if "self_attn" in key]
    share, planned = share_of(weights_in_files(shapes, pruned), pruned), plan.share()
    assert (share.pruned, share.total) == (planned.pruned, planned.total)
    assert (str(share.dense[0]), share.dense[0].weights) == ("experts (model.layers.*.block_sparse_moe.experts)", 2 * EXPERTS)
    # Another numbered list, and a tower that is larger, are not the decoder.
    more = {"model.altup_projections.0.weight": (16, 16), "vision_tower.layers.0.mlp.weight": (999, 999)}
    assert weights_in_files(more | shapes) == weights_in_files(shapes)
    bare = {key.removeprefix("model.layers."): shape for key, shape in shapes.items()}
    assert sum(weights_in_files(bare).values()) == share.total
    assert weights_in_files({"lm_head.weight": (4, 4)}) == {}


@pytest.mark.parametrize(
    ("parameter", "name"),
    [
        ("model.layers.3.mlp.up_proj.weight", "model.layers.*.mlp.up_proj"),
        ("model.layers.3.mlp.experts.gate_up_proj", "model.layers.*.mlp.experts"),
        ("model.layers.3.mlp.experts.10.up_proj.weight", "model.layers.*.mlp.experts"),
        ("model.layers.3.mlp.shared_experts.up_proj.weight", "model.layers.*.mlp.shared_experts"),
        ("h.12.conv1d.weight", "h.*.conv1d"),
        ("0.weight", "*"),
    ],
)
def test_names_of_parts(parameter: str, name: str) -> None:
    assert part_name(parameter) == name


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0 %"), (1, "100 %"), (0.9999, "99.9 %"), (0.4999, "49.9 %"), (0.0317, "3.1 %"), (1e-6, "under 0.1 %")]
)
def test_percent(share: float, text: str) -> None:
    assert percent(share) == text


def test_json_and_back() -> None:
    share = plan_layers(mixtral()).share()
    assert read_share(json.loads(json.dumps(share.as_json()))) == share
    assert set(share.as_json()) == {"weights", "pruned", "share", "left_dense"}


@pytest.mark.parametrize(
    "entry",
    [
        *(None, [], {}, {"weights": 4}, {"weights": 4, "pruned": 5}, {"weights": "4", "pruned": 2}),
        *({"weights": -4, "pruned": -5}, {"weights": 10**400, "pruned": 1}),
    ],
)
def test_a_record_that_makes_no_sense(entry: Any) -> None:
    assert read_share(entry) is None


def test_parts_of_a_record_that_make_no_sense_are_left_out() -> None:
    parts = [None, {"part": "a", "weights": "9"}, {"part": "b", "weights": 2, "reason": None}]
    assert read_share({"weights": 4, "pruned": 1, "left_dense": parts}) == Share(1, 4, (Part("b", 2, "None"),))
    assert read_share({"weights": 4, "pruned": 1, "left_dense": 3}) == Share(1, 4)
    share = read_share({"weights": 4, "pruned": 1, "left_dense": [{"part": "a\x1b[2J\n" + 300 * "b", "weights": 2}]})
    assert share is not None
    assert share.warning.isprintable()
    assert len(share.warning) < 500
