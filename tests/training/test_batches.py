from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from proxsparse_triton.training.batches import Batch, batches, cross_entropy


@pytest.fixture(scope="module")
def model(device: str) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=28, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(config).eval().to(device)


def windows(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 40, (length,), generator=generator) for length in lengths]


def test_equal_windows_need_no_mask() -> None:
    given = windows(5, 5, 5)
    first, second = batches(given, 2)
    assert torch.equal(first.tokens, torch.stack(given[:2]))
    assert torch.equal(second.tokens, given[2][None])  # the last one may be smaller
    assert first.mask is None
    assert second.mask is None


def test_unequal_windows_are_padded_on_the_right() -> None:
    given = windows(3, 5, 4, 4)
    first, second = batches(given, 2)
    assert first.tokens.tolist() == [[*given[0].tolist(), 0, 0], given[1].tolist()]
    assert first.mask is not None
    assert first.mask.tolist() == [[True, True, True, False, False], [True] * 5]
    assert second.mask is None
    assert first.tokens.dtype == torch.int64


def test_to_moves_tokens_and_mask(device: str) -> None:
    (batch,) = batches(windows(3, 5), 2)
    moved = batch.to(torch.device(device))
    assert moved.mask is not None
    assert moved.tokens.device.type == moved.mask.device.type == device


@pytest.mark.parametrize("count", [1, 3])
def test_loss_is_that_of_the_model(model: nn.Module, device: str, count: int) -> None:
    (batch,) = batches(windows(*[9] * count), count)
    tokens = batch.tokens.to(device)
    torch.testing.assert_close(cross_entropy(model, Batch(tokens, None)), model(input_ids=tokens, labels=tokens).loss, rtol=1e-6, atol=0)


def test_padding_is_ignored(model: nn.Module, device: str) -> None:
    """Mean over all real positions of both windows; what stands in the padding does not matter."""
    given = windows(4, 9)
    (batch,) = batches(given, 2)
    batch = batch.to(torch.device(device))
    loss = cross_entropy(model, batch)
    single = [cross_entropy(model, Batch(window[None].to(device), None)) for window in given]
    torch.testing.assert_close(loss, (3 * single[0] + 8 * single[1]) / 11, rtol=1e-5, atol=0)
    assert batch.mask is not None
    other = Batch(batch.tokens.masked_fill(~batch.mask, 17), batch.mask)
    torch.testing.assert_close(cross_entropy(model, other), loss, rtol=1e-6, atol=0)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    model.zero_grad()


def test_loss_is_fp32_for_a_bf16_model(model: nn.Module, device: str) -> None:
    half = LlamaForCausalLM(model.config).to(device, torch.bfloat16)  # type: ignore[arg-type]
    assert cross_entropy(half, Batch(windows(9)[0][None].to(device), None)).dtype == torch.float32
