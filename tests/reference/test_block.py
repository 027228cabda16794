"""The candidates of the exact solver: each valid one is a stationary point and a minimum of its face."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from adversarial import LAMBDAS, all_blocks
from torch import Tensor

from proxsparse_triton.reference import block


def sorted_problems(easy: bool | None) -> Tensor:
    """u = lam |z| sorted descending over all lambdas, u1 <= 2; easy: 2 (u1 + u2 + u3 - u4) <= 1."""
    u = torch.cat([lam * all_blocks().abs().sort(-1, descending=True).values for lam in LAMBDAS[1:]])
    u = u[(u[:, 0] <= 2) & (u[:, 0] > 0)]
    if easy is None:
        return u
    return u[(2 * (u[:, :3].sum(-1) - u[:, 3]) <= 1) == easy]


SOLVERS = [
    pytest.param(block.three_kept, None, 3, id="three"),
    pytest.param(block.four_kept_easy, True, 4, id="four-easy"),
    pytest.param(block.four_kept_hard, False, 4, id="four-hard"),
]


@pytest.mark.parametrize(("solver", "easy", "kept"), SOLVERS)
def test_a_valid_candidate_is_an_interior_minimum_of_its_face(
    solver: Callable[[Tensor], block.Point], easy: bool | None, kept: int
) -> None:
    u = sorted_problems(easy)
    point = solver(u)
    assert point.w.shape == u.shape
    assert point.valid.sum() > 1000
    w, u = point.w[point.valid].requires_grad_(), u[point.valid]
    assert (w[:, :kept] > 0).all()
    assert (w[:, kept:] == 0).all()
    assert (w <= u + 1e-12 * u[:, :1]).all()
    value = block.objective(w, u).sum()
    (gradient,) = torch.autograd.grad(value, w)
    slope = gradient[:, :kept].abs().amax(-1) / u[:, 0]
    assert (slope <= 1e-12).double().mean() > 0.999
    assert slope.max() < 1e-5  # near a singular Hessian Newton's last steps only halve the error; the objective is flat there
    hessian = torch.eye(kept, dtype=u.dtype).repeat(len(u), 1, 1)
    rest = w.detach().sum(-1)
    for i in range(kept):
        for j in range(kept):
            if i != j:
                hessian[:, i, j] = rest - w.detach()[:, i] - w.detach()[:, j]
    assert torch.linalg.eigvalsh(hessian)[:, 0].min() > -1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_more_newton_step_changes_nothing(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    u = sorted_problems(None).to(dtype)
    before = block.objective(block.solve(u).double(), u.double())
    for name in ("STEPS_THREE", "STEPS_FOUR_HARD", "STEPS_FOUR_EASY"):
        monkeypatch.setattr(block, name, getattr(block, name) + 1)
    after = block.objective(block.solve(u).double(), u.double())
    assert ((after - before).abs() <= 1e-8 * 0.5 * u.double().square().sum(-1)).all()


def test_a_large_leader_settles_a_block() -> None:
    """No minimum with three or four kept weights has u1 > 2."""
    u = sorted_problems(None)
    u = u * (2.001 / u[:, :1])
    assert not block.three_kept(u).valid.any()
    assert torch.equal(block.solve(u)[:, 2:], torch.zeros_like(u[:, 2:]))


def test_candidates_without_an_interior_minimum_are_refused() -> None:
    u = torch.tensor([[0.9, 0.9, 0.1, 0.05]], dtype=torch.float64)
    assert not block.three_kept(u).valid.any()
    assert not block.four_kept_hard(u).valid.any()
    assert block.solve(u).tolist() == [[0.9, 0.9, 0.0, 0.0]]


def test_ties_between_faces_go_to_the_sparser_point() -> None:
    """On z3 = lam z1 z2 the three-kept point has shrunk to the two-kept one."""
    u = torch.tensor([[0.5, 0.25, 0.125, 0.0]], dtype=torch.float64)
    assert block.solve(u).tolist() == [[0.5, 0.25, 0.0, 0.0]]
