"""The published operator: Algorithm 2 by hand, and Algorithm 3 against the exact prox, objectives compared."""

from __future__ import annotations

import pytest
import torch
from adversarial import all_blocks
from torch import Tensor

from proxsparse_triton.benchmarks.published import SWEEPS, alm, compiled_sweeper, published_prox, sweep
from proxsparse_triton.reference.block import objective
from proxsparse_triton.reference.prox import prox_24


def columns(*values: float) -> tuple[Tensor, ...]:
    return tuple(torch.tensor([value], dtype=torch.float64) for value in values)


def test_one_sweep_of_four_by_hand() -> None:
    """The smallest first: w4 = 0.2, w3 = 0.4, w2 = 0.8 - 0.5 * 0.4 * 0.2, then w1 with all products of two of the others."""
    zero = columns(0, 0, 0, 0)
    w = sweep(zero, columns(1, 0.8, 0.4, 0.2), torch.tensor(0.5, dtype=torch.float64), 1)
    second = 0.8 - 0.5 * 0.4 * 0.2
    first = 1 - 0.5 * (second * 0.4 + 0.4 * 0.2 + 0.2 * second)
    assert [float(x) for x in w] == pytest.approx([first, second, 0.4, 0.2])


def test_one_sweep_of_three_by_hand() -> None:
    w = sweep(columns(0.9, 0.8, 0.4), columns(1, 0.8, 0.4), torch.tensor(2.0, dtype=torch.float64), 1)
    assert [float(x) for x in w] == pytest.approx([1.0, 0.8, 0.0])  # 0.4 - 2 * 0.72 < 0, then nothing pulls the others down


def test_alm_starts_at_zero_and_ends_in_a_fixed_point() -> None:
    lam = torch.tensor(0.3, dtype=torch.float64)
    z = columns(1, 0.8, 0.7, 0.6)
    w = alm(z, lam, sweep)
    assert w == sweep(columns(0, 0, 0, 0), z, lam, SWEEPS)
    assert torch.cat(sweep(w, z, lam, 1)).sub(torch.cat(w)).abs().max() < 1e-12


def gaps(w: Tensor, z: Tensor, lam: float) -> Tensor:
    """By how much the published answer is worse than the exact one, in units of |z|^2 / 2."""
    blocks = z.unflatten(-1, (-1, 4)).double()
    a, e = (x.double().unflatten(-1, (-1, 4)) for x in (w, prox_24(z.double(), lam)))
    return (objective(a, blocks, lam) - objective(e, blocks, lam)) / (0.5 * blocks.square().sum(-1)).clamp_min(1e-300)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equal_where_the_problem_is_convex(dtype: torch.dtype) -> None:
    """At the published strengths the sweeps converge."""
    torch.manual_seed(0)
    z = (0.02 * torch.randn(64, 256, dtype=torch.float64)).to(dtype)
    for lam in (0.05, 0.25, 2.0):
        assert gaps(published_prox(z, lam), z, lam).abs().max() < (1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("lam", [0.3, 0.7, 1.0, 2.0])
def test_never_better_than_the_exact_prox(lam: float) -> None:
    z = all_blocks()
    worse = gaps(published_prox(z, lam), z, lam)
    assert worse.min() > -1e-12
    if lam == 0.7:
        assert worse.max() > 1e-6  # near the boundary of convexity 100 sweeps are not enough: else it would be no rival to beat


def test_signs_order_and_shape() -> None:
    z = torch.tensor([[-3.0, 0.5, 2.0, -0.4, 0.1, -0.2, 0.3, 0.4]])
    w = published_prox(z, 5.0)
    assert w[0, :4].tolist() == [-3.0, 0.0, 2.0, 0.0]
    assert (w * z >= 0).all()
    assert w.abs().le(z.abs()).all()
    assert published_prox(torch.ones(2, 3, 8), 0.1).shape == (2, 3, 8)


def test_the_input_decides_the_arithmetic() -> None:
    """As the authors do: bf16 in, bf16 all the way, which leaves weights unchanged that should shrink."""
    torch.manual_seed(0)
    z = (0.02 * torch.randn(64, 256)).bfloat16()
    w = published_prox(z, 0.25)
    assert w.dtype == torch.bfloat16
    exact = prox_24(z.double(), 0.25)
    moved = exact != z
    assert 0.1 < (w == z)[moved].float().mean() < 1.0


@pytest.mark.slow
def test_compiled_sweeps_are_the_same_sweeps() -> None:
    torch.manual_seed(0)
    z = 0.5 * torch.randn(16, 64)
    torch.testing.assert_close(published_prox(z, 1.0, compiled_sweeper()), published_prox(z, 1.0), rtol=1e-5, atol=1e-6)
