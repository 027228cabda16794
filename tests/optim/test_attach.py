"""`attach_prox`: any optimizer's step becomes a ProxSparse step; handle, closures, errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from proxsparse_triton import ProxAdamW, accumulate_frozen_penalty, attach_prox, prox_24
from proxsparse_triton.errors import ConfigError, ShapeError
from proxsparse_triton.sparsity import count_24_blocks


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((6, 8), (3, 16), (5,))]


def set_gradients(ps: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step + 1)
    for p in ps:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


@pytest.mark.parametrize("make", [lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9), lambda ps: torch.optim.Adafactor(ps, lr=0.01)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lambda2", [0.0, 0.2])
def test_it_is_penalty_step_and_prox(make: Callable[[object], torch.optim.Optimizer], dtype: torch.dtype, lambda2: float) -> None:
    mine, theirs = parameters(dtype), parameters(dtype)
    optimizer, plain = make(mine), make(theirs)
    handle = attach_prox(optimizer, mine[:2], 0.1, lambda2=lambda2)
    pretrained = [p.detach().clone() for p in theirs]
    for step in range(5):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        for p, w0 in list(zip(theirs, pretrained, strict=True))[:2]:
            accumulate_frozen_penalty(p, w0, lambda2, 0.1, p.grad)
        plain.step()
        for p in theirs[:2]:
            prox_24(p.data, 0.1, out=p.data)
        optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(mine, theirs, strict=True))
    blocks = sum(p.numel() // 4 for p in mine[:2])
    assert handle.share_24() == sum(count_24_blocks(p.detach()) for p in mine[:2]) / blocks > 0


def test_with_adamw_it_is_prox_adamw() -> None:
    mine, theirs = parameters(), parameters()
    scale = torch.linspace(0.5, 2, 8)
    optimizer = torch.optim.AdamW(mine[:1], lr=0.01, weight_decay=0.0)
    attach_prox(optimizer, mine[:1], 0.1, lambda2=0.2, column_scale=scale)
    fused = ProxAdamW([{"params": theirs[:1], "column_scale": scale}], lr=0.01, lambda1=0.1, lambda2=0.2)
    for step in range(5):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        optimizer.step()
        fused.step()
        torch.testing.assert_close(mine[0], theirs[0], rtol=1e-5, atol=1e-6)


def test_w0_is_taken_at_the_first_step() -> None:
    p = parameters()[0]
    optimizer = torch.optim.SGD([p], lr=1.0)
    attach_prox(optimizer, [p], 0.0, lambda2=1.0)
    p.data.add_(1)
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(p, before)  # at w = w0 the penalty is flat


def test_removed_it_is_the_plain_optimizer() -> None:
    p = parameters()[0]
    optimizer = torch.optim.SGD([p], lr=0.0)
    handle = attach_prox(optimizer, [p], 0.5, lambda2=0.5)
    handle.remove()
    before = p.detach().clone()
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(p, before)
    assert torch.equal(p.grad, torch.ones_like(p))
    assert handle.share_24() == 0


def test_several_scales() -> None:
    ps = parameters()
    optimizer = torch.optim.SGD(ps, lr=0.0)
    scales = [torch.linspace(0.5, 2, p.shape[-1]) for p in ps[:2]]
    for p, scale in zip(ps, scales, strict=False):
        attach_prox(optimizer, [p], 0.5, column_scale=scale)
    expected = [prox_24(p.detach(), 0.5, column_scale=scale) for p, scale in zip(ps, scales, strict=False)]
    set_gradients(ps, 0)
    optimizer.step()
    assert all(torch.equal(p, e) for p, e in zip(ps, expected, strict=False))


def test_closures() -> None:
    """Fine for the prox alone; the penalty's gradient would come too early."""
    p = parameters()[0]
    optimizer = torch.optim.SGD([p], lr=0.0)

    def closure() -> Tensor:
        p.grad = torch.ones_like(p)
        return torch.ones(())

    expected = prox_24(p.detach(), 0.5)
    handle = attach_prox(optimizer, [p], 0.5)
    optimizer.step(closure)
    assert torch.equal(p, expected)
    handle.remove()
    attach_prox(optimizer, [p], 0.5, lambda2=0.5)
    for step in (lambda: optimizer.step(closure), lambda: optimizer.step(closure=closure)):
        with pytest.raises(ConfigError, match=r"^attach_prox: expected step\(\) without a closure for lambda2 > 0, got one\."):
            step()


P = parameters()
SGD = torch.optim.SGD([*P, nn.Parameter(torch.zeros(3, 6))], lr=0.1)
ERRORS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: attach_prox(SGD, P[:1], -1.0), ConfigError, "attach_prox: expected a finite lambda1 >= 0, got -1.0"),
    (lambda: attach_prox(SGD, P[:1], 1.0, lambda2=float("nan")), ConfigError, "attach_prox: expected a finite lambda2 >= 0, got nan"),
    (lambda: attach_prox(SGD, P[:1], 1.0, frozen_eps=0.0), ConfigError, "attach_prox: expected a finite frozen_eps > 0, got 0.0"),
    (lambda: attach_prox(SGD, P[0], 1.0), TypeError, "attach_prox: expected a list of weights, got one tensor. Pass [weight]."),
    (lambda: attach_prox(SGD, [], 1.0), ConfigError, "attach_prox: expected at least one weight, got none"),
    (lambda: attach_prox(SGD, ["w"], 1.0), TypeError, "attach_prox: expected a tensor for parameter 0, got str"),
    (lambda: attach_prox(SGD, [("new", torch.zeros(4, 4))], 1.0), ConfigError, "expected weights of this optimizer, got new that is none"),
    (
        lambda: attach_prox(SGD, [("odd", SGD.param_groups[0]["params"][3])], 1.0),
        ShapeError,
        "attach_prox: odd: expected the last dimension divisible by 4, got shape (3, 6)",
    ),
    (
        lambda: attach_prox(SGD, [("first", P[0])], 1.0, column_scale=torch.ones(4)),
        ShapeError,
        "attach_prox: expected column_scale of shape (8,) for first, got (4,). Attach once for each scale.",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), ERRORS, ids=[message[:60] for _, _, message in ERRORS])
def test_errors(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not SGD._optimizer_step_post_hooks
