"""`attach_prox`: any optimizer's step becomes a ProxSparse step; handle, closures, errors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from proxsparse_triton import ProxAdamW, accumulate_frozen_penalty, attach_prox, prox_24
from proxsparse_triton.errors import ConfigError, ShapeError
from proxsparse_triton.optim.attach import PRETRAINED
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


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("lambda2", [0.0, 0.5])
def test_closures(by_name: bool, lambda2: float) -> None:
    """As a backward pass before a step without one; the loss comes back as it was."""
    mine, theirs = parameters()[0], parameters()[0]
    optimizers = [torch.optim.SGD([p], lr=0.1, momentum=0.9) for p in (mine, theirs)]
    for optimizer, p in zip(optimizers, (mine, theirs), strict=True):
        attach_prox(optimizer, [p], 0.1, lambda2=lambda2)

    def closure() -> Tensor:
        optimizers[0].zero_grad()
        loss = (mine - 1).square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        optimizers[1].zero_grad()
        loss = (theirs - 1).square().sum()
        loss.backward()
        optimizers[1].step()
        result = optimizers[0].step(closure=closure) if by_name else optimizers[0].step(closure)
        assert result == loss
        assert torch.equal(mine, theirs)


def test_weights_without_a_gradient_are_left_alone() -> None:
    """Frozen ones, experts without a token: as every optimizer of torch does. W0 is taken when their first gradient comes."""
    first, second, _ = parameters()
    optimizer = torch.optim.AdamW([first, second], lr=0.01)
    attach_prox(optimizer, [first, second], 0.3, lambda2=0.1)
    before = second.detach().clone()
    first.grad = torch.ones_like(first)
    optimizer.step()
    assert torch.equal(second, before)
    assert set(optimizer.state) == {first}
    second.grad = torch.ones_like(second)
    optimizer.step()
    assert torch.equal(optimizer.state[second][PRETRAINED], before)
    assert not torch.equal(second, before)


# --- GradScaler ---------------------------------------------------------------------------------------------------------------------


def scaled_steps(make: Callable[..., torch.optim.Optimizer], fused: bool, scale: float | None, unscale: bool = False) -> Tensor:
    """The weight after two steps."""
    torch.manual_seed(0)
    linear = nn.Linear(16, 16, bias=False)
    optimizer = make(linear.parameters(), lr=1e-2, fused=fused)
    attach_prox(optimizer, [linear.weight], 0.1, lambda2=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    for _ in range(2):
        optimizer.zero_grad()
        scaler.scale(linear(torch.randn(8, 16)).square().mean()).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    return linear.weight.detach()


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_a_loss_scale_changes_nothing(make: Callable[..., torch.optim.Optimizer], fused: bool, unscale: bool) -> None:
    """Fused optimizers get scaled gradients, and so must they get the penalty's."""
    plain, scaled = scaled_steps(make, fused, None), scaled_steps(make, fused, 2.0**16, unscale)
    torch.testing.assert_close(scaled, plain, rtol=1e-6, atol=1e-7)
    assert (plain == 0).any()


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_moves_nothing(make: Callable[..., torch.optim.Optimizer], fused: bool) -> None:
    """GradScaler calls step() of a fused optimizer even then."""
    torch.manual_seed(0)
    linear = nn.Linear(16, 16, bias=False)
    before = linear.weight.detach().clone()
    optimizer = make(linear.parameters(), lr=1e-2, fused=fused)
    attach_prox(optimizer, [linear.weight], 0.1, lambda2=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(linear(torch.randn(8, 16)).square().mean() * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(linear.weight, before)


def test_fp16_gradients_that_are_not_unscaled_are_refused() -> None:
    linear = nn.Linear(16, 16, bias=False, dtype=torch.float16)
    optimizer = torch.optim.SGD(linear.parameters(), lr=1e-2, fused=True)
    attach_prox(optimizer, [("lm.weight", linear.weight)], 0.1, lambda2=1.0)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(linear.weight.square().sum()).backward()
    with pytest.raises(ConfigError, match=r"^attach_prox: expected fp32 or bf16 gradients .*, got fp16 of lm\.weight"):
        scaler.step(optimizer)


# --- wrapped optimizers -------------------------------------------------------------------------------------------------------------


class Lightning:
    """As Lightning wraps: what it does not have itself it takes from the optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


class Lookahead(torch.optim.Optimizer):
    """An optimizer around one, whose own step moves the weights too."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__([p for group in optimizer.param_groups for p in group["params"]], {})
        self.optimizer = optimizer

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.optimizer.step()
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(0.01)


@pytest.mark.parametrize("wrap", [Lightning, Lookahead])
def test_wrappers(wrap: Callable[[torch.optim.Optimizer], Any]) -> None:
    p = parameters()[0]
    optimizer = wrap(torch.optim.SGD([p], lr=0.0))
    attach_prox(optimizer, [p], 0.5)
    p.grad = torch.ones_like(p)
    before = p.detach() + (0.01 if wrap is Lookahead else 0)
    optimizer.step()
    assert torch.equal(p, prox_24(before, 0.5))


def test_accelerate() -> None:
    """Attached to the optimizer inside; steps that only accumulate are none."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    linear = nn.Linear(16, 16, bias=False)
    twin = copy.deepcopy(linear)
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    linear, optimizer = accelerator.prepare(linear, torch.optim.SGD(linear.parameters(), lr=0.1))
    attach_prox(optimizer, list(linear.named_parameters()), 0.3, lambda2=0.1)
    attach_prox(plain, [twin.weight], 0.3, lambda2=0.1)
    for step in range(4):
        x, before = torch.randn(4, 16), linear.weight.detach().clone()
        with accelerator.accumulate(linear):
            accelerator.backward(linear(x).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        (twin(x).square().mean() / 2).backward()
        if step % 2:
            plain.step()
            plain.zero_grad()
        else:
            assert torch.equal(linear.weight, before)
        assert torch.equal(linear.weight, twin.weight)
    assert (linear.weight == 0).any()


# --- errors -------------------------------------------------------------------------------------------------------------------------

P = parameters()
NORM = nn.Parameter(torch.zeros(8))
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
        lambda: attach_prox(torch.optim.SGD([NORM], lr=0.1), [("norm", NORM)], 1.0),
        ShapeError,
        "attach_prox: expected weights [..., in_features], got shape (8,) in norm. Pass the weights to prune: prunable_parameters(model)",
    ),
    (lambda: attach_prox(object(), P[:1], 1.0), TypeError, "attach_prox: expected an optimizer of torch or one with it as .optimizer"),
    (lambda: attach_prox(torch.optim.LBFGS(P[:1]), P[:1], 1.0, lambda2=1.0), ConfigError, "got L-BFGS. Add the penalty."),
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
