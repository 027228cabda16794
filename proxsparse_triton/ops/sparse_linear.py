"""`sparse_linear_24`: a linear layer on its packed weight."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ConfigError, ShapeError
from ..reference import sparse_linear as reference
from ..reference.metadata import ORDERS, row_words
from ..sparsity import BLOCK, KEPT, check_width
from .dispatch import check_floating, check_like, choose_backend, traced

if TYPE_CHECKING:
    from ..kernels.compiled import Launch

KERNEL_DTYPES = (torch.float16, torch.bfloat16)
# What out_features and in_features must divide by: the sparse tensor cores take 16 rows, copies 16 bytes, and each order has its tiles.
DIVISORS = {"linear": (16, 16), "hopper": (64, 32), "ampere": (32, 32)}
# The kernel for Hopper takes 64 columns at a time. Up to 8 tokens it is 2 to 6 % slower than the other on an H200 in bf16, from this many
# out_features on up to 8 % faster; at 16 tokens 1 to 10 % faster, and then more and more.
HOPPER, HOPPER_COLUMNS, FEW_TOKENS, MANY_ROWS = (9, 0), 64, 8, 16384
MOST_TOKENS = 1 << 20  # of a launch, whose programs along the tokens are counted in 16 bits


@functools.cache
def on_hopper(device: torch.device, order: str, in_features: int = HOPPER_COLUMNS) -> bool:
    """Whether the kernel for Hopper serves such weights: it is fast at any number of tokens."""
    if device.type != "cuda" or torch.version.hip is not None or order != "hopper" or in_features % HOPPER_COLUMNS:
        return False
    return torch.cuda.get_device_capability(device) == HOPPER


@functools.lru_cache(4096)
def _launch(device: torch.device, tokens: int, rows: int, in_features: int, order: str) -> tuple[Launch, Callable[..., None]]:
    """How, and by which kernel."""
    from ..kernels import hopper, hopper_launch, launch, sparse_linear

    if device.type != "cuda":
        return launch.INTERPRETED_DECODE[8 if tokens <= 8 else 64], sparse_linear.sparse_linear
    properties = torch.cuda.get_device_properties(device)
    if on_hopper(device, order, in_features) and (tokens > FEW_TOKENS or rows >= MANY_ROWS):
        return hopper_launch.hopper(tokens, rows, in_features, properties.multi_processor_count), hopper.sparse_linear
    shared = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return launch.decode(tokens, rows, properties.multi_processor_count, shared), sparse_linear.sparse_linear


def multiply_at(x: Tensor, values: int, metadata: int, bias: Tensor | None, order: str, shape: tuple[int, ...]) -> Tensor:
    """`sparse_linear_24` on a GPU without its checks: what a layer calls that has made them, by the addresses of its weight.

    Args: x [tokens, in_features], contiguous. values, metadata: addresses, at multiples of 16 bytes. shape: of y, [..., out].
    """
    y = x.new_empty(shape)
    _run(x, values, metadata, bias, y, order)
    return y


def _compute(x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None, order: str, backend: str) -> Tensor:
    if backend == "reference":
        return reference.sparse_linear_24(x, values, metadata, bias, order)
    y = torch.empty((x.shape[0], values.shape[0]), dtype=x.dtype, device=x.device)
    if y.numel():
        _run(x, _aligned(values), _aligned(metadata), bias, y, order)
    return y


def _run(x: Tensor, values: Tensor | int, metadata: Tensor | int, bias: Tensor | None, y: Tensor, order: str) -> None:
    tokens, in_features = x.shape
    if tokens > MOST_TOKENS:
        rows = y.view(tokens, -1)
        for first in range(0, tokens, MOST_TOKENS):
            _run(x[first : first + MOST_TOKENS], values, metadata, bias, rows[first : first + MOST_TOKENS], order)
        return
    x, bias = _aligned(x), None if bias is None else _aligned(bias)
    launch, kernel = _launch(x.device, tokens, y.shape[-1], in_features, order)
    kernel(x, values, metadata, bias, y, order, launch)


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy, contiguous and at a multiple of 16 bytes."""
    return x if x.is_contiguous() and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("proxsparse::sparse_linear_24", mutates_args=())
def _sparse_linear_24(x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None, order: str, backend: str) -> Tensor:
    return _compute(x, values, metadata, bias, order, backend)


@_sparse_linear_24.register_fake
def _(x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None, order: str, backend: str) -> Tensor:
    return x.new_empty((x.shape[0], values.shape[0]))


