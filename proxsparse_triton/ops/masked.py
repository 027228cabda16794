"""`masked_weight_24`: pretrained weights under the mask of learned ones."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import masked as reference
from ..sparsity import check_width
from .dispatch import check_floating, check_like, choose_backend, flat
from .sharded import check_sharded_alike, check_shards, columns_of, is_dtensor, local, sharded_like


def _compute(w: Tensor, w0: Tensor, column_scale: Tensor | None, backend: str, out: Tensor) -> None:
    if backend == "reference":
        out.copy_(reference.masked_weight_24(w, w0, column_scale=column_scale))
        return
    from ..kernels import launch, masked

    scale = None if column_scale is None else column_scale.float().contiguous()
    target = flat(out)
    masked.masked_weight_24(flat(w), flat(w0), scale, target, launch.blockwise(not w.is_cuda))
    if target is not out:
        out.copy_(target)


@torch.library.custom_op("proxsparse::masked_weight_24", mutates_args=())
def _masked_weight_24(w: Tensor, w0: Tensor, column_scale: Tensor | None, backend: str) -> Tensor:
    out = torch.empty_like(w, memory_format=torch.contiguous_format)
    _compute(w, w0, column_scale, backend, out)
    return out


@_masked_weight_24.register_fake
def _(w: Tensor, w0: Tensor, column_scale: Tensor | None, backend: str) -> Tensor:
    return torch.empty_like(w, memory_format=torch.contiguous_format)


@torch.library.custom_op("proxsparse::masked_weight_24_out", mutates_args=("out",))
def _masked_weight_24_out(w: Tensor, w0: Tensor, column_scale: Tensor | None, backend: str, out: Tensor) -> None:
    _compute(w, w0, column_scale, backend, out)


def masked_weight_24(
    w: Tensor,
    w0: Tensor,
    *,
    column_scale: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The pretrained weights under the 2:4 mask of the learned ones: what a model computes with while its mask is learned.

    out_i = w0_i  if |c_i w_i| is among the two largest of its block, else 0

    That is `w0` under `mask_24(c * |w|)` in one pass, without scores or a mask in memory: 6 bytes a weight in bf16.

    Args:
        w: learned weights, [..., in_features], in_features divisible by 4; fp32, fp16 or bf16, compared in fp32 (fp64 in fp64, reference
            only). May be empty or a non-contiguous view. Not differentiated through, as nothing here is. Of a DTensor each rank's part is
            worked on; w0 and out are then sharded alike.
        w0: pretrained weights, like `w` (the dtype may differ).
        column_scale: c, [in_features], >= 0; entries below 1e-20 (dead input features) are read as 1e-20. Left out, all are 1.
        out: where to write, like `w`; may be `w` or `w0` itself.
        backend: see `prox_24`.
    Returns: like `w` (contiguous), or `out`. A kept weight is w0 bit for bit, or rounded to the nearest of w's dtype, a dropped one +0.0.
        Ties go to the lowest index, a NaN among the c w counts as -inf. Both backends give the same bits (but for those of a NaN in w0 that
        is converted).
    Raises: TypeError: not a floating tensor, out of another dtype than w. ShapeError: in_features not divisible by 4 (on any rank of a
        DTensor), or w0, column_scale or out of another shape. ConfigError: tensors on several devices, or sharded otherwise.
        BackendError: backend not available.
    """
    check_floating("masked_weight_24", "w", w)
    check_width("masked_weight_24", w.shape)
    check_floating("masked_weight_24", "w0", w0)
    if is_dtensor(w):
        check_shards("masked_weight_24", "w", w)
        check_sharded_alike("masked_weight_24", "w0", w0, w)
        if out is not None:
            check_sharded_alike("masked_weight_24", "out", out, w)
        scale, target = columns_of("masked_weight_24", column_scale, w), None if out is None else local(out)
        part = masked_weight_24(local(w), local(w0), column_scale=scale, out=target, backend=backend)
        return sharded_like(part, w) if out is None else out
    check_like("masked_weight_24", "w0", w0, w.shape, w.device)
    if column_scale is not None:
        check_floating("masked_weight_24", "column_scale", column_scale)
        check_like("masked_weight_24", "column_scale", column_scale, (w.shape[-1],), w.device)
        column_scale = column_scale.detach()
    if out is not None:
        check_floating("masked_weight_24", "out", out)
        check_like("masked_weight_24", "out", out, w.shape, w.device)
        if out.dtype != w.dtype:
            raise TypeError(f"masked_weight_24: expected out of dtype {w.dtype}, got {out.dtype}. Pass an out like w.")
    chosen = choose_backend("masked_weight_24", w, backend)
    with torch.no_grad():
        if out is None:
            result: Tensor = _masked_weight_24(w.detach(), w0.detach(), column_scale, chosen)
            return result
        _masked_weight_24_out(w.detach(), w0.detach(), column_scale, chosen, out)
        return out
