"""Device functions on one block: rounding, ranks and sorting."""

from __future__ import annotations

import itertools

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from torch import Tensor  # noqa: E402

from proxsparse_triton.kernels import prox  # noqa: E402
from proxsparse_triton.kernels.block import column, join, ranks  # noqa: E402
from proxsparse_triton.kernels.ptx import round_to  # noqa: E402
from proxsparse_triton.kernels.solver import sort_descending, tie_broken, unsort  # noqa: E402
from proxsparse_triton.reference import prox as reference_prox  # noqa: E402

N = 1024

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter


@triton.jit
def round_kernel(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y_ptr + at, round_to(tl.load(x_ptr + at), y_ptr.dtype.element_ty))


@triton.jit
def order_kernel(x_ptr, rank_ptr, sorted_ptr, restored_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * 4 + tl.arange(0, 4)[None, :]
    x = tl.load(x_ptr + at)
    a, b, c, d = column(x, 0), column(x, 1), column(x, 2), column(x, 3)
    ra, rb, rc, rd = ranks(a, b, c, d)
    s1, s2, s3, s4, ab, cd, ac, bd, bc = sort_descending(a, b, c, d)
    tl.store(rank_ptr + at, join(ra, rb, rc, rd))
    tl.store(sorted_ptr + at, join(s1, s2, s3, s4))
    a, b, c, d = unsort(s1, s2, s3, s4, ab, cd, ac, bd, bc)
    tl.store(restored_ptr + at, join(a, b, c, d))


@triton.jit
def key_kernel(x_ptr, key_ptr, sorted_ptr, position_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * 4 + tl.arange(0, 4)[None, :]
    x = tl.load(x_ptr + at)
    a, b = tie_broken(column(x, 0), 0), tie_broken(column(x, 1), 1)
    c, d = tie_broken(column(x, 2), 2), tie_broken(column(x, 3), 3)
    tl.store(key_ptr + at, join(a, b, c, d))
    s1, s2, s3, s4, ab, cd, ac, bd, bc = sort_descending(a, b, c, d)
    tl.store(sorted_ptr + at, join(s1, s2, s3, s4))
    zero = tl.zeros_like(a)
    a, b, c, d = unsort(zero, zero + 1, zero + 2, zero + 3, ab, cd, ac, bd, bc)
    tl.store(position_ptr + at, join(a, b, c, d))


# --- rounding and order ---------------------------------------------------------------------------------------------------------


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(N, dtype=dtype, device=x.device)
    round_kernel[(1,)](x, out, N=N)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_to_nearest_even(device: str, poisoned: None, dtype: torch.dtype) -> None:
    """Random bits, exact halves of an ulp on both sides of even, overflow to infinity, infinities and NaN."""
    bits = torch.randint(0x0080_0000, 0x7F7F_0000, (N,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    halves = (bits & -0x1_0000) | 0x8000
    x = torch.where(torch.arange(N) % 2 == 0, bits, halves).view(torch.float32).clone()
    x[::3] = -x[::3]
    if dtype == torch.float16:
        x = x.abs().log2().mul(0.2).exp2()  # within reach of fp16, its denormals included
        x[3::4] = x[3::4].half().float() * (1 + 2.0**-11)
    x[:6] = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 3.4e38])
    result = rounded(x.to(device), dtype).cpu()
    expected = x.to(dtype)
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result.nan_to_num(7), expected.nan_to_num(7))
    assert torch.equal(result.signbit()[:4], expected.signbit()[:4])


def every_pattern_of_ties() -> Tensor:
    """All 256 blocks of four values, then random ones."""
    every = torch.tensor(list(itertools.product([0.0, 0.5, 2.0, float("inf")], repeat=4)))
    return torch.cat([every, torch.rand(N - len(every), 4, generator=torch.Generator().manual_seed(0))])


def test_ranks_and_sort_agree_with_a_stable_sort(device: str, poisoned: None) -> None:
    x = every_pattern_of_ties()
    rank, ordered, restored = (torch.empty(N, 4, dtype=dtype, device=device) for dtype in (torch.int32, torch.float32, torch.float32))
    order_kernel[(1,)](x.to(device), rank, ordered, restored, N=N)
    expected, order = x.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(ordered.cpu(), expected)
    assert torch.equal(rank.cpu().long(), order.argsort(-1))
    assert torch.equal(restored.cpu(), x)


def test_keys_break_ties_to_the_lowest_index(device: str) -> None:
    """Keys order like the numbers without their lowest two bits, none are equal, and a sort of them is undone for anything sorted along."""
    x = every_pattern_of_ties()
    x[-1] = torch.tensor([1e-45, 0.0, 3.4e38, float("nan")])
    key, ordered, position = (torch.full((N, 4), -7, dtype=torch.int32, device=device) for _ in range(3))
    key_kernel[(1,)](x.to(device), key, ordered, position, N=N)
    key, ordered, position = key.cpu(), ordered.cpu(), position.cpu()
    assert torch.equal(key, (x.view(torch.int32) & -4) | torch.tensor([3, 2, 1, 0], dtype=torch.int32))
    expected, order = (x.view(torch.int32) >> 2).sort(dim=-1, descending=True, stable=True)
    assert torch.equal(ordered >> 2, expected)
    assert (ordered.diff() < 0).all()
    assert torch.equal(position.long(), order.argsort(-1))


def test_kernel_and_reference_read_dead_columns_alike() -> None:
    assert prox.MIN_SCALE.value == reference_prox.MIN_SCALE
