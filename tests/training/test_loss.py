"""The loss in chunks against the plain one, and when a model may be taken apart for it."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from proxsparse_triton.errors import ConfigError
from proxsparse_triton.training.batches import Batch, batches
from proxsparse_triton.training.loss import CHUNK, IGNORED, NextTokenLoss, linear_cross_entropy, separable_head

VOCABULARY, WIDTH = 40, 16


def build(kind: str = "Llama", **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        **{
            "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **settings,
        }
    )  # fmt: skip
    model: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    return model


@pytest.fixture(scope="module")
def model(device: str) -> nn.Module:
    return build().to(device)


def windows(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in lengths]


def case(rows: int, dtype: torch.dtype, device: str, *, bias: bool) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(rows, WIDTH), (VOCABULARY, WIDTH), *([(VOCABULARY,)] if bias else [])]
    tensors = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    targets = torch.randint(VOCABULARY, (rows,), generator=generator)
    targets[rows // 3] = IGNORED
    return [*tensors, *([] if bias else [None])], targets.to(device)  # type: ignore[list-item]


def gradients(tensors: list[Tensor]) -> list[Tensor]:
    found = [t.grad for t in tensors if t is not None and t.grad is not None]
    for t in tensors:
        if t is not None:
            t.grad = None
    return found


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 5 * VOCABULARY, 7 * VOCABULARY - 1, CHUNK])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_the_plain_loss(dtype: torch.dtype, chunk: int, bias: bool, device: str) -> None:
    """Loss and every gradient, times two; 13 rows: the last chunk is smaller."""
    tensors, targets = case(13, dtype, device, bias=bias)
    loss = linear_cross_entropy(*tensors, targets, chunk=chunk)
    (2 * loss).backward()
    found = gradients(tensors)
    logits = F.linear(*tensors)
    expected = F.cross_entropy(logits if dtype == torch.float64 else logits.float(), targets, ignore_index=IGNORED)
    (2 * expected).backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rtol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}[dtype]
    torch.testing.assert_close(loss, expected, rtol=rtol, atol=0)
    # bf16: the gradient of a weight is rounded once a chunk, here up to 13 times
    atol = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2 if chunk < CHUNK else 2e-3}[dtype]
    for one, other in zip(found, gradients(tensors), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=rtol if dtype != torch.bfloat16 else 2**-8, atol=atol)


def test_only_one_backward_pass() -> None:
    tensors, targets = case(6, torch.float32, "cpu", bias=True)
    loss = linear_cross_entropy(*tensors, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(ConfigError, match="linear_cross_entropy: expected one backward pass, got a second"):
        loss.backward()


def test_frozen_parts_get_no_gradient(device: str) -> None:
    (hidden, weight, _), targets = case(6, torch.float32, device, bias=False)
    weight.requires_grad_(False)
    linear_cross_entropy(hidden, weight, None, targets).backward()
    assert weight.grad is None
    assert hidden.grad is not None
    assert hidden.grad[6 // 3].abs().max() == 0  # nothing to predict there


def test_nothing_to_predict_is_nan(device: str) -> None:
    tensors, targets = case(4, torch.float32, device, bias=False)
    targets = torch.full_like(targets, IGNORED)
    assert linear_cross_entropy(*tensors, targets).isnan() == F.cross_entropy(F.linear(*tensors), targets).isnan()


class Largest(TorchDispatchMode):
    """The largest number of elements of any tensor whose last dimension is the vocabulary."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.shape[-1:] == (VOCABULARY,) and tensor.shape != (WIDTH, VOCABULARY):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize(("chunk", "rows"), [(10 * VOCABULARY, 10), (200 * VOCABULARY, 128), (CHUNK, 300)])
def test_no_more_logits_than_a_chunk(chunk: int, rows: int) -> None:
    """Many rows a chunk: a whole number of tiles of a matrix product."""
    tensors, targets = case(300, torch.float32, "cpu", bias=False)
    with Largest() as largest:
        linear_cross_entropy(*tensors, targets, chunk=chunk).backward()
    assert largest.elements == rows * VOCABULARY


def test_the_gradient_is_not_copied(device: str) -> None:
    """Autograd keeps the tensor that the forward pass made: of a large vocabulary a copy is gigabytes."""
    (hidden, weight, _), targets = case(6, torch.float32, device, bias=False)
    loss = linear_cross_entropy(hidden, weight, None, targets)
    made: Any = loss.grad_fn
    addresses = [gradient.data_ptr() for gradient in made.gradients if gradient is not None]
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert [hidden.grad.data_ptr(), weight.grad.data_ptr()] == addresses


