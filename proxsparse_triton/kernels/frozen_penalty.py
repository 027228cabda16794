"""frozen_penalty: value sum r^2 and gradient 2 r a (2w - w0), with a = 1 / (w0 + eps sgn(w0)), r = a w (w - w0)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import interpreted
from .ptx import reciprocal, round_to

TILE = 512  # twice as much would spill a register
SQUARE_TILE, SQUARE_TILES = 1024, 2  # of the norm pass
INTERPRETER_TILE = 1 << 16


@triton.jit
def penalty_terms(w, w0, lam, frozen_eps):
    """lam r^2 and its derivative 2 lam r a (2w - w0). Only |a| matters to either."""
    a = reciprocal(tl.abs(w0) + tl.maximum(frozen_eps, 1e-37))
    r = a * (w * (w - w0))
    pull = lam * r
    return pull * r, 2 * pull * a * (2 * w - w0)


@triton.jit
def rows_of(ROW: tl.constexpr, TILE: tl.constexpr):
    """0 to TILE - 1, ROW of them to a thread: weights of any two dtypes then get the same layout, and nothing is exchanged between threads
    but sums."""
    return tl.arange(0, TILE // ROW)[:, None] * ROW + tl.arange(0, ROW)[None, :]


@triton.jit
def _frozen_penalty_kernel(
    w_ptr, w0_ptr, grad_ptr, partial_ptr, lam, frozen_eps, n,
    ACCUMULATE: tl.constexpr, HAS_GRAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """partial[program] = lam * sum of r^2 over its TILE weights; grad = (grad +) 2 lam r a (2w - w0).

    Reads w and w0 once, and the gradient once where it is added to: 12 bytes per weight in bf16 with a written gradient.
    """
    lam = tl.cast(lam, tl.float32)
    frozen_eps = tl.cast(frozen_eps, tl.float32)
    offset = tl.program_id(0).to(tl.int64) * TILE + rows_of(4, TILE)
    inside = offset < n
    w = tl.load(w_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    w0 = tl.load(w0_ptr + offset, mask=inside, other=1.0).to(tl.float32)
    value, grad = penalty_terms(w, w0, lam, frozen_eps)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.sum(value, axis=1), axis=0))
    if HAS_GRAD:
        if ACCUMULATE:
            grad += tl.load(grad_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_ptr + offset, round_to(grad, grad_ptr.dtype.element_ty), mask=inside)


def frozen_penalty(w: Tensor, w0: Tensor, lam: float, frozen_eps: float, grad: Tensor | None, accumulate: bool) -> Tensor:
    """Value as an fp32 scalar; writes or adds the gradient into contiguous `grad` where given. w, w0 contiguous."""
    n = w.numel()
    tile = INTERPRETER_TILE if interpreted(_frozen_penalty_kernel) else TILE
    programs = triton.cdiv(n, tile)
    if programs == 0:
        return torch.zeros((), dtype=torch.float32, device=w.device)
    # Partial sums instead of atomics: the same value on every run. In fp64, in which they are added up: torch would make a copy for that.
    partial = torch.empty(programs, dtype=torch.float64, device=w.device)
    with torch.cuda.device_of(w):
        _frozen_penalty_kernel[(programs,)](
            w,
            w0,
            w if grad is None else grad,
            partial,
            lam,
            frozen_eps,
            n,
            ACCUMULATE=accumulate,
            HAS_GRAD=grad is not None,
            TILE=tile,
        )
    return partial.sum().to(torch.float32)


@triton.jit
def _gradient_square_kernel(
    w_ptr, w0_ptr, grad_ptr, partial_ptr, lam, frozen_eps, n,
    HAS_W0: tl.constexpr, ROW: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """partial[program] = sum of (grad + 2 lam r a (2w - w0))^2 over TILES * TILE weights; reads 6 bytes per bf16 weight, 2 without w0."""
    lam = tl.cast(lam, tl.float32)
    frozen_eps = tl.cast(frozen_eps, tl.float32)
    start = tl.program_id(0).to(tl.int64) * (TILE * TILES)
    squares = tl.zeros([TILE // ROW], tl.float32)
    for tile in range(TILES):
        offset = start + tile * TILE + rows_of(ROW, TILE)
        inside = offset < n
        total = tl.load(grad_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        if HAS_W0:
            w = tl.load(w_ptr + offset, mask=inside, other=0.0).to(tl.float32)
            w0 = tl.load(w0_ptr + offset, mask=inside, other=1.0).to(tl.float32)
            total += penalty_terms(w, w0, lam, frozen_eps)[1]
        squares += tl.sum(total * total, axis=1)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(squares, axis=0))


def gradient_square_rows(w: Tensor) -> int:
    """Partial sums that a launch of `gradient_square` leaves."""
    tile, tiles = _square_tiles()
    return int(triton.cdiv(w.numel(), tile * tiles))


def _square_tiles() -> tuple[int, int]:
    return (INTERPRETER_TILE, 1) if interpreted(_gradient_square_kernel) else (SQUARE_TILE, SQUARE_TILES)


def gradient_square(w: Tensor, w0: Tensor | None, lam: float, frozen_eps: float, grad: Tensor, partial: Tensor) -> None:
    """partial: fp32 [gradient_square_rows, 1] to add up to the sum of (grad + penalty gradient)^2; all contiguous."""
    n = w.numel()
    if n == 0:
        return
    tile, tiles = _square_tiles()
    row = 16 // max(x.element_size() for x in (w, w if w0 is None else w0, grad))  # 16 bytes of the widest
    with torch.cuda.device_of(w):
        _gradient_square_kernel[(gradient_square_rows(w),)](
            w, w if w0 is None else w0, grad, partial, lam, frozen_eps, n, HAS_W0=w0 is not None, ROW=row, TILE=tile, TILES=tiles
        )
