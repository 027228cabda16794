from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from proxsparse_triton.models.statistics import Hessian, InputNorm, input_norms, observe


def rms_of_inputs(model: nn.Module, linears: dict[str, nn.Linear], windows: list[Tensor]) -> dict[str, Tensor]:
    return {name: norm.mean_square().sqrt() for name, norm in input_norms(model, linears, windows).items()}


def inputs(device: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in ((2, 7, 12), (1, 5, 12), (3, 12))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_to_the_direct_computation(device: str, dtype: torch.dtype) -> None:
    linear = nn.Linear(12, 5).to(device, dtype)
    norm, hessian = InputNorm(linear), Hessian(linear)
    given = inputs(device, dtype)
    for statistic in (norm, hessian):
        with observe({"x": linear}, {"x": statistic}):
            for x in given:
                linear(x)
    x = torch.cat([part.flatten(0, -2) for part in given]).double()
    assert len(x) == 22
    torch.testing.assert_close(norm.value().double(), x.square().sum(0).sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(hessian.value().double(), 2 / 22 * x.T @ x, rtol=1e-5, atol=1e-5)
    for value, shape in ((norm.value(), (12,)), (hessian.value(), (12, 12))):
        assert value.dtype == torch.float32
        assert value.shape == shape


def test_hooks_are_removed_even_after_an_error(device: str) -> None:
    linears = {"a": nn.Linear(4, 4).to(device), "b": nn.Linear(4, 4).to(device)}
    norms = {name: InputNorm(linear) for name, linear in linears.items()}
    x = torch.ones(1, 4, device=device)
    with observe(linears, norms):
        linears["a"](x)
    with pytest.raises(ZeroDivisionError), observe(linears, norms):
        raise ZeroDivisionError
    linears["a"](x)
    linears["b"](x)
    assert norms["a"].value().tolist() == [1.0] * 4
    assert norms["b"].value().tolist() == [0.0] * 4
    assert not any(linear._forward_pre_hooks for linear in linears.values())


def test_nothing_seen_is_zero() -> None:
    """An expert that no token reaches: no division by zero."""
    linear = nn.Linear(4, 4)
    assert not InputNorm(linear).value().any()
    assert not Hessian(linear).value().any()


def test_no_graph_is_kept() -> None:
    linear = nn.Linear(4, 4)
    hessian = Hessian(linear)
    x = torch.ones(2, 4, requires_grad=True)
    with observe({"x": linear}, {"x": hessian}):
        linear(x)
    assert not hessian.value().requires_grad


def test_rms_of_the_inputs_of_a_model(device: str) -> None:
    """Over all tokens of all windows, whatever their length; the model is left as it was, and a layer without tokens has zeros."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=48, hidden_size=16, intermediate_size=28, num_hidden_layers=2, num_attention_heads=4)
    ).to(device)
    model.train()
    linears = {name: model.get_submodule(f"model.layers.1.{name}") for name in ("self_attn.q_proj", "mlp.down_proj")}
    windows = [torch.arange(7), torch.arange(20, 32)]
    seen: dict[str, list[Tensor]] = {name: [] for name in linears}
    hooks = [m.register_forward_pre_hook(lambda _, args, name=n: seen[name].append(args[0].flatten(0, -2))) for n, m in linears.items()]
    found = rms_of_inputs(model, {**linears, "idle": nn.Linear(4, 4).to(device)}, windows)
    for hook in hooks:
        hook.remove()
    for name, parts in seen.items():
        x = torch.cat(parts).double()
        assert len(x) == 19
        torch.testing.assert_close(found[name].double(), x.square().mean(0).sqrt(), rtol=1e-5, atol=0)
    assert not found["idle"].any()
    assert model.training
    assert not any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("training", [False, True])
def test_rms_without_dropout(device: str, training: bool) -> None:
    """Twice the same, those of the model as it is used; its mode is put back."""
    torch.manual_seed(0)
    shape = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**shape, hidden_dropout=0.5)).to(device).train(training)
    linears = {"up": model.get_submodule("gpt_neox.layers.1.mlp.dense_h_to_4h")}
    found = [rms_of_inputs(model, linears, [torch.arange(9)])["up"] for _ in range(2)]
    assert torch.equal(*found)
    assert all(module.training == training for module in model.modules())


def test_mean_square_is_that_of_a_token(device: str) -> None:
    """However many there were, in whatever portions."""
    norm = InputNorm(nn.Linear(3, 1).to(device))
    assert norm.mean_square().tolist() == [0, 0, 0]
    norm.add(torch.tensor([[1.0, 2.0, 0.0], [3.0, -2.0, 0.0]], device=device))
    norm.add(torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]], device=device))
    assert norm.mean_square().tolist() == [4.5, 2.5, 0]
    assert norm.value().square().tolist() == pytest.approx([18, 10, 0])


def test_inputs_of_the_output_head(device: str) -> None:
    """Only the whole model runs it."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=48, hidden_size=16, intermediate_size=28, num_hidden_layers=1, num_attention_heads=4)
    model = LlamaForCausalLM(config).to(device)
    tokens = torch.arange(9)
    with torch.no_grad():
        hidden = model.base_model(input_ids=tokens[None].to(device)).last_hidden_state[0]
    found = rms_of_inputs(model, {"head": model.lm_head}, [tokens])["head"]
    torch.testing.assert_close(found, hidden.square().mean(0).sqrt(), rtol=1e-5, atol=0)


def test_the_mode_is_restored_after_an_error() -> None:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=28, num_hidden_layers=1, num_attention_heads=4))
    model.train()
    with pytest.raises(IndexError):
        rms_of_inputs(model, {}, [torch.tensor([99])])
    assert model.training


def test_every_use_of_a_shared_weight_counts(device: str) -> None:
    """The second block computes with the first block's weights: both have the tokens of either."""
    torch.manual_seed(0)
    shape = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**shape)).to(device)
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    second.weight = first.weight
    seen: list[Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2))) for layer in (first, second)]
    found = rms_of_inputs(model, {"up": first}, [torch.arange(9), torch.arange(5)])["up"]
    for hook in hooks:
        hook.remove()
    x = torch.cat(seen).double()
    assert len(x) == 28
    torch.testing.assert_close(found.double(), x.square().mean(0).sqrt(), rtol=1e-5, atol=0)


def test_uses_within_a_module_count(device: str) -> None:
    one, other, outside = (nn.Linear(4, 4, bias=False).to(device) for _ in range(3))
    other.weight = outside.weight = one.weight
    block = nn.ModuleList([one, other])
    norm = InputNorm(one)
    x = torch.ones(2, 4, device=device)
    with observe({"one": one}, {"one": norm}, within=block):
        one(x)
        other(input=x)
        outside(x)
    assert (norm.calls, norm.tokens) == (2, 4)
    assert not any(linear._forward_pre_hooks for linear in (one, other, outside))


def test_inputs_of_any_shape() -> None:
    linear = nn.Linear(4, 4)
    norm = InputNorm(linear)
    with observe({"x": linear}, {"x": norm}):
        linear(torch.ones(4))
        linear(torch.ones(0, 4))
        linear(torch.ones(2, 3, 4))
    assert (norm.calls, norm.tokens) == (3, 7)


def test_modes_are_restored_module_by_module() -> None:
    shape = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**shape)).train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    rms_of_inputs(model, {"up": model.model.layers[1].mlp.up_proj}, [torch.arange(9)])
    assert [module.training for module in model.modules()] == before
