"""Gradients that wait for the backward pass, in dtypes that cannot hold them before a loss scale has reached them."""

from __future__ import annotations

from collections.abc import Callable

import by_hand
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from proxsparse_triton.training.distillation import divergence, linear_divergence
from proxsparse_triton.training.layer_errors import relative_error
from proxsparse_triton.training.loss import linear_cross_entropy

ROWS, WIDTH, VOCABULARY, SCALE = 256, 32, 4000, 2.0**16
Function = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator)
    target = hidden + 0.05 * torch.randn(ROWS, WIDTH, generator=generator)
    weight = 0.05 * torch.randn(VOCABULARY, WIDTH, generator=generator)
    return hidden.half(), target.half(), weight.half(), torch.randint(0, VOCABULARY, (ROWS,), generator=generator)


HIDDEN, TARGET, WEIGHT, TOKENS = case()
LOSSES: dict[str, tuple[Function, Function]] = {
    "cross-entropy": (
        lambda x, w, b: linear_cross_entropy(x, w, b, TOKENS),
        lambda x, w, b: F.cross_entropy(F.linear(x, w, b), TOKENS),
    ),
    "divergence": (
        lambda x, w, b: linear_divergence(x, TARGET, w, b),
        lambda x, w, b: divergence(F.linear(x, w, b), F.linear(TARGET.to(x.dtype), w, b)),
    ),
    "hidden states": (lambda x, w, b: relative_error(x, TARGET), lambda x, w, b: by_hand.layer_errors([x], [TARGET.to(x.dtype)])),
}


@pytest.mark.parametrize("name", LOSSES)
def test_fp16_under_a_loss_scale(name: str) -> None:
    """As exact as fp16 allows, against autograd in fp64: rounded once, after the scale."""
    ours, plain = LOSSES[name]
    learns = name == "cross-entropy"
    exact = [t.double().requires_grad_() for t in (HIDDEN, WEIGHT, torch.zeros(VOCABULARY))]
    plain(*exact).backward()
    found = [HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_(learns)]
    bias = torch.zeros(VOCABULARY, dtype=torch.float16, requires_grad=learns)
    (ours(*found, bias) * SCALE).backward()
    for some, right in zip([*found, bias], exact, strict=True):
        if some.requires_grad:
            assert some.grad is not None
            assert some.grad.dtype == torch.float16
            error = (some.grad.double() / SCALE - right.grad).norm() / right.grad.norm()
            assert error < 1e-3