@pytest.mark.parametrize("chunk", [3 * VOCABULARY, CHUNK])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_loss_is_that_of_the_model(device: str, count: int, chunk: int, tied: bool) -> None:
    model = build(tie_word_embeddings=tied).to(device)
    (batch,) = batches(windows(*[9] * count), count)
    tokens = batch.tokens.to(device)
    loss_of = NextTokenLoss(model, tokens[0], chunk=chunk)
    assert loss_of.chunked
    loss = loss_of(Batch(tokens, None))
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected: Any = model(input_ids=tokens, labels=tokens).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert len(found) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunked", [False, True])
def test_padding_is_ignored(model: nn.Module, device: str, chunked: bool) -> None:
    """Mean over all real positions of both windows; what stands in the padding does not matter."""
    given = windows(4, 9)
    (batch,) = batches(given, 2)
    batch = batch.to(torch.device(device))
    loss_of = NextTokenLoss(model, given[1].to(device))
    if not chunked:
        loss_of._parts = None
    loss = loss_of(batch)
    single = [loss_of(Batch(window[None].to(device), None)) for window in given]
    torch.testing.assert_close(loss, (3 * single[0] + 8 * single[1]) / 11, rtol=1e-5, atol=0)
    assert batch.mask is not None
    other = Batch(batch.tokens.masked_fill(~batch.mask, 17), batch.mask)
    torch.testing.assert_close(loss_of(other), loss, rtol=1e-6, atol=0)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    model.zero_grad()


def test_loss_is_fp32_for_a_bf16_model(device: str) -> None:
    half = build().to(device, torch.bfloat16)
    tokens = windows(9)[0].to(device)
    assert NextTokenLoss(half, tokens)(Batch(tokens[None], None)).dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "settings", "separable"),
    [
        ("Llama", {}, True),
        ("Mistral", {}, True),
        ("Qwen2", {}, True),
        ("Gemma2", {"head_dim": 4}, False),  # soft-capped logits
        ("Cohere", {}, False),  # scaled logits
        ("Granite", {"logits_scaling": 1.0}, False),  # divided by one: still another tensor
    ],
)
def test_families(kind: str, settings: dict[str, Any], separable: bool) -> None:
    """And whatever it is, the loss is the model's own."""
    model = build(kind, **settings)
    tokens = windows(9)[0]
    loss_of = NextTokenLoss(model, tokens, chunk=2 * VOCABULARY)
    assert loss_of.chunked == separable
    expected: Any = model(input_ids=tokens[None], labels=tokens[None]).loss
    torch.testing.assert_close(loss_of(Batch(tokens[None], None)), expected, rtol=1e-6, atol=0)


class Toy(nn.Module):
    """A causal language model reduced to what the proof looks at; `variant` spoils one thing."""

    def __init__(self, variant: str = "") -> None:
        super().__init__()
        self.variant = variant
        self.base_model: nn.Module = ToyBase()
        self.head: nn.Module = nn.Linear(WIDTH, VOCABULARY)

    def get_output_embeddings(self) -> nn.Module:
        return nn.Identity() if self.variant == "no linear" else self.head

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        tokens = input_ids.clone() if self.variant == "other tokens" else input_ids
        hidden = self.base_model(tokens, use_cache=use_cache).last_hidden_state
        if self.variant == "hidden written to":
            hidden.mul_(2)
        if self.variant == "part of the hidden state":
            hidden = hidden[:, 1:]
        if self.variant == "other hidden state":
            hidden = hidden + 0
        logits = self.head(hidden)
        if self.variant == "logits written to":
            logits.div_(2)
        return SimpleNamespace(logits=logits.double() if self.variant == "cast" else logits)


class ToyBase(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(last_hidden_state=self.table(input_ids))


def test_what_is_no_proof() -> None:
    tokens = windows(5)[0][None]
    model = Toy()
    assert separable_head(model, tokens) == (model.base_model, model.head)
    for variant in (
        "no linear", "other tokens", "hidden written to", "part of the hidden state", "other hidden state", "logits written to", "cast",
    ):  # fmt: skip
        assert separable_head(Toy(variant), tokens) is None, variant
    assert separable_head(nn.Linear(4, 4), tokens) is None


def test_the_proof_needs_no_values_and_leaves_no_trace() -> None:
    model = build().train()
    model.get_parameter("lm_head.weight").data.fill_(math.nan)
    assert NextTokenLoss(model, windows(5)[0]).chunked
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    with torch.device("meta"):
        assert separable_head(Toy(), torch.zeros(1, 4, dtype=torch.int64)) is not None
        assert separable_head(Toy("logits written to"), torch.zeros(1, 4, dtype=torch.int64)) is None
