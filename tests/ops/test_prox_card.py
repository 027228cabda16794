"""`prox_24` on the card: the shapes of Llama-2-7B, determinism, memory, more than 2^31 weights, inductor."""

from __future__ import annotations

import pytest
import torch
from adversarial import (
    WORSE,
    same_bits,
    weights,
)
from torch import Tensor

from proxsparse_triton.ops import prox_24
from proxsparse_triton.reference.block import objective

LLAMA_2_7B = [(4096, 4096), (11008, 4096), (4096, 11008)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", LLAMA_2_7B)
def test_llama_shapes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """lambda * scale from the paper's 0.005 to where all three kinds of solutions compete."""
    torch.manual_seed(0)
    z = (0.02 * torch.randn(shape, device="cuda")).to(dtype)
    for lam in (0.25, 40.0):
        w, expected = prox_24(z, lam), prox_24(z, lam, backend="reference")
        if dtype == torch.float32:
            for rows in range(0, shape[0], 1024):
                part = slice(rows, rows + 1024)
                gaps = solution_gaps_on_card(w[part], expected[part], z[part], lam)
                assert gaps.max() <= WORSE
        else:
            assert (w == expected).float().mean() > 0.999
            solved = prox_24(z.float(), lam)
            assert (w == solved.to(dtype)).float().mean() > 0.999  # its tiles are others, and with them the number of sweeps
            assert solution_gaps_on_card(solved, prox_24(z.float(), lam, backend="reference"), z, lam).max() <= WORSE


def solution_gaps_on_card(actual: Tensor, expected: Tensor, z: Tensor, lam: float) -> Tensor:
    u, a, e = (x.double().unflatten(-1, (-1, 4)) for x in (z, actual, expected))
    return (objective(a, u, lam) - objective(e, u, lam)).abs() / (0.5 * u.square().sum(-1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic_and_without_extra_memory_in_place(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    z = (0.02 * torch.randn(4096, 11008, device="cuda")).to(dtype)
    scale = torch.rand(11008, device="cuda") + 0.5
    first = prox_24(z, 1.0, column_scale=scale)
    w = z.clone()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    prox_24(w, 1.0, column_scale=scale, out=w)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() == before
    assert same_bits(w, first)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    n = 2**31 + 8
    if torch.cuda.mem_get_info()[0] < 3 * 2 * n:
        pytest.skip("needs 13 GB of free GPU memory")
    pattern = weights((8,)).bfloat16().cuda()
    expected = prox_24(pattern, 0.5)
    assert not torch.equal(expected, pattern)
    z = torch.empty(n, dtype=torch.bfloat16, device="cuda")
    z.view(-1, 8).copy_(pattern.expand(n // 8, 8))
    prox_24(z, 0.5, out=z)
    assert torch.equal(z[:8], expected)
    assert torch.equal(z[2**31 - 8 :].view(-1, 8), expected.expand(2, 8))
    for part in z.view(-1, 8).split(2**25):
        assert (part == expected).all()


@pytest.mark.gpu
def test_inductor_on_the_card() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda w, lam: prox_24(w * 2, lam) + 1, fullgraph=True)
    z = weights((64, 512)).cuda()
    assert same_bits(compiled(z, 0.5), prox_24(z * 2, 0.5) + 1)
