"""`mask_24`: kernel against reference, ties, special values, errors, compilation."""

from __future__ import annotations

import itertools

import pytest
import torch
from adversarial import BACKENDS, all_blocks, needs_triton
from hypothesis import given, settings
from hypothesis import strategies as st

from proxsparse_triton.errors import ConfigError, ShapeError
from proxsparse_triton.ops import mask_24
from proxsparse_triton.reference.mask import mask_24 as reference
from proxsparse_triton.sparsity import check_mask

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAN, INF = float("nan"), float("inf")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4,), (1, 4), (3, 4), (63, 500), (7, 12), (2, 3, 8), (0, 8), (5, 0), (2, 0, 4)])
def test_kernel_is_the_reference(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    # Multiples of a half: many exact ties.
    scores = (2 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).round().div(2).to(dtype)
    mask = mask_24(scores.to(device), backend="triton")
    assert (mask.dtype, mask.shape, mask.device.type) == (torch.bool, torch.Size(shape), device)
    assert torch.equal(mask.cpu(), reference(scores))
    check_mask("test", "scores", mask)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_block_of_special_values(device: str, dtype: torch.dtype, backend: str) -> None:
    blocks = torch.tensor(list(itertools.product((NAN, -INF, -1.0, -0.0, 0.0, 2.0, INF), repeat=4)), dtype=dtype)
    assert torch.equal(mask_24(blocks.to(device), backend=backend).cpu(), reference(blocks.double()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_adversarial_magnitudes(device: str, backend: str) -> None:
    scores = all_blocks().abs().float()
    mask = mask_24(scores.to(device), backend=backend).cpu()
    kept, dropped = scores[mask].view(-1, 2), scores[~mask].view(-1, 2)
    assert (kept.amin(-1) >= dropped.amax(-1)).all()
    assert torch.equal(mask, reference(scores))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lowest_index(device: str, backend: str) -> None:
    scores = torch.tensor([[1.0, 1, 1, 1], [0, 1, 1, 1], [1, 2, 1, 1], [1, 1, 2, 2], [2, 1, 1, 2], [NAN, NAN, NAN, 1], [-0.0, 0, 0, -0.0]])
    expected = [[1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1], [1, 1, 0, 0]]
    assert mask_24(scores.to(device), backend=backend).int().tolist() == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_views(device: str, backend: str) -> None:
    base = torch.randn(24, 40, generator=torch.Generator().manual_seed(1)).to(device)
    for view in (base.t(), base[::2, :20], base[:, ::5], base[0].expand(3, 40), base.view(4, 6, 40).transpose(0, 1)):
        assert torch.equal(mask_24(view, backend=backend), mask_24(view.contiguous(), backend=backend))
        assert torch.equal(mask_24(view, backend=backend).cpu(), reference(view.cpu()))


def test_fp64_takes_the_reference(device: str) -> None:
    scores = torch.tensor([[1.0, 1 + 1e-15, 1 + 2e-15, 1]], dtype=torch.float64, device=device)
    assert mask_24(scores).tolist() == [[False, True, True, False]]


@settings(deadline=None, max_examples=40)
@given(block=st.lists(st.floats(width=32), min_size=4, max_size=4), order=st.permutations(range(4)))
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_largest_whatever_the_order(device: str, backend: str, block: list[float], order: list[int]) -> None:
    scores = torch.tensor([block, [block[i] for i in order]])
    mask = mask_24(scores.to(device), backend=backend).cpu()
    assert mask.sum(-1).tolist() == [2, 2]
    numbers = scores.nan_to_num(-INF, INF, -INF)
    top = numbers.sort(-1, descending=True).values[:, :2]
    assert torch.equal(numbers[mask].view(2, 2).sort(-1, descending=True).values, top)


def test_default_on_the_cpu_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert mask_24(torch.tensor([1.0, 2, 3, 4])).tolist() == [False, False, True, True]


def test_mask_has_no_graph(device: str) -> None:
    scores = torch.randn(2, 8, device=device, requires_grad=True)
    assert not mask_24(scores).requires_grad


def test_errors() -> None:
    with pytest.raises(TypeError, match="mask_24: expected a tensor for scores, got list"):
        mask_24([1.0, 2.0, 3.0, 4.0])
    with pytest.raises(TypeError, match=r"mask_24: expected float32, float16, bfloat16 or float64 for scores, got torch\.int64"):
        mask_24(torch.arange(4))
    with pytest.raises(ShapeError, match=r"mask_24: expected the last dimension divisible by 4, got shape \(2, 6\)"):
        mask_24(torch.zeros(2, 6))
    with pytest.raises(ShapeError, match="mask_24: expected a tensor of at least one dimension"):
        mask_24(torch.tensor(1.0))
    with pytest.raises(ConfigError, match="mask_24: expected backend"):
        mask_24(torch.zeros(4), backend="cuda")


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(device: str, backend: str) -> None:
    for scores in (torch.randn(3, 8, device=device), torch.randn(8, 4, device=device).t(), torch.randn(0, 4, device=device)):
        torch.library.opcheck(torch.ops.proxsparse.mask_24.default, (scores, backend))


def test_compiles_into_one_graph(device: str) -> None:
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def masked(w: torch.Tensor) -> torch.Tensor:
        return w * mask_24(w.abs())

    w = torch.randn(6, 8, device=device)
    assert torch.equal(masked(w), w * mask_24(w.abs()))
