"""The divergence from the dense model against torch's own in fp64, and how the loss is put together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import by_hand
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from proxsparse_triton.errors import ConfigError, ModelError
from proxsparse_triton.training.batches import Batch
from proxsparse_triton.training.distillation import DistillationLoss, divergence, linear_divergence
from proxsparse_triton.training.memory import checkpointing

VOCABULARY, WIDTH, ROWS = 40, 16, 11


def tiny() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=28, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3
    )
    return LlamaForCausalLM(config)


def case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden, target = (torch.randn(ROWS, WIDTH, generator=generator).to(dtype) for _ in range(2))
    weight, bias = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype), torch.randn(VOCABULARY, generator=generator).to(dtype)
    return hidden, target, weight, bias, torch.rand(ROWS, generator=generator) < 0.7


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("padded", [False, True])
def test_divergence_is_torchs(temperature: float, padded: bool) -> None:
    hidden, target, weight, _, real = case()
    logits, of_teacher = hidden @ weight.T, target @ weight.T
    mask = real if padded else torch.ones_like(real)
    found = divergence(logits, of_teacher, mask if padded else None, temperature=temperature)
    assert found.item() == pytest.approx(by_hand.divergence(logits, of_teacher, mask, temperature).item(), rel=1e-12)
    assert found > 0.1


@pytest.mark.parametrize("chunk", [1, 3 * VOCABULARY, ROWS * VOCABULARY, 10**6])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_value_and_gradient_in_chunks(chunk: int, with_bias: bool, padded: bool) -> None:
    hidden, target, weight, bias, real = case()
    mask, offset = real if padded else torch.ones_like(real), bias if with_bias else None
    one, other = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    expected = by_hand.divergence(F.linear(one, weight, offset), F.linear(target, weight, offset), mask, 2.0)
    expected.backward()
    found = linear_divergence(other, target, weight, offset, mask if padded else None, temperature=2.0, chunk=chunk)
    (3 * found).backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(other.grad, 3 * one.grad, rtol=1e-10, atol=1e-14)
    assert padded == bool((other.grad == 0).all(-1).any())


def test_bf16_is_summed_in_fp32() -> None:
    hidden, target, weight, _, _ = case(torch.bfloat16)
    found = linear_divergence(hidden, target, weight, None)
    exact = divergence((hidden @ weight.T).float().double(), (target @ weight.T).float().double())
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact.item(), rel=1e-4)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_are_the_divergence_of_whole_logits(dtype: torch.dtype, temperature: float) -> None:
    """Both losses, value and gradient; a temperature that is no power of two rounds bf16 logits once more."""
    hidden, target, weight, bias, real = case(dtype)
    one, other = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    whole = divergence(F.linear(one, weight, bias), F.linear(target, weight, bias), real, temperature=temperature)
    whole.backward()
    found = linear_divergence(other, target, weight, bias, real, temperature=temperature, chunk=4 * VOCABULARY)
    found.backward()
    assert found.dtype == whole.dtype == torch.float32
    assert other.grad.dtype == dtype
    exact = temperature in (1.0, 2.0) or dtype == torch.float32
    assert found.item() == pytest.approx(whole.item(), rel=1e-5 if exact else 5e-3)
    largest = one.grad.abs().max().item()
    bounds = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.0, "atol": largest * (2**-7 if exact else 2**-5)}
    torch.testing.assert_close(other.grad, one.grad, **bounds)


class Largest(TorchDispatchMode):
    """The largest number of elements of any tensor of logits."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.shape[-1:] == (VOCABULARY,) and tensor.shape != (WIDTH, VOCABULARY):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize(("chunk", "rows"), [(1, 1), (4 * VOCABULARY, 4), (5 * VOCABULARY - 1, 4), (10**6, ROWS)])
def test_no_more_logits_than_a_chunk(chunk: int, rows: int) -> None:
    hidden, target, weight, bias, _ = case()
    with Largest() as largest:
        linear_divergence(hidden.requires_grad_(), target, weight, bias, chunk=chunk).backward()
    assert largest.elements == rows * VOCABULARY


def test_only_the_model_gets_a_gradient() -> None:
    hidden, target, weight, bias, _ = (tensor.requires_grad_(tensor.is_floating_point()) for tensor in case())
    linear_divergence(hidden, target, weight, bias).backward()
    assert hidden.grad is not None
    assert (target.grad, weight.grad, bias.grad) == (None, None, None)
    assert not linear_divergence(hidden.detach(), target.detach(), weight.detach(), None).requires_grad


def test_a_second_backward_pass_is_refused() -> None:
    hidden, target, weight, _, _ = case()
    loss = linear_divergence(hidden.requires_grad_(), target, weight, None)
    loss.backward(retain_graph=True)
    with pytest.raises(ConfigError, match="one backward pass, got a second"):
        loss.backward()


