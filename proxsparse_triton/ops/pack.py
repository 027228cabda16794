"""`pack_24` and `unpack_24`: a pruned weight as its kept weights and their positions, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ShapeError
from ..reference import pack as reference
from ..reference.metadata import row_words
from ..sparsity import BLOCK, KEPT, check_mask, check_width, kept_per_block
from .dispatch import check_floating, check_like, choose_backend


def _check_blocks(w: Tensor, mask: Tensor | None) -> None:
    """ShapeError unless every block keeps two by the mask, or without one has at most two non-zeros."""
    if mask is not None:
        check_mask("pack_24", "w", mask)
        return
    kept = kept_per_block(w)
    wrong = (kept > KEPT).nonzero()
    if len(wrong):
        at = tuple(wrong[0].tolist())
        raise ShapeError(
            f"pack_24: expected at most {KEPT} non-zeros of every {BLOCK} weights, got {int(kept[at])} in block {at} "
            f"({len(wrong)} blocks have more). Prune w first, or pass the mask to pack with."
        )


def _room(w: Tensor) -> tuple[Tensor, Tensor]:
    rows, in_features = w.shape
    values = torch.empty((rows, in_features // BLOCK * KEPT), dtype=w.dtype, device=w.device)
    return values, torch.empty((rows, row_words(in_features)), dtype=torch.int16, device=w.device)


@torch.library.custom_op("proxsparse::pack_24", mutates_args=())
def _pack_24(w: Tensor, mask: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        _check_blocks(w, mask)
        return reference.pack_24(w, mask)
    from ..kernels import launch, pack

    values, metadata = _room(w)
    wrong = pack.pack_24(w.contiguous(), None if mask is None else mask.contiguous(), values, metadata, launch.blockwise(not w.is_cuda))
    if wrong:  # waits for the device
        _check_blocks(w, mask)
    return values, metadata


@_pack_24.register_fake
def _(w: Tensor, mask: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    return _room(w)


@torch.library.custom_op("proxsparse::unpack_24", mutates_args=())
def _unpack_24(values: Tensor, metadata: Tensor, backend: str) -> Tensor:
    if backend == "reference":
        return reference.unpack_24(values, metadata)
    from ..kernels import launch, pack

    w = _unpacked(values)
    pack.unpack_24(values.contiguous(), metadata.contiguous(), w, launch.blockwise(not w.is_cuda))
    return w


def _unpacked(values: Tensor) -> Tensor:
    rows, kept = values.shape
    return torch.empty((rows, kept // KEPT * BLOCK), dtype=values.dtype, device=values.device)


@_unpack_24.register_fake
def _(values: Tensor, metadata: Tensor, backend: str) -> Tensor:
    return _unpacked(values)


def pack_24(w: Tensor, mask: Tensor | None = None, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """The two kept weights of every block, and where they stood: 9/16 of the bytes of 16-bit weights, and lossless.

    Args:
        w: [out, in_features], in_features divisible by 4; fp32, fp16 or bf16 (fp64 in the reference). May be empty or a non-contiguous
            view. Not differentiated through.
        mask: bool like w with exactly two True in every block; what it drops is dropped, zero or not. Without one the non-zeros are kept,
            a NaN among them and -0.0 not; a block with fewer than two is filled up with +0.0 at its lowest free positions.
        backend: see `prox_24`.
    Returns: (values, metadata).
        values: [out, in_features / 2] of w's dtype, the kept weights of each block in column order, bit for bit.
        metadata: int16 [out, ceil(in_features / 16)]: nibble j (bits 4 j to 4 j + 3) of word c is i0 | i1 << 2 of block 4 c + j, with
            i0 < i1 the positions of its kept weights; 0b0100 behind the end of a row. This is the linear metadata of PyTorch's
            semi-structured conversion; `reference.metadata.reorder` brings it into the order of a device library.
    Raises: TypeError: not a floating tensor, mask not bool. ShapeError: w not a matrix, in_features not divisible by 4, mask of another
        shape; a block with more than two non-zeros, or whose mask does not keep two: the first one is named. ConfigError: tensors on
        several devices. BackendError: backend not available. To know of such a block, the host waits for the device once.
    """
    check_floating("pack_24", "w", w)
    check_width("pack_24", w.shape)
    if w.dim() != 2:
        raise ShapeError(f"pack_24: expected w of shape [out, in_features], got {tuple(w.shape)}. Pack one linear layer at a time.")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"pack_24: expected a bool tensor for mask, got {got}. True marks a kept weight.")
        check_like("pack_24", "mask", mask, w.shape, w.device)
    packed: tuple[Tensor, Tensor] = _pack_24(w.detach(), mask, choose_backend("pack_24", w, backend))
    return packed


def unpack_24(values: Tensor, metadata: Tensor, shape: Sequence[int], *, backend: str | None = None) -> Tensor:
    """The inverse of `pack_24`: the weight, with +0.0 where nothing was kept.

    Args:
        values, metadata: as `pack_24` returns them.
        shape: of the weight, (out, in_features).
        backend: see `prox_24`.
    Returns: [out, in_features] of values' dtype (contiguous); kept weights bit for bit. Not differentiated through.
    Raises: TypeError: values not floating, metadata not int16. ShapeError: shape not of two sizes, the second divisible by 4, or values or
        metadata of another shape than it asks for. ConfigError: tensors on several devices. BackendError: backend not available.
        Positions that do not ascend (i0 >= i1), which `pack_24` never writes, are a ShapeError in the reference; Triton, for whom looking
        would mean to wait for the device, writes some of the block's values at the positions named.
    """
    check_floating("unpack_24", "values", values)
    check_width("unpack_24", shape)
    if len(shape) != 2:
        raise ShapeError(f"unpack_24: expected a shape (out, in_features), got {tuple(shape)}. Unpack one linear layer at a time.")
    rows, in_features = shape
    check_like("unpack_24", "values", values, (rows, in_features // BLOCK * KEPT), values.device)
    if not isinstance(metadata, Tensor) or metadata.dtype != torch.int16:
        got = metadata.dtype if isinstance(metadata, Tensor) else type(metadata).__name__
        raise TypeError(f"unpack_24: expected an int16 tensor for metadata, got {got}. Pass it as pack_24 returns it.")
    check_like("unpack_24", "metadata", metadata, (rows, row_words(in_features)), values.device)
    w: Tensor = _unpack_24(values.detach(), metadata, choose_backend("unpack_24", values, backend))
    return w
