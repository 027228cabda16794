"""One product of a packed layer: the choice at run time, inside one operation that torch.compile does not look into."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.dispatch import traced
from ..ops.sparse_linear import multiply_at, on_hopper, sparse_linear_24, takes
from .blob import Layout
from .choice import KERNEL_MOST, choose, has_kernel
from .library import CUSPARSELT, Algorithm, find_library, found_algorithm, is_captured, multiply

NO_ALGORITHM = (0, 1, -1)  # for CUTLASS, which does not read it


def sparse_linear(x: Tensor, blob: Tensor, bias: Tensor | None, layout: Layout, first: int = 0, rows: int | None = None) -> Tensor:
    """y = x W^T + b for rows `first` to `first + rows` of the packed weight W (None: all), b those rows' bias already.

    Args:
        x: [..., in_features] of layout.dtype, on blob's device. bias: [rows] or None.
    Returns: [..., rows], contiguous. Gradients flow to x and bias.
    """
    count = layout.out_features if rows is None else rows
    tracked = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if tracked or traced(x):
        y: Tensor = _sparse_linear(x, blob, bias, layout.out_features, layout.in_features, layout.order, first, count)
        return y
    return _compute(x, blob, bias, layout, first, count)


@torch.library.custom_op("proxsparse::sparse_linear", mutates_args=())
def _sparse_linear(
    x: Tensor, blob: Tensor, bias: Tensor | None, out_features: int, in_features: int, order: str, first: int, rows: int
) -> Tensor:
    return _compute(x, blob, bias, Layout(out_features, in_features, x.dtype, order), first, rows)


@_sparse_linear.register_fake
def _(x: Tensor, blob: Tensor, bias: Tensor | None, out_features: int, in_features: int, order: str, first: int, rows: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


@torch.library.custom_op("proxsparse::sparse_linear_weight", mutates_args=())
def _dense(blob: Tensor, like: Tensor, out_features: int, in_features: int, order: str, first: int, rows: int) -> Tensor:
    return Layout(out_features, in_features, like.dtype, order).dense(blob, first, rows)


@_dense.register_fake
def _(blob: Tensor, like: Tensor, out_features: int, in_features: int, order: str, first: int, rows: int) -> Tensor:
    return like.new_empty((rows, in_features))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, blob, bias, *ctx.place = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(blob)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The weight is unpacked again: keeping it would hold a dense model."""
    (blob,) = ctx.saved_tensors
    need_x, _, need_bias, *_ = ctx.needs_input_grad
    grad_x = grad @ _dense(blob, grad.detach(), *ctx.place) if need_x else None
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if need_bias and ctx.has_bias else None
    return grad_x, None, grad_bias, None, None, None, None, None


_sparse_linear.register_autograd(_backward, setup_context=_keep)


def _compute(x: Tensor, blob: Tensor, bias: Tensor | None, layout: Layout, first: int, rows: int) -> Tensor:
    flat = x.reshape(-1, layout.in_features).contiguous()
    tokens, device = flat.shape[0], flat.device
    shape = (*x.shape[:-1], rows)
    if tokens == 0 or rows == 0:
        return x.new_empty(shape)
    captured = flat.is_cuda and is_captured(device)
    point = choose(device, layout.dtype, layout.out_features, layout.in_features, tokens, captured=captured)
    y = None
    if point.backend == "library" and rows == layout.out_features:
        y = _by_library(flat, blob, bias, layout, point.algorithm, captured)
    if y is None and (point.backend == "kernel" or (point.backend == "library" and _instead(layout, tokens, device))):
        y = by_kernel(flat, blob, bias, layout, first, rows, shape)
    if y is None:
        y = F.linear(flat, layout.dense(blob, first, rows), bias)
    return y if y.dim() == len(shape) else y.view(shape)


def _instead(layout: Layout, tokens: int, device: torch.device) -> bool:
    """Whether our kernel takes the place of a library that cannot."""
    return has_kernel(device) and (tokens <= KERNEL_MOST or on_hopper(device, layout.order, layout.in_features))


def by_kernel(x: Tensor, blob: Tensor, bias: Tensor | None, layout: Layout, first: int, rows: int, shape: tuple[int, ...]) -> Tensor | None:
    """Our kernel for x [tokens, in_features]: y of `shape`, or [tokens, rows]; None where it does not take the shape."""
    place = layout.addresses(blob, first, rows) if x.is_cuda else None
    if place is not None:
        fits = takes(rows, layout.in_features, layout.dtype, layout.order)
        return multiply_at(x, *place, bias, layout.order, shape) if fits else None
    values, metadata, order = layout.parts(blob, first, rows)
    fits = takes(rows, layout.in_features, layout.dtype, order)
    return sparse_linear_24(x, values, metadata, bias, order=order, backend="triton") if fits else None


def _by_library(x: Tensor, blob: Tensor, bias: Tensor | None, layout: Layout, algorithm: Algorithm | None, captured: bool) -> Tensor | None:
    """None where cuSPARSELt has no searched algorithm: its default one is slower than dense."""
    name = find_library(x.device).name
    whole = blob.view(layout.dtype)
    if name is None:
        return None
    if name != CUSPARSELT:
        algorithm = NO_ALGORITHM
    elif algorithm is None:
        algorithm = found_algorithm(whole, x, layout.out_features, captured=captured)
    if algorithm is None:
        return None
    return multiply(name, whole, layout.values(blob), layout.metadata(blob), x, bias, algorithm)
