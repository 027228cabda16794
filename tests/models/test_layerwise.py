"""The walk through the blocks against the model's own forward pass, family by family."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
import transformers
from torch import Tensor, nn

from proxsparse_triton.errors import ModelError
from proxsparse_triton.models.layerwise import BlockWalker
from proxsparse_triton.models.selection import decoder_blocks

LAYERS = 4
COMMON = {"hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "vocab_size": 48, "pad_token_id": 0}
GATED = {**COMMON, "num_key_value_heads": 2, "intermediate_size": 24}
ALTERNATING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2)}

FAMILIES = {
    "llama": transformers.LlamaConfig(**GATED),
    "mistral": transformers.MistralConfig(**GATED, sliding_window=4),
    "qwen2": transformers.Qwen2Config(**GATED, use_sliding_window=True, **ALTERNATING),
    "gemma2": transformers.Gemma2Config(**GATED, head_dim=8, **ALTERNATING),
    "gemma3": transformers.Gemma3TextConfig(**GATED, head_dim=8, **ALTERNATING),
    "opt": transformers.OPTConfig(**COMMON, ffn_dim=24, word_embed_proj_dim=8, max_position_embeddings=32),
    "gpt_neox": transformers.GPTNeoXConfig(**COMMON, intermediate_size=24),
    "phi": transformers.PhiConfig(**COMMON, intermediate_size=24),
}


def tiny(family: str, device: str, **options: str) -> nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family], **options).eval().to(device)
    with torch.no_grad():
        for parameter in model.parameters():  # larger than a fresh model's: what attends to what must show
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def windows(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 48, (length,), generator=generator) for length in lengths]


def tensor_of(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def own_states(model: nn.Module, texts: list[Tensor]) -> list[list[Tensor]]:
    """What each block puts out in the model's ordinary forward pass: [block][window]."""
    _, blocks = decoder_blocks(model)
    found: list[list[Tensor]] = [[] for _ in blocks]
    handles = [
        block.register_forward_hook(lambda module, args, out, index=index: found[index].append(tensor_of(out)))
        for index, block in enumerate(blocks)
    ]
    with torch.no_grad():
        for text in texts:
            model(input_ids=text[None].to(next(model.parameters()).device), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def walked_states(model: nn.Module, texts: list[Tensor]) -> list[list[Tensor]]:
    """The same as the walker computes it."""
    _, blocks = decoder_blocks(model)
    found = []
    walker = BlockWalker(model, blocks, texts)
    for index, block in walker:
        outputs: list[Tensor] = []
        handle = block.register_forward_hook(lambda module, args, out, outputs=outputs: outputs.append(tensor_of(out)))
        walker.forward(index)
        handle.remove()
        found.append(outputs)
    return found


def assert_same(one: list[list[Tensor]], other: list[list[Tensor]]) -> None:
    assert [len(row) for row in one] == [len(row) for row in other]
    for block, (mine, theirs) in enumerate(zip(one, other, strict=True)):
        for a, b in zip(mine, theirs, strict=True):
            assert a.isfinite().all()
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=lambda text, block=block: f"block {block}: {text}")


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_the_models_own(family: str, device: str) -> None:
    model = tiny(family, device)
    texts = windows(20, 9, 20, 3)  # windows of several lengths, one of them shorter than the sliding window
    assert_same(walked_states(model, texts), own_states(model, texts))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_with_explicit_masks(family: str, device: str) -> None:
    """Eager attention gets a mask tensor where sdpa gets none."""
    model = tiny(family, device, attn_implementation="eager")
    texts = windows(11, 6)
    assert_same(walked_states(model, texts), own_states(model, texts))


def test_sliding_and_full_blocks_get_their_own_arguments(device: str) -> None:
    """Guards the test above: with one set of arguments for all blocks the states would differ."""
    model = tiny("gemma3", device, attn_implementation="eager")
    texts = windows(11)
    own = own_states(model, texts)
    _, blocks = decoder_blocks(model)
    walker = BlockWalker(model, blocks, texts)
    arguments = walker._arguments[11]
    walker._arguments[11] = [arguments[0]] * LAYERS
    for index, _ in walker:
        last = index
    assert last == LAYERS - 1
    assert not torch.allclose(walker._hidden[0], own[-1][0], atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
def test_a_change_is_seen_by_the_next_block(family: str, device: str) -> None:
    """Pruned in place during the walk, the states are those of the pruned model; block 0's inputs stay the dense ones."""
    model, texts = tiny(family, device), windows(8, 5)
    dense = own_states(model, texts)
    _, blocks = decoder_blocks(model)
    walker = BlockWalker(model, blocks, texts)
    found = []
    for index, block in walker:
        outputs: list[Tensor] = []
        handle = block.register_forward_hook(lambda module, args, out, outputs=outputs: outputs.append(tensor_of(out)))
        walker.forward(index)
        handle.remove()
        found.append(outputs)
        for linear in block.modules():
            if isinstance(linear, nn.Linear):
                linear.weight.data[:, ::2] = 0.0
    assert_same(found[:1], dense[:1])
    pruned = own_states(model, texts)
    assert not torch.allclose(pruned[0][0], dense[0][0], atol=1e-3)
    # forward(k) ran before block k was changed: its inputs were those of the pruned blocks before it
    for index in range(1, LAYERS):
        inputs = pruned[index - 1]
        assert not torch.allclose(found[index][0], dense[index][0], atol=1e-4)
        assert inputs[0].shape == found[index][0].shape
    torch.testing.assert_close(walker._hidden[0], pruned[-1][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(walker._hidden[1], pruned[-1][1], rtol=1e-6, atol=1e-6)


def hooks(model: nn.Module) -> list[OrderedDict]:  # type: ignore[type-arg]
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return [getattr(module, name) for module in model.modules() for name in names if getattr(module, name)]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_nothing_is_left_behind(family: str, device: str) -> None:
    model, texts = tiny(family, device), windows(8)
    before = own_states(model, texts)
    walked_states(model, texts)
    assert not hooks(model)
    assert_same(own_states(model, texts), before)


def test_no_graph_is_kept(device: str) -> None:
    states = walked_states(tiny("llama", device), windows(8))
    assert not any(state.requires_grad for row in states for state in row)


def test_a_model_that_skips_a_block(device: str) -> None:
    """Conditional depth cannot be walked; said in one line, and no hook stays."""
    model = tiny("llama", device)
    _, blocks = decoder_blocks(model)
    blocks.append(nn.Linear(4, 4))
    with pytest.raises(ModelError, match=r"expected every decoder block to run in a forward pass, got 4 of 5\. "):
        BlockWalker(model, blocks, windows(8))
    assert not hooks(model)