def test_a_teacher_of_another_vocabulary() -> None:
    with pytest.raises(ModelError, match=r"expected a teacher with the model's vocabulary, logits \(3, 8\), got \(3, 9\)"):
        divergence(torch.zeros(3, 8), torch.zeros(3, 9))


@contextmanager
def nothing() -> Iterator[None]:
    yield


def scaled(model: nn.Module, factor: float, block: int = 1):  # type: ignore[no-untyped-def]
    """A teacher: the model with one matrix multiplied."""

    @contextmanager
    def teacher() -> Iterator[None]:
        weight = model.get_submodule(f"model.layers.{block}.mlp.gate_proj").weight
        before = weight.data
        weight.data = factor * before
        try:
            yield
        finally:
            weight.data = before

    return teacher


def batch(padded: bool = False) -> Batch:
    tokens = torch.randint(48, (2, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    return Batch(tokens, mask if padded else None)


def distance(model: nn.Module, given: Batch, teacher: Any, **options: Any) -> Tensor:
    """By hand, from whole forward passes."""
    mask = given.mask
    arguments = {"input_ids": given.tokens, "attention_mask": None if mask is None else mask.long(), "output_hidden_states": True}
    with torch.no_grad(), teacher():
        dense = model(**arguments)
    return by_hand.distance(model(**arguments), dense, None if mask is None else mask.flatten(), **options)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("chunkable", [True, False])
@pytest.mark.parametrize("padded", [False, True])
def test_errors_of_hidden_states_by_hand(padded: bool, chunkable: bool, checkpoint: bool) -> None:
    """Value and gradients, with a teacher whose every layer is another; also where blocks are run again in the backward pass."""
    model, given = tiny().train(), batch(padded)
    teacher = scaled(model, 3.0, block=0)
    expected = distance(model, given, teacher, layer_weight=0.5)
    assert expected > distance(model, given, teacher, layer_weight=0.0) + 0.1
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    runs: list[None] = []
    with checkpointing(model, checkpoint):
        loss = DistillationLoss(model, given.tokens[0], teacher, layer_weight=0.5, chunkable=chunkable)
        model.get_submodule("model.layers.0.mlp").register_forward_pre_hook(lambda *_: runs.append(None))
        found = loss(given)
        found.backward()
    assert len(runs) == 2 + checkpoint
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, p in model.named_parameters():
        if chunkable and name == "lm_head.weight":
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("layer_weight", [0.0, 0.5])
@pytest.mark.parametrize("chunkable", [True, False])
def test_hidden_states_are_asked_for_only_where_they_count(chunkable: bool, layer_weight: float) -> None:
    model, given = tiny(), batch()
    loss = DistillationLoss(model, given.tokens[0], scaled(model, 3.0), layer_weight=layer_weight, chunkable=chunkable)
    seen: list[Any] = []
    module = model.model if chunkable else model
    module.register_forward_pre_hook(lambda _, args, arguments: seen.append(arguments.get("output_hidden_states")), with_kwargs=True)
    found = loss(given)
    assert seen == 2 * [True if layer_weight else None]
    assert found.item() == pytest.approx(distance(model, given, scaled(model, 3.0), layer_weight=layer_weight).item(), rel=1e-5)


class Mute(nn.Module):
    """Tells of its hidden states nothing, or no more than the embeddings."""

    def __init__(self, states: Any) -> None:
        super().__init__()
        self.table, self.states = nn.Embedding(48, 48), states

    def forward(self, input_ids: Tensor, use_cache: bool, output_hidden_states: bool = False) -> Any:
        return SimpleNamespace(logits=self.table(input_ids), hidden_states=self.states)


class Deaf(Mute):
    """Cannot even be asked for them, as the code of some models on the Hub."""

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:  # type: ignore[override]
        return super().forward(input_ids, use_cache)


def test_a_model_that_cannot_be_asked_for_hidden_states() -> None:
    model, given = Deaf(None), batch()
    with pytest.raises(ModelError, match=r"hidden states of every decoder block, got none from Deaf\. Use --layer-weight 0\."):
        DistillationLoss(model, given.tokens[0], nothing)
    assert DistillationLoss(model, given.tokens[0], nothing, layer_weight=0.0)(given).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("states", [None, (), (torch.ones(2, 9, 16),)], ids=["none", "empty", "embeddings"])
def test_a_model_that_tells_no_hidden_states(states: Any) -> None:
    model, given = Mute(states), batch()
    with pytest.raises(ModelError, match=r"hidden states of every decoder block, got none from Mute\. Use --layer-weight 0\.") as raised:
        DistillationLoss(model, given.tokens[0], nothing)(given)
    assert "\n" not in str(raised.value)
    assert DistillationLoss(model, given.tokens[0], nothing, layer_weight=0.0)(given).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("padded", [False, True])
def test_chunked_and_whole_logits_agree(padded: bool) -> None:
    model = tiny()
    given = batch(padded)
    gradients = []
    for chunkable in (True, False):
        loss = DistillationLoss(model, given.tokens[0], scaled(model, 3.0), chunkable=chunkable, chunk=100)
        assert loss.chunked == chunkable
        value = loss(given)
        value.backward()
        gradients.append((value.item(), model.get_parameter("model.layers.0.mlp.up_proj.weight").grad.clone()))
        model.zero_grad()
    (one, first), (other, second) = gradients
    assert one == pytest.approx(other, rel=1e-5)
    assert one > 1e-3
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-7)


def test_a_padded_position_teaches_nothing() -> None:
    model, given = tiny(), batch(padded=True)
    loss = DistillationLoss(model, given.tokens[0], scaled(model, 3.0))
    before = loss(given).item()
    given.tokens[1, 6:] = 7
    seen: list[Any] = []
    model.model.register_forward_pre_hook(lambda _, args, arguments: seen.append(arguments.get("attention_mask")), with_kwargs=True)
    assert loss(given).item() == pytest.approx(before, rel=1e-6)
    assert [mask.tolist() for mask in seen] == 2 * [given.mask.long().tolist()]  # neither model looks at it


def test_a_teacher_that_is_the_model_has_nothing_to_say() -> None:
    model, given = tiny(), batch()
    loss = DistillationLoss(model, given.tokens[0], nothing)(given)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    loss.backward()
    assert all(p.grad.abs().max() < 1e-5 for p in model.parameters() if p.grad is not None)


LLAMA_LIKE = {
    "vocab_size": 48, "hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["scaled", "soft-capped"])
@pytest.mark.parametrize("padded", [False, True])
def test_logits_that_are_more_than_a_head_are_compared_whole(kind: str, padded: bool) -> None:
    torch.manual_seed(0)
    if kind == "scaled":
        model: nn.Module = CohereForCausalLM(CohereConfig(**LLAMA_LIKE, logit_scale=0.5))
    else:
        model = Gemma2ForCausalLM(Gemma2Config(**LLAMA_LIKE, head_dim=4, num_key_value_heads=4, final_logit_softcapping=8.0))
    given = batch(padded)
    loss = DistillationLoss(model, given.tokens[0], scaled(model, 3.0))
    assert not loss.chunked
    expected = distance(model, given, scaled(model, 3.0))
    assert loss(given).item() == pytest.approx(expected.item(), rel=1e-4)
    assert expected > 1e-3


def with_dropout(kind: str) -> nn.Module:
    torch.manual_seed(0)
    common = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "OPT":
        return OPTForCausalLM(OPTConfig(**common, ffn_dim=28, word_embed_proj_dim=16, dropout=0.5, attention_dropout=0.5, init_std=0.3))
    settings = GPTNeoXConfig(**common, intermediate_size=28, hidden_dropout=0.5, attention_dropout=0.5, initializer_range=0.3)
    return GPTNeoXForCausalLM(settings)


@pytest.mark.parametrize(("kind", "chunkable"), [("OPT", False), ("GPTNeoX", False), ("GPTNeoX", True)])
def test_the_teacher_has_no_dropout(kind: str, chunkable: bool) -> None:
    """The student has, from the random state as it was; the mode of the model is put back."""
    model, given = with_dropout(kind), batch()
    loss = DistillationLoss(model, given.tokens[0], nothing, chunkable=chunkable)
    assert loss.chunked == chunkable
    model.eval()
    with torch.no_grad():
        dense = model(input_ids=given.tokens, output_hidden_states=True)
        model.train()
        torch.manual_seed(7)
        expected = by_hand.distance(model(input_ids=given.tokens, output_hidden_states=True), dense).item()
    torch.manual_seed(7)
    assert loss(given).item() == pytest.approx(expected, rel=1e-4)
    assert expected > 1e-3
    assert all(module.training for module in model.modules())
    model.eval()
    assert loss(given).item() == pytest.approx(0, abs=1e-6)
    assert not any(module.training for module in model.modules())


def test_the_mode_is_put_back_after_an_error() -> None:
    @contextmanager
    def broken() -> Iterator[None]:
        raise ZeroDivisionError
        yield

    model, given = with_dropout("OPT").train(), batch()
    with pytest.raises(ZeroDivisionError):
        DistillationLoss(model, given.tokens[0], broken)(given)
    assert all(module.training for module in model.modules())


def test_another_teachers_vocabulary_is_one_clear_error() -> None:
    """Through the loss: the teacher's context puts another head in place."""
    model, given = tiny(), batch()

    @contextmanager
    def other() -> Iterator[None]:
        before, model.lm_head = model.lm_head, nn.Linear(16, 50, bias=False)
        try:
            yield
        finally:
            model.lm_head = before

    with pytest.raises(ModelError, match=r"model's vocabulary, logits \(18, 48\), got \(18, 50\)\. Use a teacher") as raised:
        DistillationLoss(model, given.tokens[0], other, chunkable=False)(given)
    assert "\n" not in str(raised.value)
