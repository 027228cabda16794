"""The relative errors of hidden states against plain autograd in fp64, and what they leave alone."""

from __future__ import annotations

import by_hand
import pytest
import torch
from torch import Tensor

from proxsparse_triton.errors import ConfigError
from proxsparse_triton.training.layer_errors import layer_errors, relative_error

WIDTH, ROWS = 16, 12


def case(dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = (ROWS,), *, seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, target and which positions are real; the targets' sizes are far apart, as those of tokens are."""
    generator = torch.Generator().manual_seed(seed)
    hidden, target = (torch.randn(*shape, WIDTH, generator=generator) for _ in range(2))
    size = 10 ** torch.linspace(-2, 2, ROWS).view(*shape, 1)
    return (size * (target + 0.3 * hidden)).to(dtype), (size * target).to(dtype), torch.rand(ROWS, generator=generator) < 0.7


@pytest.mark.parametrize("shape", [(ROWS,), (3, ROWS // 3)])
@pytest.mark.parametrize("padded", [False, True])
def test_value_and_gradient(shape: tuple[int, ...], padded: bool) -> None:
    hidden, target, real = case(shape=shape)
    mask = real if padded else None
    one, other = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    expected = by_hand.layer_errors([one], [target], mask)
    expected.backward()
    found = relative_error(other, target, mask)
    (3 * found).backward()
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    assert found > 0.01
    torch.testing.assert_close(other.grad, 3 * one.grad, rtol=1e-10, atol=0.0)
    assert padded == bool((other.grad == 0).all(-1).any())


@pytest.mark.parametrize("padded", [False, True])
def test_several_hidden_states_to_a_position(padded: bool) -> None:
    """As in Gemma 3n: the mean over all of them, of the real positions."""
    parts = [case(shape=(3, ROWS // 3), seed=seed) for seed in (3, 4)]
    real = parts[0][2] if padded else None
    found = relative_error(*(torch.stack([part[i] for part in parts]) for i in range(2)), real)
    expected = sum(by_hand.layer_errors([hidden], [target], real) for hidden, target, _ in parts) / 2
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)


def test_a_target_of_zero_does_not_count_but_is_one_of_the_mean() -> None:
    hidden, target, real = case()
    real[2] = True
    for mask in (None, real):
        some, others = hidden.clone().requires_grad_(), torch.arange(ROWS) != 2
        found = relative_error(some, target * others[:, None], mask)
        found.backward()
        kept = others if mask is None else others & mask
        expected = by_hand.layer_errors([hidden], [target], kept) * kept.sum() / (kept.sum() + 1)
        assert found.item() == pytest.approx(expected.item(), rel=1e-12)
        assert not some.grad[2].any()
        assert some.grad[kept].all()
    hidden.requires_grad_()
    for size in (0.0, 1e-160):  # whose square is subnormal
        nothing = relative_error(hidden, torch.full_like(target, size))
        nothing.backward()
        assert nothing.item() == 0
        assert not hidden.grad.any()


@pytest.mark.parametrize("padded", [False, True])
def test_bf16_is_summed_in_fp32(padded: bool) -> None:
    hidden, target, real = case(torch.bfloat16)
    mask = real if padded else None
    exact = hidden.double().requires_grad_()
    expected = by_hand.layer_errors([exact], [target], mask)
    expected.backward()
    found = relative_error(hidden.requires_grad_(), target, mask)
    found.backward()
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert hidden.grad.dtype == torch.bfloat16
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=2**-8, atol=0.0)


def test_only_the_model_gets_a_gradient() -> None:
    hidden, target, _ = case()
    relative_error(hidden.requires_grad_(), target.requires_grad_()).backward()
    assert hidden.grad is not None
    assert target.grad is None
    assert not relative_error(hidden.detach(), target.detach()).requires_grad


def test_nothing_is_written_to() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        given = case(dtype)
        before = [tensor.clone() for tensor in given]
        relative_error(given[0].clone().requires_grad_(), *given[1:]).backward()
        relative_error(*given)
        assert all(torch.equal(tensor, kept) for tensor, kept in zip(given, before, strict=True))


def test_a_second_backward_pass_is_refused() -> None:
    hidden, target, _ = case()
    loss = relative_error(hidden.requires_grad_(), target)
    loss.backward(retain_graph=True)
    with pytest.raises(ConfigError, match="relative_error: expected one backward pass, got a second") as raised:
        loss.backward()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("factor", [1e-6, 3.0, 1e6])
def test_it_does_not_depend_on_the_scale(factor: float) -> None:
    hidden, target, real = case()
    found = relative_error(factor * hidden, factor * target, real)
    assert found.item() == pytest.approx(relative_error(hidden, target, real).item(), rel=1e-12)


@pytest.mark.parametrize("padded", [False, True])
def test_layers_are_added_and_their_targets_let_go(padded: bool) -> None:
    cases = [case(shape=(3, ROWS // 3), seed=seed) for seed in range(3)]
    hidden, targets = [h.requires_grad_() for h, _, _ in cases], [target for _, target, _ in cases]
    mask = cases[0][2] if padded else None
    expected = by_hand.layer_errors(hidden, targets, mask)
    gradients = torch.autograd.grad(expected, hidden)
    found = layer_errors(hidden, targets, mask)
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    assert targets == []
    for h, gradient in zip(hidden, gradients, strict=True):
        torch.testing.assert_close(h.grad, gradient, rtol=1e-10, atol=0.0)