def takes(rows: int, in_features: int, dtype: torch.dtype, order: str) -> bool:
    """Whether the kernel takes weights of that shape, dtype and order; others are unpacked and multiplied densely."""
    by_rows, by_columns = DIVISORS[order]
    return dtype in KERNEL_DTYPES and rows % by_rows == 0 and in_features % by_columns == 0 and in_features > 0


def sparse_linear_24(
    x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None = None, *, order: str = "linear", backend: str | None = None
) -> Tensor:
    """A linear layer on the packed weight of `pack_24`, which it reads as it is: 9/16 of the dense weight's bytes.

    y = x @ unpack_24(values, metadata).T + bias

    Args:
        x: [..., in_features], fp16, bf16 or fp32 (fp64 in the reference). Views are made contiguous. Any number of tokens (the product of
            the other sizes), zero too. On Hopper, in "hopper" order and with in_features divisible by 64, faster than a dense weight at
            every number; elsewhere made for the few tokens of decoding, up to some 64.
        values: [out, in_features / 2] of x's dtype.
        metadata: int16, in linear order [out, ceil(in_features / 16)] as `pack_24` returns it, or flat in another `order`.
        bias: [out] of x's dtype, added in fp32.
        order: "linear"; "hopper" or "ampere" as `reference.metadata.reorder` gives them, so that one copy serves the device's library too.
            "hopper" is fastest.
        backend: see `prox_24`. The kernel is for fp16 and bf16 and whole tiles (out and in_features divisible by 16; hopper: out by 64,
            in_features by 32; ampere: both by 32); the reference serves the rest.
    Returns: [..., out] of x's dtype; sums are in fp32 and rounded once. Deterministic. Not differentiated through.
    Raises: TypeError: x not floating, or dtypes that differ. ShapeError: sizes that do not fit each other. ConfigError: unknown order,
        tensors on several devices. BackendError: backend not available.
    """
    check_floating("sparse_linear_24", "x", x)
    check_width("sparse_linear_24", x.shape)
    in_features = x.shape[-1]
    _check_weight(x, values, metadata, order)
    rows = values.shape[0]
    if bias is not None:
        check_like("sparse_linear_24", "bias", bias, (rows,), x.device)
        if bias.dtype != x.dtype:
            raise TypeError(f"sparse_linear_24: expected bias of x's dtype {x.dtype}, got {bias.dtype}. Convert it first.")
    chosen = choose_backend("sparse_linear_24", x, backend)
    if chosen == "triton" and (not takes(rows, in_features, x.dtype, order) or torch.version.hip is not None):
        if backend == "triton":
            raise ShapeError(
                f"sparse_linear_24: expected fp16 or bf16 and (out, in_features) divisible by {DIVISORS[order]} for backend='triton', "
                f"got {x.dtype} and {(rows, in_features)}. Use backend='reference'."
            )
        chosen = "reference"
    flat = x.detach().reshape(-1, in_features)
    bias = None if bias is None else bias.detach()
    if traced(x):
        y: Tensor = _sparse_linear_24(flat, values.detach(), metadata, bias, order, chosen)
    else:  # a registered operation costs the host as long as a small product
        with torch.no_grad():
            y = _compute(flat, values, metadata, bias, order, chosen)
    return y.reshape(*x.shape[:-1], rows)


def _check_weight(x: Tensor, values: Tensor, metadata: Tensor, order: str) -> None:
    if order not in ORDERS:
        raise ConfigError(f"sparse_linear_24: expected an order of {', '.join(ORDERS)}, got {order!r}. Pass the one the metadata is in.")
    if values.dim() != 2:
        raise ShapeError(f"sparse_linear_24: expected values [out, in_features / 2], got shape {tuple(values.shape)}. Use pack_24.")
    rows, in_features = values.shape[0], x.shape[-1]
    check_like("sparse_linear_24", "values", values, (rows, in_features // BLOCK * KEPT), x.device)
    if values.dtype != x.dtype:
        raise TypeError(f"sparse_linear_24: expected values of x's dtype {x.dtype}, got {values.dtype}. Convert x or the weight.")
    if metadata.dtype != torch.int16:
        raise TypeError(f"sparse_linear_24: expected int16 metadata, got {metadata.dtype}. Pass it as pack_24 returns it.")
    words = row_words(in_features)
    shape = (rows, words) if order == "linear" else (rows * words,)
    check_like("sparse_linear_24", "metadata", metadata, shape, x.device)
