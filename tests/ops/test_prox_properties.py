"""`prox_24`: what holds for every input, by hypothesis, on both backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from adversarial import (
    BACKENDS,
    HAVE_TRITON,
    LOW,
    WORSE,
    assert_same_solution,
    same_bits,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from proxsparse_triton.ops import prox_24
from proxsparse_triton.reference.block import objective, regulariser
from proxsparse_triton.reference.prox import prox_24_exhaustive
from proxsparse_triton.sparsity import count_negative_zeros

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter


@pytest.fixture(autouse=True, scope="module")
def many_programs() -> Iterator[None]:
    """Smaller tiles under the interpreter, so that several programs share the work there too."""
    with pytest.MonkeyPatch.context() as patch:
        if HAVE_TRITON:
            from proxsparse_triton.kernels import launch

            patch.setattr(launch, "INTERPRETER_TILE", 2048)
        yield


magnitudes = st.one_of(st.just(0.0), st.sampled_from([0.25, 1.0, 1.5]), st.floats(2.0**-20, 2.0**14, width=32))
numbers = st.builds(lambda size, negative: -size if negative else size, magnitudes, st.booleans())
blocks = st.lists(st.lists(numbers, min_size=4, max_size=4), min_size=1, max_size=24).map(torch.tensor)
lambdas = st.one_of(st.sampled_from([0.3, 0.5, 1.0, 3.0]), st.floats(2.0**-10, 2.0**10, width=32))
powers = st.integers(-8, 8).map(lambda k: 2.0**k)


def prop(test: Callable[..., None]) -> Callable[..., None]:
    """On both backends; few examples of many blocks, since an interpreted launch takes a tenth of a second however small."""
    return pytest.mark.parametrize("backend", BACKENDS)(settings(deadline=None, max_examples=12)(test))


@prop
@given(z=st.lists(st.floats(width=32), min_size=8, max_size=8).map(torch.tensor))
def test_zero_strength_is_the_identity_bit_for_bit(device: str, backend: str, z: Tensor) -> None:
    for dtype in (torch.float32, *LOW):
        assert same_bits(prox_24(z.to(dtype).to(device), 0, backend=backend), z.to(dtype))


@prop
@given(z=blocks, lam=lambdas, dropped=st.permutations(range(4)))
def test_two_kept_blocks_are_fixed_points_bit_for_bit(device: str, backend: str, z: Tensor, lam: float, dropped: list[int]) -> None:
    z[:, dropped[:2]] = 0
    scale = torch.tensor([0.3, 3, 1, 0.7], device=device)
    expected = torch.where(z == 0, 0.0, z)  # -0.0 becomes +0.0
    assert same_bits(prox_24(z.to(device), lam, backend=backend), expected)
    assert same_bits(prox_24(z.to(device), lam, column_scale=scale, backend=backend), expected)


@prop
@given(z=blocks, lam=lambdas)
def test_signs_sizes_and_order(device: str, backend: str, z: Tensor, lam: float) -> None:
    """Signs are kept, nothing grows, larger weights stay larger, at least the two largest survive, no -0.0."""
    w = prox_24(z.to(device), lam, backend=backend).cpu()
    assert ((w == 0) | (w.sign() == z.sign())).all()
    assert (w.abs() <= z.abs()).all()
    assert count_negative_zeros(w) == 0
    order = z.abs().sort(dim=-1, descending=True, stable=True).indices
    ranked = w.abs().gather(-1, order)
    assert (ranked.diff() <= 1e-6 * z.abs().amax(-1, keepdim=True)).all()
    assert torch.equal(ranked[:, :2] > 0, z.abs().gather(-1, order)[:, :2] > 0)


@prop
@given(z=blocks, lam=lambdas, signs=st.lists(st.sampled_from([-1.0, 1.0]), min_size=4, max_size=4).map(torch.tensor))
def test_signs_commute_bit_for_bit(device: str, backend: str, z: Tensor, lam: float, signs: Tensor) -> None:
    w = prox_24(z.to(device), lam, backend=backend).cpu()
    assert torch.equal(prox_24((signs * z).to(device), lam, backend=backend).cpu(), signs * w)


@prop
@given(z=blocks, lam=lambdas, order=st.permutations(range(4)))
def test_permutations_commute(device: str, backend: str, z: Tensor, lam: float, order: list[int]) -> None:
    """Bit for bit in the reference, which sorts. The kernel's sweeps start at the last weight, and its sort keys hold the position in
    their lowest two bits: there the solutions are the same up to rounding."""
    w = prox_24(z.to(device), lam, backend=backend).cpu()
    permuted = prox_24(z[:, order].to(device), lam, backend=backend).cpu()
    assert_same_solution(permuted, w[:, order], z[:, order], lam)
    if backend == "reference":
        # At a tie it is the position, not the value, that decides who is dropped.
        assert same_bits(permuted.abs().sort(-1).values, w.abs().sort(-1).values)
        distinct = (z.abs().sort(-1).values.diff() > 0).all(-1)
        assert torch.equal(permuted[distinct], w[distinct][:, order])


@prop
@given(z=blocks, lam=lambdas, s=powers)
def test_scale_law(device: str, backend: str, z: Tensor, lam: float, s: float) -> None:
    """prox_lam(s z) = s prox_(lam s)(z), exactly for powers of two; hence a uniform column scale c acts as lam c."""
    expected = prox_24(z.to(device), lam * s, backend=backend).cpu()
    assert same_bits(prox_24((s * z).to(device), lam, backend=backend), s * expected)
    assert same_bits(prox_24(z.to(device), lam, column_scale=torch.full((4,), s, device=device), backend=backend), expected)


@prop
@given(z=blocks, lam=lambdas, c=st.lists(st.floats(0.125, 8, width=32), min_size=4, max_size=4).map(torch.tensor))
def test_never_worse_than_the_oracle(device: str, backend: str, z: Tensor, lam: float, c: Tensor) -> None:
    for scale in (None, c):
        w = prox_24(z.to(device), lam, column_scale=None if scale is None else scale.to(device), backend=backend).cpu()
        metric = 1.0 if scale is None else scale.double()
        u = z.double() * metric
        best = objective(prox_24_exhaustive(u, lam, sweeps=12), u, lam)
        assert (objective(w.double() * metric, u, lam) - best <= WORSE * 0.5 * u.square().sum(-1)).all()


@prop
@given(z=blocks, lam=lambdas, more=st.floats(1.0, 4.0))
def test_a_larger_strength_regularises_more(device: str, backend: str, z: Tensor, lam: float, more: float) -> None:
    """R(prox_lam(z)) falls with lam, for any R; the number of kept weights need not."""
    weak, strong = (regulariser(prox_24(z.to(device), x, backend=backend).cpu().double()) for x in (lam, lam * more))
    # Adding the two optimality conditions, each within WORSE, bounds the slack.
    slack = WORSE * z.double().square().sum(-1) / max(lam * (more - 1), 1e-30)
    assert (strong <= weak + slack).all()
