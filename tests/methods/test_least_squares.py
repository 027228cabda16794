"""Least squares under a mask against dense solves in fp64, row by row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from proxsparse_triton.methods.repair import DAMPENING, masked_least_squares

WIDTH = 40


def hessian_of(kind: str, seed: int = 0, width: int = WIDTH) -> Tensor:
    """Of correlated inputs of unequal scale, exactly symmetric; fp32 [width, width]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = {"few tokens": 3}.get(kind, 400)
    x = torch.randn(tokens, width, generator=generator)
    if kind != "white":
        mix = torch.randn(width, width, generator=generator) + 2 * torch.eye(width)
        x = x @ mix * (torch.rand(width, generator=generator) * 3 + 0.2)
    if kind == "dead columns":
        x[:, [0, 5, 6, 8, 9, 10, 11]] = 0.0  # one, two and four of a block
    if kind == "dead":
        x.zero_()
    h = 2 / tokens * x.T @ x
    return (h + h.T) / 2


def problem(seed: int = 0, rows: int = 23, width: int = WIDTH, kept: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """w0, the start of a mask alone, and the mask: another in every row; of the first two rows nothing and all."""
    generator = torch.Generator().manual_seed(seed + 100)
    w0 = torch.randn(rows, width, generator=generator)
    order = torch.rand(rows, width // 4, 4, generator=generator).topk(kept).indices
    mask = torch.zeros(rows, width // 4, 4, dtype=torch.bool).scatter_(-1, order, True).flatten(1)
    mask[0], mask[1] = False, True
    return w0, w0 * mask, mask


def solved(w0: Tensor, start: Tensor, mask: Tensor, hessian: Tensor, dampening: float) -> Tensor:
    """(H_SS + d I) w_S = (H w0)_S + d start_S in fp64, with its own S in every row."""
    w0, start, hessian = w0.double(), start.double(), hessian.double()
    damp = dampening * hessian.diagonal().mean()
    best = torch.zeros_like(w0)
    for row, kept in enumerate(mask):
        matrix = hessian[kept][:, kept] + damp * torch.eye(int(kept.sum()), dtype=torch.float64)
        best[row, kept] = torch.linalg.solve(matrix, hessian[kept] @ w0[row] + damp * start[row, kept])
    return best


def error(change: Tensor, hessian: Tensor) -> Tensor:
    """(dw H dw^T) of each row, fp64."""
    change = change.double()
    return ((change @ hessian.double()) * change).sum(1)


def objective(w: Tensor, w0: Tensor, start: Tensor, hessian: Tensor, dampening: float) -> Tensor:
    """What is minimised: the error, and the distance from the start."""
    return error(w - w0, hessian) + dampening * hessian.double().diagonal().mean() * (w - start).double().square().sum(1)


@pytest.mark.parametrize("kind", ["correlated", "white", "few tokens", "dead columns"])
@pytest.mark.parametrize("dampening", [DAMPENING, 1.0])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_against_a_dense_solve(kind: str, dampening: float, elsewhere: bool, device: str) -> None:
    """From the weights as they are, and from others, to which the dampening pulls."""
    (w0, start, mask), hessian = problem(), hessian_of(kind)
    if elsewhere:
        start = problem(seed=1)[0] * mask
    best = solved(w0, start, mask, hessian, dampening)
    exact = masked_least_squares(w0.double(), start.double(), mask, hessian, dampening=dampening, iterations=200)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact, best, rtol=1e-6, atol=1e-7)
    found = masked_least_squares(*(part.to(device) for part in (w0, start, mask, hessian)), dampening=dampening).cpu()
    assert found.dtype == torch.float32
    assert not found[~mask].any()
    torch.testing.assert_close(found.double(), best, rtol=1e-3, atol=2e-3)
    reached, lowest = (objective(w, w0, start, hessian, dampening) for w in (found, best))
    torch.testing.assert_close(reached, lowest, rtol=1e-4, atol=1e-4)
    if not elsewhere:
        torch.testing.assert_close(found[1], w0[1], rtol=0, atol=0)  # all kept: nothing to make up for


@pytest.mark.parametrize("kind", ["correlated", "white", "few tokens", "dead columns"])
def test_never_worse_than_the_start(kind: str) -> None:
    """In each row: every iteration lowers what is minimised, and with it the error; in the end by what there is to make up for."""
    (w0, start, mask), hessian = problem(2), hessian_of(kind, 2)
    first = before = error(start - w0, hessian)
    for iterations in (1, 2, 5, 20, 60):
        w = masked_least_squares(w0, start, mask, hessian, dampening=DAMPENING, iterations=iterations)
        pulled = objective(w, w0, start, hessian, DAMPENING)
        assert (pulled <= before * (1 + 1e-5)).all(), iterations
        assert (error(w - w0, hessian) <= first).all(), iterations
        before = pulled
    assert (error(w - w0, hessian)[2:] < 0.99 * first[2:]).all()


def test_bf16_weights_are_solved_in_fp32() -> None:
    w0, _, mask = (part.bfloat16() if part.is_floating_point() else part for part in problem())
    hessian = hessian_of("correlated")
    found = masked_least_squares(w0, w0 * mask, mask, hessian, dampening=DAMPENING)
    assert found.dtype == torch.float32
    assert torch.equal(found, masked_least_squares(w0.float(), (w0 * mask).float(), mask, hessian, dampening=DAMPENING))


@pytest.mark.parametrize("kind", ["correlated", "few tokens", "dead"])
def test_what_is_optimal_stays(kind: str, device: str) -> None:
    """W0 that has the mask already; and a layer without inputs, where nothing can be better."""
    (w0, start, mask), hessian = problem(), hessian_of(kind)
    target = w0 if kind == "dead" else start
    found = masked_least_squares(*(part.to(device) for part in (target, start, mask, hessian)), dampening=DAMPENING).cpu()
    assert torch.equal(found, start)


def test_the_optimum_of_a_mask_is_a_fixed_point() -> None:
    (w0, start, mask), hessian = problem(), hessian_of("correlated").double()
    best = solved(w0, start, mask, hessian, 1e-12)
    again = masked_least_squares(w0.double(), best, mask, hessian, dampening=DAMPENING)
    torch.testing.assert_close(again, best, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("power", [-40, 20])
def test_the_scale_of_the_inputs_does_not_matter(power: int) -> None:
    """H up to a factor: with powers of two, bit for bit."""
    (w0, start, mask), hessian = problem(), hessian_of("correlated")
    one = masked_least_squares(w0, start, mask, hessian, dampening=DAMPENING)
    assert torch.equal(masked_least_squares(w0, start, mask, hessian * 2.0**power, dampening=DAMPENING), one)


@pytest.mark.parametrize("width", [4, 8, 28])
def test_rows_that_are_solved_stay_solved(width: int) -> None:
    """Few weights, inputs of rms 1e-4 and far more iterations than it takes: what is left underflows, and must not be divided by."""
    for seed in range(10):
        w0, start, mask = problem(seed, width=width)
        hessian = 1e-8 * hessian_of("white" if seed % 2 else "correlated", seed, width)
        best = solved(0.02 * w0, 0.02 * start, mask, hessian, DAMPENING)
        for iterations in (60, 600):
            found = masked_least_squares(0.02 * w0, 0.02 * start, mask, hessian, dampening=DAMPENING, iterations=iterations)
            torch.testing.assert_close(found.double(), best, rtol=1e-2, atol=1e-4)


def test_the_input_is_left_alone() -> None:
    parts = (*problem(), hessian_of("correlated"))
    before = [part.clone() for part in parts]
    w0, start, mask, hessian = parts
    masked_least_squares(w0, start, mask, hessian, dampening=DAMPENING)
    assert all(torch.equal(part, old) for part, old in zip(parts, before, strict=True))
