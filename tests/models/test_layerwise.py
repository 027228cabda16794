"""The walk through the blocks against the model's own forward pass, family by family."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
import transformers
import whole_passes
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


@pytest.mark.parametrize("family", whole_passes.FAMILIES)
def test_what_a_block_gets_belongs_to_its_window(family: str, device: str) -> None:
    """Per-layer embeddings, shared keys and values, the embeddings once more, indices of the block before."""
    model, texts = whole_passes.build(family, device), list(whole_passes.windows(12, 9, 12, 12))
    _, blocks = decoder_blocks(model)
    assert BlockWalker(model, blocks, texts).replays
    assert_same(walked_states(model, texts), own_states(model, texts))


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox", "gemma3n, shared keys", "zamba2", "glm_moe_dsa"])
def test_a_change_is_seen_by_the_next_block(family: str, device: str) -> None:
    """Pruned in place during the walk, each block gets what the pruned ones before it put out, by whole passes of the model."""
    model = tiny(family, device) if family in FAMILIES else whole_passes.build(family, device)
    texts = windows(8, 5, 8)
    dense = own_states(model, texts)
    _, blocks = decoder_blocks(model)
    walker = BlockWalker(model, blocks, texts)
    assert walker.replays
    for index, block in walker:
        outputs: list[Tensor] = []
        handle = block.register_forward_hook(lambda module, args, out, outputs=outputs: outputs.append(tensor_of(out)))
        walker.forward(index)
        walker.forward(index)  # once more is the same
        handle.remove()
        now = own_states(model, texts)
        assert_same([outputs[:3], outputs[3:]], [now[index], now[index]])
        assert torch.allclose(outputs[0], dense[index][0], atol=1e-3) == (index == 0)
        for linear in block.modules():
            if isinstance(linear, nn.Linear):
                linear.weight.data[:, ::2] = 0.0


def test_blocks_may_be_passed_over(device: str) -> None:
    """As where --skip leaves a block nothing to prune."""
    model, texts = whole_passes.build("gemma4, shared keys", device), list(whole_passes.windows(12, 9))
    _, blocks = decoder_blocks(model)
    walker, own = BlockWalker(model, blocks, texts), own_states(model, texts)
    for index in (1, 3):
        outputs: list[Tensor] = []
        handle = blocks[index].register_forward_hook(lambda module, args, out, outputs=outputs: outputs.append(tensor_of(out)))
        walker.forward(index)
        handle.remove()
        assert_same([outputs], [own[index]])


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
    assert not any("forward" in module.__dict__ for module in model.modules())


class Block(nn.Module):
    """A residual block; `kind` says what else it does."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=False)
        self.kind = kind

    def forward(self, hidden: Tensor, notes: list[Tensor], board: nn.Module) -> Tensor:
        out = torch.tanh(self.linear(hidden))
        if self.kind == "list":  # all blocks before it are read
            out = out + sum(notes[:-1], torch.zeros_like(hidden))
            notes.append(hidden)
        if self.kind == "outside":  # what it keeps on another module is read two blocks later
            out = out + board.kept[-2] if len(board.kept) > 1 else out
            board.kept.append(hidden)
        if self.kind == "in place":
            return hidden.add_(out)
        return hidden + out


class Tower(nn.Module):
    """Kinds of decoders that transformers has, or may have one day."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.kept = kind, []
        self.embed = nn.Embedding(48, 8)
        self.layers = nn.ModuleList([Block(kind) for _ in range(4)])

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        hidden, first, notes = self.embed(input_ids), None, []
        self.kept = [] if self.kind != "stale" else self.kept
        for _ in range(2 if self.kind == "looped" else 1):
            for index, layer in enumerate(self.layers):
                if self.kind == "skips" and index == 1 and int(input_ids[0, 0]) == 0:
                    continue
                hidden = layer(hidden, notes, self)
                first = hidden if index == 0 else first
                if self.kind == "reaches back" and index == 2:
                    hidden = hidden + 3 * first
        return hidden


@pytest.mark.parametrize(
    ("kind", "replays"),
    [("plain", True), ("list", True), ("in place", True), ("reaches back", False), ("outside", False), ("looped", False)],
)
def test_decoders_of_any_kind(kind: str, replays: bool) -> None:
    """Where more reaches a block than the one before it hands on, the blocks before it run again; what it sees is right in any case."""
    model, texts = Tower(kind), windows(6, 4, 6)
    walker = BlockWalker(model, model.layers, texts)
    assert walker.replays == replays
    for index, block in walker:
        seen: list[Tensor] = []
        handle = block.linear.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].clone()))
        walker.forward(index)
        walked = seen[:]
        seen.clear()
        for text in texts:
            model(input_ids=text[None], use_cache=False)
        handle.remove()
        assert len(walked) == len(seen) == (6 if kind == "looped" else 3)
        assert all(torch.equal(a, b) for a, b in zip(walked, seen, strict=True))
        block.linear.weight.data[:, ::2] = 0.0


def test_a_window_that_skips_a_block() -> None:
    texts = [torch.tensor([1, 2, 3]), torch.tensor([0, 2, 3])]
    model = Tower("skips")
    with pytest.raises(ModelError, match="expected every decoder block to run in a forward pass, got one that skips some in a window"):
        BlockWalker(model, model.layers, texts).forward(3)


def test_modes_are_put_back_module_by_module(device: str) -> None:
    """Without dropout whatever mode the model is in."""
    config = transformers.GPTNeoXConfig(**COMMON, intermediate_size=24, hidden_dropout=0.5)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(device).eval()
    texts = windows(8, 5)
    own = own_states(model, texts)
    model.train()
    model.gpt_neox.layers[1].eval()
    before = [module.training for module in model.modules()]
    assert_same(walked_states(model, texts), own)
    assert [module.training for module in model.modules()] == before


def test_a_weight_that_is_read_without_its_layer() -> None:
    """`reads` tells it from one that nothing reads."""
    config = transformers.MambaConfig(vocab_size=48, hidden_size=16, num_hidden_layers=2, state_size=4)
    model = transformers.AutoModelForCausalLM.from_config(config)
    _, blocks = decoder_blocks(model)
    walker = BlockWalker(model, blocks, windows(8))
    walker.forward(1)
    idle = nn.Linear(4, 4)
    weights = {"dt": blocks[1].mixer.dt_proj.weight, "x": blocks[1].mixer.x_proj.weight, "idle": idle.weight}
    assert walker.reads(1, weights) == {"dt", "x"}
