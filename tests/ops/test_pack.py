"""`pack_24` and `unpack_24`: kernels against reference, round trips bit for bit, special values, what is refused, compilation."""

from __future__ import annotations

import itertools

import pytest
import torch
from adversarial import BACKENDS, needs_triton, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from proxsparse_triton.errors import BackendError, ConfigError, ShapeError
from proxsparse_triton.ops import mask_24, pack_24, unpack_24
from proxsparse_triton.reference import pack as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGER = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
NAN, INF = float("nan"), float("inf")
# Rows that end on a word and rows that do not; one, several and no programs (a tile of the interpreter is 8192 pairs of blocks).
SHAPES = [(1, 4), (1, 16), (3, 12), (7, 20), (5, 32), (63, 500), (70, 1000), (40, 2000), (0, 8), (5, 0)]


def weights_and_mask(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights with zeros of both signs, and a mask that keeps some of them."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.7)
    return w.to(dtype), mask_24(torch.rand(shape, generator=generator), backend="reference")


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_are_the_reference(device: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    w, mask = weights_and_mask(shape, dtype)
    sparse = torch.where(mask, w, torch.full_like(w, -0.0))
    for dense, kept in ((w, mask), (sparse, None)):
        values, metadata = pack_24(dense.to(device), None if kept is None else kept.to(device), backend="triton")
        expected = reference.pack_24(dense, kept)
        assert (values.shape, metadata.shape) == ((shape[0], shape[1] // 2), (shape[0], -(-shape[1] // 16)))
        assert (metadata.dtype, metadata.device.type) == (torch.int16, device)
        assert same_bits(values, expected[0])
        assert torch.equal(metadata.cpu(), expected[1])
        back = unpack_24(values, metadata, shape, backend="triton")
        assert back.shape == shape
        assert same_bits(back, reference.unpack_24(*expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_and_unaligned_views(device: str, backend: str) -> None:
    base = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    unaligned = base.flatten()[1 : 1 + 16 * 48].view(16, 48)
    for w in (base.t(), base[::2, :32], base[:, ::4], base[0].expand(3, 64), base[3:], unaligned):
        mask = mask_24(w.abs())
        if not w.is_contiguous():
            mask = mask.t().contiguous().t()
        values, metadata = pack_24(w, mask, backend=backend)
        assert values.is_contiguous()
        assert metadata.is_contiguous()
        plain = pack_24(w.clone(memory_format=torch.contiguous_format), mask.contiguous(), backend=backend)
        assert same_bits(values, plain[0])
        assert torch.equal(metadata, plain[1])
        views = (torch.stack([x, x], -1)[..., 0] for x in (values, metadata))
        assert same_bits(unpack_24(*views, w.shape, backend=backend), torch.where(mask, w, 0.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_block_of_special_values(device: str, dtype: torch.dtype, backend: str) -> None:
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the smallest denormal
    blocks = torch.tensor(list(itertools.product((NAN, -INF, 1.5, -tiny, -0.0, 0.0), repeat=4)), dtype=dtype)
    sparse = blocks[(blocks != 0).sum(-1) <= 2].flatten()[None]  # one row: every nibble of a word, and its end
    values, metadata = pack_24(sparse.to(device), backend=backend)
    expected = reference.pack_24(sparse, None)
    assert same_bits(values, expected[0])
    assert torch.equal(metadata.cpu(), expected[1])
    assert same_bits(unpack_24(values, metadata, sparse.shape, backend=backend), torch.where(sparse == 0, 0.0, sparse))


@settings(deadline=None, max_examples=40)
@given(data=st.data(), rows=st.integers(1, 3), blocks=st.integers(1, 9), dtype=st.sampled_from(DTYPES))
@pytest.mark.parametrize("backend", BACKENDS)
def test_round_trip_of_any_bits(device: str, backend: str, data: st.DataObject, rows: int, blocks: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    limit = torch.iinfo(INTEGER[dtype])
    bits = torch.randint(limit.min, limit.max + 1, (rows, 4 * blocks), generator=generator).to(INTEGER[dtype])
    w = bits.view(dtype).to(device)
    mask = mask_24(torch.rand(w.shape, generator=generator), backend="reference").to(device)
    packed = pack_24(w, mask, backend=backend)
    assert same_bits(packed[0], w[mask].view(rows, -1))
    sparse = unpack_24(*packed, w.shape, backend=backend)
    assert same_bits(sparse, torch.where(mask, w, 0.0))
    # Without a mask the same weight comes back, with the sign of zeros lost; where no kept weight is zero also the same packing.
    again = pack_24(sparse, backend=backend)
    assert same_bits(unpack_24(*again, w.shape, backend=backend), torch.where(sparse == 0, 0.0, sparse))
    if (w[mask] != 0).all():
        assert same_bits(again[0], packed[0])
        assert torch.equal(again[1], packed[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_are_positions_0_and_1(device: str, backend: str) -> None:
    values, metadata = pack_24(torch.full((2, 36), -0.0, device=device), backend=backend)
    assert same_bits(values, torch.zeros(2, 18))
    assert (metadata == 0x4444).all()


@needs_triton
@pytest.mark.parametrize("shape", [(63, 500), (7, 32)])
def test_everything_is_written(device: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    w, mask = weights_and_mask(shape, torch.bfloat16)
    expected = reference.pack_24(w, mask)
    empty = torch.empty

    def poisoned(*args, **kwargs):  # type: ignore[no-untyped-def]
        out = empty(*args, **kwargs)
        return out.fill_(NAN if out.is_floating_point() else -1)  # a nibble 15 is never right

    monkeypatch.setattr(torch, "empty", poisoned)
    values, metadata = pack_24(w.to(device), mask.to(device), backend="triton")
    assert same_bits(values, expected[0])
    assert torch.equal(metadata.cpu(), expected[1])
    assert same_bits(unpack_24(values, metadata, shape, backend="triton"), torch.where(mask, w, 0.0))


def test_fp64_takes_the_reference(device: str) -> None:
    w = torch.tensor([[0.0, 1 + 1e-15, 0.0, 1.0]], dtype=torch.float64, device=device)
    values, metadata = pack_24(w)
    assert values.tolist() == [[1 + 1e-15, 1.0]]
    assert torch.equal(unpack_24(values, metadata, w.shape), w)
    with pytest.raises(BackendError, match="unpack_24: expected fp32, fp16 or bf16 for backend='triton', got float64"):
        unpack_24(values, metadata, w.shape, backend="triton")


def test_results_have_no_graph(device: str) -> None:
    w = torch.randn(2, 8, device=device, requires_grad=True)
    values, metadata = pack_24(w, mask_24(w.abs()))
    assert not values.requires_grad
    assert not unpack_24(values.requires_grad_(), metadata, w.shape).requires_grad


@settings(deadline=None, max_examples=20)
@given(row=st.integers(0, 2), block=st.integers(0, 6), filler=st.sampled_from([1.0, NAN, -INF, 1e-45]), kept=st.integers(3, 4))
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_of_three_is_found_anywhere(device: str, backend: str, row: int, block: int, filler: float, kept: int) -> None:
    w = torch.zeros(3, 28, device=device)
    w[row, 4 * block : 4 * block + kept] = filler
    message = rf"pack_24: expected at most 2 non-zeros of every 4 weights, got {kept} in block \({row}, {block}\) \(1 blocks have more\)"
    with pytest.raises(ShapeError, match=message):
        pack_24(w, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_of_many_wrong_blocks_is_named(device: str, backend: str) -> None:
    w = torch.ones(50, 16, device=device)
    w[0] = 0
    with pytest.raises(
        ShapeError, match=r"got 4 in block \(1, 0\) \(196 blocks have more\)\. Prune w first, or pass the mask to pack with\."
    ):
        pack_24(w, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kept", [0, 1, 3, 4])
def test_a_mask_keeps_two_of_every_block(device: str, backend: str, kept: int) -> None:
    mask = mask_24(torch.rand(5, 20), backend="reference")
    mask[2, 8:12] = torch.arange(4) < kept
    message = rf"pack_24: expected 2 kept of every 4 in the mask of w, got {kept} in block \(2, 2\) \(1 blocks are wrong\)"
    with pytest.raises(ShapeError, match=message):
        pack_24(torch.zeros(5, 20, device=device), mask.to(device), backend=backend)


def test_errors_of_pack() -> None:
    w, mask = torch.zeros(2, 8), torch.zeros(2, 8, dtype=torch.bool)
    with pytest.raises(TypeError, match="pack_24: expected a tensor for w, got list"):
        pack_24([[1.0, 2.0, 3.0, 4.0]])
    with pytest.raises(TypeError, match=r"pack_24: expected float32, float16, bfloat16 or float64 for w, got torch\.int8"):
        pack_24(w.to(torch.int8))
    with pytest.raises(ShapeError, match=r"pack_24: expected the last dimension divisible by 4, got shape \(2, 6\)"):
        pack_24(torch.zeros(2, 6))
    for shape in ((8,), (2, 2, 8)):
        with pytest.raises(ShapeError, match=r"pack_24: expected w of shape \[out, in_features\], got \(.*8.*\)\. Pack one linear layer"):
            pack_24(torch.zeros(shape))
    with pytest.raises(TypeError, match=r"pack_24: expected a bool tensor for mask, got torch\.float32\. True marks a kept weight\."):
        pack_24(w, w)
    with pytest.raises(TypeError, match="pack_24: expected a bool tensor for mask, got list"):
        pack_24(w, mask.tolist())
    with pytest.raises(ShapeError, match=r"pack_24: expected mask of shape \(2, 8\), got \(8,\)"):
        pack_24(w, mask[0])
    with pytest.raises(ConfigError, match="pack_24: expected mask on cpu, got meta"):
        pack_24(w, mask.to("meta"))
    with pytest.raises(ConfigError, match="pack_24: expected backend"):
        pack_24(w, backend="cuda")


def test_errors_of_unpack() -> None:
    values, metadata = pack_24(torch.zeros(2, 24))
    with pytest.raises(TypeError, match="unpack_24: expected a tensor for values, got list"):
        unpack_24(values.tolist(), metadata, (2, 24))
    with pytest.raises(TypeError, match=r"unpack_24: expected float32, float16, bfloat16 or float64 for values, got torch\.int16"):
        unpack_24(metadata, metadata, (2, 24))
    with pytest.raises(ShapeError, match=r"unpack_24: expected the last dimension divisible by 4, got shape \(2, 22\)"):
        unpack_24(values, metadata, (2, 22))
    with pytest.raises(
        ShapeError, match=r"unpack_24: expected a shape \(out, in_features\), got \(24,\)\. Unpack one linear layer at a time"
    ):
        unpack_24(values, metadata, (24,))
    with pytest.raises(ShapeError, match=r"unpack_24: expected values of shape \(2, 14\), got \(2, 12\)"):
        unpack_24(values, metadata, (2, 28))
    with pytest.raises(
        TypeError, match=r"unpack_24: expected an int16 tensor for metadata, got torch\.int32\. Pass it as pack_24 returns it"
    ):
        unpack_24(values, metadata.int(), (2, 24))
    with pytest.raises(TypeError, match="unpack_24: expected an int16 tensor for metadata, got NoneType"):
        unpack_24(values, None, (2, 24))
    with pytest.raises(ShapeError, match=r"unpack_24: expected metadata of shape \(2, 2\), got \(4,\)"):
        unpack_24(values, metadata.flatten(), (2, 24))
    with pytest.raises(ConfigError, match="unpack_24: expected metadata on cpu, got meta"):
        unpack_24(values, metadata.to("meta"), (2, 24))
    with pytest.raises(ConfigError, match="unpack_24: expected backend"):
        unpack_24(values, metadata, (2, 24), backend="cuda")


@needs_triton
def test_the_kernel_stays_inside_the_weight_whatever_the_metadata(device: str) -> None:
    room = torch.full((4, 20), 7.0, device=device)
    from proxsparse_triton.kernels import launch, pack

    metadata = torch.arange(-4, 4, dtype=torch.int16, device=device).view(2, 4)[:, :2].contiguous()
    pack.unpack_24(torch.ones(2, 10, device=device), metadata, room[1:3], launch.blockwise(device == "cpu"))
    assert (room[[0, 3]] == 7).all()
    assert ((room[1:3] == 0) | (room[1:3] == 1)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(device: str, backend: str) -> None:
    w = torch.randn(3, 24, device=device)
    for dense in (w, w.to(torch.bfloat16), torch.randn(8, 4, device=device).t(), torch.randn(0, 4, device=device)):
        mask = mask_24(dense.abs())
        torch.library.opcheck(torch.ops.proxsparse.pack_24.default, (dense, mask, backend))
        torch.library.opcheck(torch.ops.proxsparse.pack_24.default, (dense * mask, None, backend))
        torch.library.opcheck(torch.ops.proxsparse.unpack_24.default, (*pack_24(dense, mask), backend))


def test_compiles_into_one_graph(device: str) -> None:
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def there_and_back(w: Tensor) -> Tensor:
        values, metadata = pack_24(w, mask_24(w.abs()))
        return unpack_24(2 * values, metadata, w.shape)

    w = torch.randn(6, 8, device=device)
    assert torch.equal(there_and_back(w), 2 * torch.where(mask_24(w.abs()), w, 0.0))
