"""`prox_24`: the proximal operator of the 2:4 regulariser."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import prox as reference
from ..sparsity import check_width
from .dispatch import check_floating, check_like, check_strength, choose_backend, flat
from .sharded import check_sharded_alike, check_shards, columns_of, is_dtensor, local, sharded_like

SMALLEST_LAM = 2.0**-126  # the least normal fp32: anything below acts as 0


def _compute(z: Tensor, lam: float, column_scale: Tensor | None, backend: str, out: Tensor) -> None:
    if backend == "reference":
        out.copy_(reference.prox_24(z, lam, column_scale=column_scale))
        return
    from ..kernels import launch, prox

    scale = None if column_scale is None else column_scale.float().contiguous()
    # A kernel reads and writes flat memory; views of another layout go through a copy.
    target = flat(out)
    prox.prox_24(flat(z), lam, scale, target, launch.prox(not z.is_cuda))
    if target is not out:
        out.copy_(target)


@torch.library.custom_op("proxsparse::prox_24", mutates_args=())
def _prox_24(z: Tensor, lam: float, column_scale: Tensor | None, backend: str) -> Tensor:
    out = torch.empty_like(z, memory_format=torch.contiguous_format)
    _compute(z, lam, column_scale, backend, out)
    return out


@_prox_24.register_fake
def _(z: Tensor, lam: float, column_scale: Tensor | None, backend: str) -> Tensor:
    return torch.empty_like(z, memory_format=torch.contiguous_format)


@torch.library.custom_op("proxsparse::prox_24_out", mutates_args=("out",))
def _prox_24_out(z: Tensor, lam: float, column_scale: Tensor | None, backend: str, out: Tensor) -> None:
    _compute(z, lam, column_scale, backend, out)


def prox_24(
    z: Tensor,
    lam: float,
    *,
    column_scale: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Proximal operator of the 2:4 regulariser, applied to every block of `z`; the exact global minimiser.

    argmin_w 1/2 ||w - z||^2 + lam * (|w1 w2 w3| + |w2 w3 w4| + |w3 w4 w1| + |w4 w1 w2|)

    With `column_scale` c the operator acts on c * z and the result is divided back: the same problem in the metric of c.

    Args:
        z: [..., in_features], in_features divisible by 4; fp32, fp16 or bf16, computed in fp32 (fp64 in fp64, reference only).
            May be empty or a non-contiguous view. Not differentiated through. Of a DTensor each rank's part is worked on.
        lam: strength >= 0, used as it is (not multiplied by the learning rate). 0 is the identity.
        column_scale: [in_features], >= 0; entries below 1e-20 (dead input features) are read as 1e-20.
        out: where to write, like `z`; may be `z` itself. For a DTensor it is sharded like it.
        backend: "triton" or "reference"; by default CUDA runs Triton and everything else plain torch.
    Returns: like `z` (contiguous), or `out`. Signs are kept, 0 <= |w| <= |z|, a dropped weight is +0.0, ties go to the lowest
        index and to the sparser point. A block that holds a NaN comes back all NaN; an infinity counts as the largest weight.
        Deterministic; in Triton the last bits of a block depend on its neighbours, who decide how long it is iterated with them, and
        some bf16 weights are the second nearest to the exact result (0.005 % at lam * rms = 0.005, 0.4 % at 0.1).
    Raises: TypeError: not a floating tensor. ShapeError: in_features not divisible by 4 (on any rank of a DTensor), or column_scale or
        out of another shape. ConfigError: lam negative or not finite, tensors on several devices, or sharded otherwise.
        BackendError: backend not available.
    Source: Liu et al. 2025 (arXiv 2502.00258), Algorithms 2 and 3, solved by Newton's method instead; docs/math.md.
    """
    check_floating("prox_24", "z", z)
    check_width("prox_24", z.shape)
    check_strength("prox_24", "lam", lam)
    if is_dtensor(z):
        check_shards("prox_24", "z", z)
        if out is not None:
            check_sharded_alike("prox_24", "out", out, z)
        scale, target = columns_of("prox_24", column_scale, z), None if out is None else local(out)
        part = prox_24(local(z), lam, column_scale=scale, out=target, backend=backend)
        return sharded_like(part, z) if out is None else out
    if column_scale is not None:
        check_floating("prox_24", "column_scale", column_scale)
        check_like("prox_24", "column_scale", column_scale, (z.shape[-1],), z.device)
    if out is not None:
        check_floating("prox_24", "out", out)
        check_like("prox_24", "out", out, z.shape, z.device)
        if out.dtype != z.dtype:
            raise TypeError(f"prox_24: expected out of dtype {z.dtype}, got {out.dtype}. Pass an out like z.")
    chosen = choose_backend("prox_24", z, backend)
    with torch.no_grad():
        if lam < SMALLEST_LAM:
            return z.clone(memory_format=torch.contiguous_format) if out is None else out.copy_(z)
        if out is None:
            result: Tensor = _prox_24(z.detach(), float(lam), column_scale, chosen)
            return result
        _prox_24_out(z.detach(), float(lam), column_scale, chosen, out)
        return out
