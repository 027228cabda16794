"""`frozen_penalty`: the frozen-weight regulariser (lambda2), value and closed-form gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import ConfigError
from ..reference import frozen_penalty as reference
from .dispatch import check_floating, check_like, check_partial, check_strength, choose_backend
from .sharded import all_sum, check_sharded_alike, is_dtensor, local


def _evaluate(w: Tensor, w0: Tensor, lam: float, frozen_eps: float, grad: Tensor | None, accumulate: bool, backend: str) -> Tensor:
    """Value; the gradient is written or added into `grad` in the same pass."""
    if backend == "reference":
        if grad is None:
            return reference.frozen_penalty_value(w, w0, lam, frozen_eps)
        if not accumulate:
            grad.zero_()
        return reference.accumulate_frozen_penalty(w, w0, lam, frozen_eps, grad)
    from ..kernels import frozen_penalty as kernel

    target = grad
    if grad is not None and not grad.is_contiguous():
        target = grad.contiguous()
    value = kernel.frozen_penalty(w.contiguous(), w0.contiguous(), lam, frozen_eps, target, accumulate)
    if grad is not None and target is not None and target is not grad:
        grad.copy_(target)
    return value


class _FrozenPenalty(torch.autograd.Function):
    """Saves references to w and w0 only: no activation of the weights' size lives between forward and backward."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, w0: Tensor, lam: float, frozen_eps: float, backend: str) -> Tensor:
        ctx.save_for_backward(w, w0)
        ctx.settings = (lam, frozen_eps, backend)
        return _evaluate(w.detach(), w0.detach(), lam, frozen_eps, None, False, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        w, w0 = ctx.saved_tensors
        lam, frozen_eps, backend = ctx.settings
        grad = torch.empty_like(w, memory_format=torch.contiguous_format)
        _evaluate(w.detach(), w0.detach(), lam, frozen_eps, grad, False, backend)
        return grad.mul_(grads[0]), None, None, None, None


class _Total(torch.autograd.Function):
    """The sum of every rank's value of its part of `w`. Each rank differentiates its own."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, w: Tensor) -> Tensor:
        return all_sum(value.detach().view(1), [w])[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return grads[0], None


def _check(function: str, w: Tensor, w0: Tensor, lam: float, frozen_eps: float) -> None:
    check_floating(function, "w", w)
    check_floating(function, "w0", w0)
    if is_dtensor(w):
        check_sharded_alike(function, "w0", w0, w)
    else:
        check_like(function, "w0", w0, w.shape, w.device)
    check_strength(function, "lam", lam)
    check_strength(function, "frozen_eps", frozen_eps, positive=True)


def frozen_penalty(w: Tensor, w0: Tensor, lam: float, frozen_eps: float, *, backend: str | None = None) -> Tensor:
    """The frozen-weight penalty: each weight is drawn to 0 or to its pretrained value.

    lam * || w / (w0 + eps sgn(w0)) * (w - w0) ||_F^2,  sgn(0) = +1

    Its gradient is 2 lam r a (2w - w0), with a = 1 / (w0 + eps sgn(w0)) and r = a w (w - w0).

    Args:
        w: current weights, any shape; fp32, fp16 or bf16, computed in fp32 (fp64 in the reference). May require grad. Of a DTensor each
            rank's part is worked on, and the value is that of the whole.
        w0: pretrained weights, like `w` (the dtype may differ); treated as constant.
        lam: lambda2 >= 0.
        frozen_eps: > 0, keeps the ratio finite where w0 is small.
        backend: see `prox_24`.
    Returns: scalar, fp32 (fp64 for fp64). Differentiable in `w`; the backward pass reads the weights again instead of keeping
        an autograd graph over them, so it can be taken once (no second derivative).
    Raises: TypeError, ShapeError (w0 of another shape), ConfigError, BackendError.
    Source: Liu et al. 2025 (arXiv 2502.00258), section 3.3; docs/math.md.
    """
    _check("frozen_penalty", w, w0, lam, frozen_eps)
    if is_dtensor(w):
        part: Any = w
        value = frozen_penalty(part.to_local(), local(w0), lam, frozen_eps, backend=backend)
        total: Tensor = _Total.apply(value, w.detach())  # type: ignore[no-untyped-call]
        return total
    result: Tensor = _FrozenPenalty.apply(w, w0, float(lam), float(frozen_eps), choose_backend("frozen_penalty", w, backend))  # type: ignore[no-untyped-call]
    return result


def accumulate_frozen_penalty(w: Tensor, w0: Tensor, lam: float, frozen_eps: float, grad: Tensor, *, backend: str | None = None) -> Tensor:
    """`frozen_penalty` for training loops: adds its gradient to `grad` in place and returns its value, in one read of the weights.

    Args: as `frozen_penalty`; grad: like `w` (the dtype may differ).
    Returns: scalar, fp32 (fp64 for fp64), without a graph.
    Raises: as `frozen_penalty`; ConfigError also where `grad` is missing.
    """
    _check("accumulate_frozen_penalty", w, w0, lam, frozen_eps)
    if grad is None:
        raise ConfigError("accumulate_frozen_penalty: expected a gradient to add to, got None. Run backward first or pass zeros.")
    check_floating("accumulate_frozen_penalty", "grad", grad)
    if is_dtensor(w):
        check_sharded_alike("accumulate_frozen_penalty", "grad", grad, w)
        value = accumulate_frozen_penalty(local(w), local(w0), lam, frozen_eps, local(grad), backend=backend)
        return all_sum(value.view(1), [w])[0]
    check_like("accumulate_frozen_penalty", "grad", grad, w.shape, w.device)
    with torch.no_grad():
        backend = choose_backend("accumulate_frozen_penalty", w, backend)
        return _evaluate(w.detach(), w0.detach(), float(lam), float(frozen_eps), grad, True, backend)


def gradient_square(
    w: Tensor,
    w0: Tensor | None,
    lam: float,
    frozen_eps: float,
    grad: Tensor,
    *,
    backend: str | None = None,
    partial: Tensor | None = None,
) -> Tensor:
    """Squared norm of a loss gradient plus the penalty's gradient, in one read: what clipping the total gradient needs.

    sum (grad + 2 lam r a (2w - w0))^2;  without `w0`: sum grad^2

    Args: as `accumulate_frozen_penalty`; `grad` is only read. partial: fp32 [`gradient_square_rows`, 1] in which the kernel leaves its
        sums, and that is returned: for a caller who adds up the sums of many tensors at once.
    Returns: fp64 scalar, without a graph, or `partial`.
    Raises: as `accumulate_frozen_penalty`.
    """
    function = "gradient_square"
    _check(function, w, w if w0 is None else w0, lam, frozen_eps)
    check_floating(function, "grad", grad)
    check_like(function, "grad", grad, w.shape, w.device)
    with torch.no_grad():
        w, w0 = w.detach(), None if w0 is None else w0.detach()
        if choose_backend(function, w, backend) == "reference":
            check_partial(function, partial, None, 1, w.device)
            return reference.gradient_square(w, w0, float(lam), float(frozen_eps), grad)
        from ..kernels import frozen_penalty as kernel

        check_partial(function, partial, kernel.gradient_square_rows(w), 1, w.device)
        w0 = None if w0 is None else w0.contiguous()
        sums = partial
        if sums is None:
            sums = torch.empty(kernel.gradient_square_rows(w), 1, dtype=torch.float32, device=w.device)
        kernel.gradient_square(w.contiguous(), w0, float(lam), float(frozen_eps), grad.contiguous(), sums)
        return sums.sum(dtype=torch.float64) if partial is None else partial


def gradient_square_rows(w: Tensor) -> int | None:
    """Rows of `partial` that `gradient_square` needs; None where the reference runs, which has no partial sums."""
    if choose_backend("gradient_square", w, None) == "reference":
        return None
    from ..kernels import frozen_penalty as kernel

    return kernel.gradient_square_rows(w)
