"""`prox_adamw_`: penalty gradient, AdamW, prox and rounding in one pass over the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from ..reference import prox_adamw as reference
from ..sparsity import check_width
from ..step import MOMENT_GROUP, AdamState, StepSettings
from .dispatch import check_floating, check_like, check_partial, choose_backend, flat

FUNCTION = "prox_adamw_"
STATISTICS = 4
MOMENT_PAIRS = ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.int8, torch.uint8))


def prox_adamw_(
    w: Tensor,
    grad: Tensor,
    state: AdamState,
    settings: StepSettings,
    *,
    w0: Tensor | None = None,
    column_scale: Tensor | None = None,
    grad_coef: Tensor | None = None,
    backend: str | None = None,
    partial: Tensor | None = None,
) -> Tensor:
    """One AdamW step with the frozen penalty's gradient and the 2:4 prox, in place; every tensor is read and written once.

    p = 2 lambda2 r a (2w - w0),  a = 1 / (w0 + frozen_eps sgn(w0)),  r = a w (w - w0)       (with `w0` only)
    g = coef (grad + p), or coef grad + p without `clip_total`
    m <- beta1 m + (1 - beta1) g;   v <- beta2 v + (1 - beta2) g^2
    w <- prox_lambda1(w (1 - lr weight_decay) - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)),  in the metric of `column_scale`

    Args:
        w: [..., in_features], in_features divisible by 4; fp32 or bf16, computed in fp32 (fp64 in fp64, reference only). May be empty or a
            non-contiguous view.
        grad: like `w` (or fp32); only read.
        state: moments and residual of `w`, contiguous, updated in place. The weight a step starts from is `w` with its residual's bits.
        settings: the scalars, and how bf16 and 8-bit storage is rounded.
        w0: pretrained weights, like `w` (the dtype may differ), or None.
        column_scale: [in_features], see `prox_24`.
        grad_coef: scalar tensor on w's device, or None for 1. Where it is not finite nothing is written but the statistics.
        backend: see `prox_24`.
        partial: fp32 [`prox_adamw_rows`, 4] that takes the kernel's sums and is returned: for who steps many tensors and adds up once.
    Returns: fp64 [4] on w's device, without a host sync: penalty value at the old weight · squared norm of grad + p (of grad without
        `clip_total`), before `grad_coef` · number of blocks of the new w that were stepped and are 2:4 · number of blocks that keep w
        and its state since their gradient, or its square in fp32, is not finite.
    Raises: TypeError: dtypes that do not fit together, a sparse gradient. ShapeError: in_features not divisible by 4, a tensor of another
        shape. ConfigError: tensors on several devices, state that is not contiguous or not whole. BackendError: backend not available.
    Source: Liu et al. 2025 (arXiv 2502.00258), Algorithm 1; docs/math.md.
    """
    _check(w, grad, state, w0, column_scale, grad_coef)
    chosen = choose_backend(FUNCTION, w, backend)
    check_partial(FUNCTION, partial, None if chosen == "reference" else _rows(w, state), STATISTICS, w.device)
    if w.numel() == 0:
        return torch.zeros(STATISTICS, dtype=torch.float64, device=w.device) if partial is None else partial
    with torch.no_grad():
        w, grad = w.detach(), grad.detach()
        if chosen == "reference":
            return reference.prox_adamw(w, grad, state, settings, w0, column_scale, grad_coef)
        from ..kernels import prox_adamw as kernel

        # A kernel reads and writes flat memory; views of another layout go through a copy.
        target = flat(w)
        w0 = None if w0 is None else flat(w0.detach())
        scale = None if column_scale is None else column_scale.float().contiguous()
        sums = torch.empty(_rows(w, state), STATISTICS, dtype=torch.float32, device=w.device) if partial is None else partial
        kernel.prox_adamw(target, flat(grad), state, settings, w0, scale, grad_coef, sums)
        if target is not w:
            w.copy_(target)
        return sums.sum(0, dtype=torch.float64) if partial is None else partial


def prox_adamw_rows(w: Tensor, eight_bit: bool) -> int | None:
    """Rows of `partial` that `prox_adamw_` needs, with 8-bit moments or others; None where the reference runs, which has none."""
    if choose_backend(FUNCTION, w, None) == "reference":
        return None
    from ..kernels import prox_adamw as kernel

    return kernel.partial_rows(w, eight_bit)


def _rows(w: Tensor, state: AdamState) -> int:
    from ..kernels import prox_adamw as kernel

    return kernel.partial_rows(w, state.exp_avg_scale is not None)


def _check(w: Tensor, grad: Tensor, state: AdamState, w0: Tensor | None, column_scale: Tensor | None, grad_coef: Tensor | None) -> None:
    check_floating(FUNCTION, "w", w)
    if w.dtype == torch.float16:
        raise TypeError(f"{FUNCTION}: expected float32, bfloat16 or float64 for w, got {w.dtype}. Convert the weights to bfloat16.")
    check_width(FUNCTION, w.shape)
    if grad is None:
        raise ConfigError(f"{FUNCTION}: expected a gradient, got None. Run backward first.")
    check_floating(FUNCTION, "grad", grad)
    if grad.layout != torch.strided:
        raise TypeError(f"{FUNCTION}: expected a dense gradient, got {grad.layout}. Use embeddings with sparse=False.")
    if grad.dtype not in (w.dtype, torch.float32):
        rule = f"{w.dtype} like w" if w.dtype == torch.float32 else f"{w.dtype} like w, or torch.float32"
        raise TypeError(f"{FUNCTION}: expected grad of dtype {rule}, got {grad.dtype}. Convert it first.")
    check_like(FUNCTION, "grad", grad, w.shape, w.device)
    _check_state(w, state)
    if w0 is not None:
        check_floating(FUNCTION, "w0", w0)
        check_like(FUNCTION, "w0", w0, w.shape, w.device)
    if column_scale is not None:
        check_floating(FUNCTION, "column_scale", column_scale)
        check_like(FUNCTION, "column_scale", column_scale, (w.shape[-1],), w.device)
    if grad_coef is not None:
        check_floating(FUNCTION, "grad_coef", grad_coef)
        check_like(FUNCTION, "grad_coef", grad_coef, (), w.device)


def _check_state(w: Tensor, state: AdamState) -> None:
    pair = (state.exp_avg.dtype, state.exp_avg_sq.dtype)
    allowed = ((torch.float64, torch.float64),) if w.dtype == torch.float64 else MOMENT_PAIRS
    if pair not in allowed:
        rule = " or ".join(f"({first}, {second})" for first, second in allowed)
        raise TypeError(f"{FUNCTION}: expected moments {rule} for w of dtype {w.dtype}, got {pair}. Rebuild the state.")
    tensors = {"exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
    if state.residual is not None:
        if w.dtype != torch.bfloat16 or state.residual.dtype not in (torch.int8, torch.int16):
            raise TypeError(
                f"{FUNCTION}: expected an int8 or int16 residual beside bfloat16 weights, got {state.residual.dtype} "
                f"beside {w.dtype}. Rebuild the state."
            )
        tensors["residual"] = state.residual
    for name, value in tensors.items():
        check_like(FUNCTION, name, value, w.shape, w.device)
    scales = {"exp_avg_scale": state.exp_avg_scale, "exp_avg_sq_scale": state.exp_avg_sq_scale}
    for name, scale in scales.items():
        if (scale is not None) != (pair[0] == torch.int8):
            rule = f"{name} beside 8-bit moments only"
            raise ConfigError(f"{FUNCTION}: expected {rule}, got {scale is not None} beside {pair[0]}. Rebuild the state.")
        if scale is not None:
            if scale.dtype != torch.float32:
                raise TypeError(f"{FUNCTION}: expected {name} of dtype torch.float32, got {scale.dtype}. Rebuild the state.")
            check_like(FUNCTION, name, scale, (-(-w.numel() // MOMENT_GROUP),), w.device)
            tensors[name] = scale
    for name, value in tensors.items():
        if not value.is_contiguous():
            raise ConfigError(f"{FUNCTION}: expected a contiguous {name}, got strides {value.stride()}. Rebuild the state.")
