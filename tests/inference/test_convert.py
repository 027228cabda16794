from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from proxsparse_triton import SparseLinear, mask_24, sparsify_model
from proxsparse_triton.errors import ConfigError, ModelError
from proxsparse_triton.inference.convert import weight_bytes
from proxsparse_triton.inference.group import GroupMember, SparseGroup
from proxsparse_triton.models.loading import load_model
from proxsparse_triton.models.source import resolve_model


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("fuse", [False, True])
def test_the_same_logits(pruned: nn.Module, ids: Tensor, fuse: bool) -> None:
    expected = logits(pruned, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sparsify_model(pruned, fuse=fuse) is pruned
    torch.testing.assert_close(logits(pruned, ids), expected, rtol=1e-5, atol=1e-5)
    assert not any(isinstance(module, nn.Linear) for module in pruned.model.layers.modules())
    assert isinstance(pruned.lm_head, nn.Linear)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_logits_in_half_precision(pruned: nn.Module, ids: Tensor, dtype: torch.dtype) -> None:
    pruned.to(dtype)
    expected = logits(pruned, ids)
    torch.testing.assert_close(logits(sparsify_model(pruned), ids), expected, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_the_same_tokens(pruned: nn.Module, ids: Tensor, cache: str) -> None:
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "cache_implementation": cache, "use_cache": True}
    expected = pruned.generate(ids[:, :6], **options)
    assert torch.equal(sparsify_model(pruned).generate(ids[:, :6], **options), expected)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_whole(pruned: nn.Module, ids: Tensor, backend: str) -> None:
    expected = [logits(pruned, part) for part in (ids, ids[:, :5])]
    sparsify_model(pruned)
    torch._dynamo.reset()
    run = torch.compile(pruned, fullgraph=True, backend=backend)
    for part, wanted in zip((ids, ids[:, :5]), expected, strict=True):
        torch.testing.assert_close(logits(run, part), wanted, rtol=1e-4, atol=1e-4)


def test_compiled_block_by_block_once_for_all(pruned: nn.Module, ids: Tensor) -> None:
    expected = logits(pruned, ids)
    sparsify_model(pruned)
    torch._dynamo.reset()
    for block in pruned.model.layers:
        block.forward = torch.compile(block.forward, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):  # a setting that monkeypatch puts back is gone for all later tests
        torch.testing.assert_close(logits(pruned, ids), expected, rtol=1e-5, atol=1e-5)


def test_siblings_are_fused(pruned: nn.Module) -> None:
    block = sparsify_model(pruned).model.layers[0]
    assert all(isinstance(getattr(block.self_attn, name), GroupMember) for name in ("q_proj", "k_proj", "v_proj"))
    assert all(isinstance(getattr(block.mlp, name), GroupMember) for name in ("gate_proj", "up_proj"))
    assert isinstance(block.self_attn.fused_q_proj, SparseGroup)
    assert block.self_attn.fused_q_proj.out_features == 192 + 96 + 96
    assert type(block.self_attn.o_proj) is type(block.mlp.down_proj) is SparseLinear


def test_only_what_belongs_together_is_fused(pruned: nn.Module) -> None:
    blocks = pruned.model.layers
    blocks[0].self_attn.q_proj.bias = nn.Parameter(torch.zeros(192))
    blocks[1].self_attn.k_proj.half()
    blocks[2].self_attn.cross = nn.Module()
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(blocks[2].self_attn.cross, name, copy.deepcopy(blocks[2].self_attn.q_proj))
    sparsify_model(pruned, skip=["3.self_attn.v_proj"])
    for parent in (blocks[0].self_attn, blocks[1].self_attn, blocks[2].self_attn.cross):
        assert all(type(getattr(parent, name)) is SparseLinear for name in ("q_proj", "k_proj", "v_proj"))
    assert type(blocks[3].self_attn.q_proj) is SparseLinear
    assert type(blocks[3].self_attn.v_proj) is nn.Linear
    assert isinstance(blocks[2].self_attn.q_proj, GroupMember)


def test_include_and_skip(pruned: nn.Module) -> None:
    sparsify_model(pruned, include=["mlp"], skip=["down_proj"])
    block = pruned.model.layers[0]
    assert isinstance(block.mlp.up_proj, GroupMember)
    assert type(block.mlp.down_proj) is type(block.self_attn.q_proj) is nn.Linear


def test_state_dict_round_trip(pruned: nn.Module, ids: Tensor) -> None:
    other = copy.deepcopy(pruned)
    for parameter in other.model.layers.parameters():
        parameter.data.mul_(0.5)
    expected = logits(pruned, ids)
    sparsify_model(pruned)
    sparsify_model(other, fuse=False)
    assert list(pruned.state_dict()) == list(other.state_dict())
    assert not any("fused" in name for name in pruned.state_dict())
    other.load_state_dict(pruned.state_dict())
    torch.testing.assert_close(logits(other, ids), expected, rtol=1e-5, atol=1e-5)


def test_weight_bytes(pruned: nn.Module) -> None:
    pruned.bfloat16()
    before = weight_bytes(pruned)
    linears = sum(module.weight.nbytes for module in pruned.model.layers.modules() if isinstance(module, nn.Linear))
    assert (before.packed, before.dense) == (0, 0)
    after = weight_bytes(sparsify_model(pruned))
    assert (after.packed, after.dense) == (linears * 9 // 16, linears)
    assert after.others == before.others - linears


def test_one_layer_at_a_time(pruned: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a layer is packed, those before it have been replaced already."""
    dense_left = []
    real = SparseLinear.from_dense

    def from_dense(*arguments: Any, **options: Any) -> SparseLinear:
        dense_left.append(sum(isinstance(module, nn.Linear) for module in pruned.model.layers.modules()))
        return real(*arguments, **options)

    monkeypatch.setattr(SparseLinear, "from_dense", from_dense)
    sparsify_model(pruned)
    assert dense_left == list(range(28, 0, -1))


def test_dense_layers_are_left_and_said_once(pruned: nn.Module) -> None:
    up = pruned.model.layers[1].mlp.up_proj
    up.weight.data[3, 8:12] = torch.tensor([1.0, 1.0, 0.0, 1.0])
    pruned.model.layers[2].mlp.up_proj.weight.data[:] = 1
    pruned.model.layers[3].mlp.down_proj.register_forward_hook(lambda *arguments: None)
    repeats = {"forward": lambda self, x: x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias}
    pruned.model.layers[0].mlp.down_proj.__class__ = type("Repeats", (nn.Linear,), repeats)
    pruned.model.layers[2].self_attn.o_proj.double()
    with pytest.warns(UserWarning, match="sparsify_model") as caught:
        sparsify_model(pruned)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert message.startswith("sparsify_model: 4 of 28 layers stay dense: ")
    assert "2 not 2:4 (model.layers.1.mlp.up_proj: not 2:4, 3 non-zeros in block (3, 2))" in message
    assert "1 with hooks, which would be lost (model.layers.3.mlp.down_proj" in message
    assert "torch.float64" in message
    assert caught[0].filename == __file__
    assert pruned.model.layers[1].mlp.up_proj is up
    assert type(pruned.model.layers[1].mlp.gate_proj) is SparseLinear  # its sibling stays single


def test_shared_weights_stay(pruned: nn.Module, ids: Tensor) -> None:
    blocks = pruned.model.layers
    blocks[1].mlp.up_proj.weight = blocks[0].mlp.up_proj.weight
    expected = logits(pruned, ids)
    with pytest.warns(UserWarning, match=r"1 of 27 layers stay dense: 1 with a shared weight \(model.layers.0.mlp.up_proj"):
        sparsify_model(pruned)
    assert blocks[1].mlp.up_proj.weight is blocks[0].mlp.up_proj.weight
    torch.testing.assert_close(logits(pruned, ids), expected, rtol=1e-5, atol=1e-5)


def test_a_dense_layer_is_an_error_when_asked(pruned: nn.Module) -> None:
    pruned.model.layers[3].mlp.up_proj.weight.data[3, 8:12] = 1
    name = r"model\.layers\.3\.mlp\.up_proj"
    with pytest.raises(ModelError, match=rf"expected 2:4 in every layer, got {name}: not 2:4, 4 non-zeros in block \(3, 2\)\..*pst prune"):
        sparsify_model(pruned, on_dense="error")
    assert type(pruned.model.layers[0].mlp.up_proj) is nn.Linear  # nothing has changed


def test_a_dense_model_is_refused() -> None:
    model = load_model(resolve_model("demo"), dtype=None)
    first = r"model\.layers\.0\.self_attn\.q_proj: not 2:4, [34] non-zeros in block \(0, \d+\)"
    with pytest.raises(ModelError, match=rf"expected 2:4 layers, got none of 28 \({first}\)\. .*pst prune.*apply_masks"):
        sparsify_model(model)


def test_bad_arguments(pruned: nn.Module) -> None:
    with pytest.raises(ConfigError, match="sparsify_model: expected on_dense 'skip' or 'error', got 'maybe'"):
        sparsify_model(pruned, on_dense="maybe")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--include: expected an expression that matches a layer"):
        sparsify_model(pruned, include=["nothing"])
    with pytest.raises(ModelError, match="decoder_blocks: expected a list of decoder blocks"):
        sparsify_model(nn.Linear(4, 4))


def test_twice(pruned: nn.Module) -> None:
    sparsify_model(pruned, include=["mlp"])
    sparsify_model(pruned, include=["self_attn"])
    with pytest.raises(ModelError, match="sparsify_model: expected dense layers, got a model whose layers are packed already"):
        sparsify_model(pruned)


def test_it_is_not_saved_as_a_dense_model(pruned: nn.Module, tmp_path: Any) -> None:
    sparsify_model(pruned)
    with pytest.raises(ModelError, match="save_pretrained: expected a dense model, got one with packed layers"):
        copy.deepcopy(pruned).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_models_that_are_no_transformers_model() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    model = Plain()
    for layer in (layer for block in model.blocks for layer in block if isinstance(layer, nn.Linear)):  # type: ignore[union-attr]
        layer.weight.data.masked_fill_(~mask_24(layer.weight.abs()), 0)
    x = torch.randn(3, 8)
    expected = model(x)
    model.eval()
    torch.testing.assert_close(sparsify_model(model)(x), expected)
    assert not model.blocks[0][0].training  # type: ignore[index]
    assert not hasattr(model, "save_pretrained")


# On the card.


def on_the_card(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    return model.to("cuda", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.filterwarnings("ignore:SparseLinear")
def test_logits_on_the_card(pruned: nn.Module, ids: Tensor, fuse: bool) -> None:
    on_the_card(pruned)
    for part in (ids[:1, :1], ids, ids.repeat(16, 4)):
        expected = logits(pruned, part.cuda())
        got = logits(sparsify_model(copy.deepcopy(pruned), fuse=fuse), part.cuda())
        torch.testing.assert_close(got, expected, rtol=0.05, atol=0.3)


@pytest.mark.gpu
@pytest.mark.parametrize("move", [lambda model: sparsify_model(model).cuda(), lambda model: sparsify_model(model.cuda())])
@pytest.mark.filterwarnings("ignore:SparseLinear")
def test_to_the_card_and_back(pruned: nn.Module, ids: Tensor, move: Callable[[nn.Module], nn.Module]) -> None:
    pruned.bfloat16()
    before = {name: value.clone() for name, value in sparsify_model(copy.deepcopy(pruned)).state_dict().items()}
    after = move(pruned).cpu().state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.filterwarnings("ignore:SparseLinear")
def test_generation_on_the_card(pruned: nn.Module, ids: Tensor, cache: str) -> None:
    """In fp32, where both choose the same tokens; a static cache compiles the model."""
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "cache_implementation": cache, "use_cache": True}
    on_the_card(pruned, torch.float32)
    expected = pruned.generate(ids[:, :6].cuda(), **options)
    assert torch.equal(sparsify_model(pruned).generate(ids[:, :6].cuda(), **options), expected)
