"""Hard inputs for the proximal operator and the oracle's answer to them, shared by the tests of the reference and of the kernel."""

from __future__ import annotations

import functools
import importlib.util

import pytest
import torch
from torch import Tensor

from proxsparse_triton.reference.block import objective
from proxsparse_triton.reference.prox import prox_24_exhaustive

# Dense between 0.3 and 3, where with weights of order one two, three and four kept weights compete.
LAMBDAS = (0.0, 0.05, 0.3, 0.45, 0.7, 1.0, 1.4, 2.0, 3.0, 30.0, 1000.0)
BLOCKS = 1000
WORSE = 1e-6  # a block fails when its objective exceeds the oracle's by more than this share of |z|^2 / 2
ORACLE_SWEEPS = 200


def adversarial_blocks(seed: int) -> dict[str, Tensor]:
    """Seven families of blocks, name -> fp64 [1000, 4], signs mixed.

    Every value is an fp32 number, so that one oracle serves both precisions."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    position = torch.randint(4, (BLOCKS,), generator=generator)
    peak = torch.nn.functional.one_hot(position, 4).double()
    families = {
        "normal": normal(BLOCKS, 4),
        "heavy-tailed": normal(BLOCKS, 4) * (1.5 * normal(BLOCKS, 4)).exp(),
        "ties": torch.randint(1, 4, (BLOCKS, 4), generator=generator) * uniform(0.1, 1, BLOCKS, 1).float().double(),
        "near-ties": uniform(0.1, 2, BLOCKS, 1) * (1 + 10 ** uniform(-6, -1, BLOCKS, 1) * normal(BLOCKS, 4)),
        "zeros": normal(BLOCKS, 4) * (uniform(0, 1, BLOCKS, 4) < 0.5),
        # One weight far above the others, which are zero in every other block.
        "single": normal(BLOCKS, 1) * peak + 0.01 * normal(BLOCKS, 4) * (torch.arange(BLOCKS) % 2)[:, None],
        "wide": normal(BLOCKS, 4) * 10 ** uniform(-8, 4, BLOCKS, 4),
    }
    sign = torch.randint(2, (BLOCKS, 4), generator=generator) * 2 - 1
    return {name: (blocks * sign).float().double() for name, blocks in families.items()}


FAMILIES = tuple(adversarial_blocks(0))
HAVE_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAVE_TRITON, reason="needs triton")
# Where an operation can run here; without a GPU conftest.py sets the interpreter up for the kernels.
BACKENDS = ("reference", pytest.param("triton", marks=needs_triton))


@functools.cache
def all_blocks() -> Tensor:
    """The seven families in one fp64 tensor [7000, 4]."""
    return torch.cat(list(adversarial_blocks(0).values()))


@functools.cache
def oracle_objective(lam: float) -> Tensor:
    """Objective of the oracle's answers to `all_blocks`, [7000]; computed once per session, half a second each."""
    return objective(prox_24_exhaustive(all_blocks(), lam, sweeps=ORACLE_SWEEPS), all_blocks(), lam)


def worse_than_oracle(w: Tensor, lam: float, threshold: float = WORSE) -> dict[str, int]:
    """How many of `all_blocks` an answer solves worse than the oracle, by family; {} when none. NaNs count as worse."""
    z = all_blocks()
    gap = objective(w.double().cpu(), z, lam) - oracle_objective(lam)
    worse = ~(gap <= threshold * 0.5 * z.square().sum(-1))
    counts = worse.view(len(FAMILIES), BLOCKS).sum(-1).tolist()
    return {family: count for family, count in zip(FAMILIES, counts, strict=True) if count}


def solution_gaps(actual: Tensor, expected: Tensor, z: Tensor, lam: float, column_scale: Tensor | None = None) -> Tensor:
    """|objective(actual) - objective(expected)| of each block in units of |z|^2 / 2, evaluated in fp64."""
    c = 1.0 if column_scale is None else column_scale.double().cpu()
    u, a, e = ((x.double().cpu() * c).unflatten(-1, (-1, 4)) for x in (z, actual, expected))
    gap = (objective(a, u, lam) - objective(e, u, lam)).abs()
    return gap / (0.5 * u.square().sum(-1)).clamp_min(torch.finfo(torch.float64).tiny)


def assert_same_solution(actual: Tensor, expected: Tensor, z: Tensor, lam: float, column_scale: Tensor | None = None) -> None:
    """Two fp32 (or fp64) answers agree in every block: the same support and values within 1e-6 of the largest |z|, or,
    as two points may be equally good, objectives within 1e-6 of |z|^2 / 2. NaN only where both are."""
    assert actual.shape == expected.shape
    actual, expected, z = actual.cpu(), expected.cpu(), z.cpu()
    assert torch.equal(actual.isnan(), expected.isnan())
    a, e, u = (x.double().unflatten(-1, (-1, 4)) for x in (actual, expected, z))
    close = (a - e).abs() <= 1e-6 * u.abs().amax(-1, keepdim=True)
    same = (close & ((a != 0) == (e != 0))).all(-1) | a.isnan().all(-1)
    gaps = solution_gaps(actual, expected, z, lam, column_scale)
    wrong = ~(same | (gaps <= WORSE))
    assert not wrong.any(), (
        f"{int(wrong.sum())} blocks differ, first z {u[wrong][0].tolist()}: {a[wrong][0].tolist()} {e[wrong][0].tolist()}"
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit: -0.0 differs from +0.0, a NaN equals itself."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(integer).cpu(), b.contiguous().view(integer).cpu())


LOW = (torch.bfloat16, torch.float16)  # storage types below fp32


def weights(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Heavy-tailed, with exact ties and zeros: all three kinds of solutions at lambda 0.3 to 3."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()
    z = torch.where(torch.rand(shape, generator=generator) < 0.2, z.round(), z)
    return z.clamp(-100, 100)
