"""`masked_weight_24`: both backends against a loop over blocks and against each other, then edges, `out`, errors and compilation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from adversarial import BACKENDS, HAVE_TRITON, LOW, all_blocks, needs_triton, same_bits, weights
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from proxsparse_triton.errors import BackendError, ConfigError, ShapeError
from proxsparse_triton.ops import mask_24, masked_weight_24
from proxsparse_triton.reference.masked import masked_weight_24 as reference

DTYPES = (torch.float32, *LOW)
MIXES = list(itertools.product(DTYPES, DTYPES))  # of w, of w0
NAN, INF = float("nan"), float("inf")
SHAPES = [(4,), (1, 4), (3, 4), (63, 500), (7, 12), (2, 3, 8), (0, 8), (5, 0), (2, 0, 4)]

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter


@pytest.fixture(autouse=True, scope="module")
def many_programs() -> Iterator[None]:
    """Smaller tiles under the interpreter, so that several programs share the work there too."""
    with pytest.MonkeyPatch.context() as patch:
        if HAVE_TRITON:
            from proxsparse_triton.kernels import launch

            patch.setattr(launch, "INTERPRETER_TILE", 1024)
        yield


def column_scales(width: int) -> Tensor:
    return torch.rand(width, generator=torch.Generator().manual_seed(9)) + 0.1


def by_hand(w: Tensor, w0: Tensor, c: Tensor | None = None) -> Tensor:
    """One block after the other, in Python: the scores as numpy multiplies, the order as Python sorts."""
    number = np.float64 if w.dtype == torch.float64 else np.float32
    width = w.shape[-1]
    scales = [number(1)] * width if c is None else [max(number(x), number(1e-20)) for x in c.tolist()]
    scores = [abs(number(x)) * scales[i % width] for i, x in enumerate(w.flatten().tolist())]
    converted = w0.to(w.dtype).flatten()
    expected = torch.zeros_like(converted)
    for start in range(0, len(scores), 4):
        order = sorted(range(start, start + 4), key=lambda i: (INF if math.isnan(scores[i]) else -scores[i], i))
        expected[order[:2]] = converted[order[:2]]
    return expected.view(w.shape)


def run(w: Tensor, w0: Tensor, c: Tensor | None, device: str, backend: str) -> Tensor:
    scale = None if c is None else c.to(device)
    out = masked_weight_24(w.to(device), w0.to(device), column_scale=scale, backend=backend)
    assert (out.shape, out.dtype, out.device.type, out.is_contiguous()) == (w.shape, w.dtype, device, True)
    return out.cpu()


# --- against the loop, the other backend and mask_24 -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_loop(device: str, poisoned: None, shape: tuple[int, ...], scaled: bool, backend: str) -> None:
    w, w0 = weights(shape), weights(shape, seed=1)  # many exact ties
    c = column_scales(shape[-1]) if scaled else None
    assert same_bits(run(w, w0, c, device, backend), by_hand(w, w0, c))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize(("dtype", "dtype0"), MIXES)
def test_every_mix_of_dtypes(device: str, poisoned: None, dtype: torch.dtype, dtype0: torch.dtype, scaled: bool, backend: str) -> None:
    w, w0 = weights((7, 36)).to(dtype), weights((7, 36), seed=1).mul(1.001).to(dtype0)
    c = column_scales(36) if scaled else None
    assert same_bits(run(w, w0, c, device, backend), by_hand(w, w0, c))


@needs_triton
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize(("dtype", "dtype0"), MIXES)
def test_backends_and_mask_24_agree_bit_for_bit(device: str, dtype: torch.dtype, dtype0: torch.dtype, scaled: bool) -> None:
    w, w0 = all_blocks().view(-1, 40).to(dtype), all_blocks().view(-1, 40).flip(0).to(dtype0)
    w[::7, ::3] = NAN
    w[::5, ::4] = -INF
    c = column_scales(40) if scaled else None
    expected = reference(w, w0, column_scale=c)
    assert same_bits(run(w, w0, c, device, "triton"), expected)
    mask = mask_24(w.abs().float() if c is None else w.abs().float() * c, backend="reference")
    assert same_bits(expected, torch.where(mask, w0.to(dtype), torch.zeros((), dtype=dtype)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_block_of_special_values(device: str, poisoned: None, dtype: torch.dtype, scaled: bool, backend: str) -> None:
    w = torch.tensor(list(itertools.product((NAN, -INF, -1.0, -0.0, 2.0, INF), repeat=4)), dtype=dtype)
    w0 = (torch.arange(w.numel()).view_as(w) % 251 - 125.5).to(dtype)
    # An infinite scale makes a NaN of a zero, and a tie of everything else.
    for c in ([0.5, 2.0, 0.0, 2.0], [INF, 1.0, INF, 1.0]) if scaled else (None,):
        scale = None if c is None else torch.tensor(c)
        assert same_bits(run(w, w0, scale, device, backend), by_hand(w, w0, scale))


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_fp64_is_compared_in_fp64(device: str, scaled: bool, backend: str | None) -> None:
    w = torch.tensor([[1.0, 1 + 1e-15, 1 + 2e-15, 1]], dtype=torch.float64)
    w0 = torch.tensor([[1.0, 2, 3, 4]], dtype=torch.float64) / 3
    c = torch.full((4,), 2.0) if scaled else None
    out = run(w, w0, c, device, backend)  # type: ignore[arg-type]
    assert out.tolist() == [[0, 2 / 3, 1, 0]]
    assert same_bits(out, by_hand(w, w0, c))


# --- which weights ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lowest_index(device: str, backend: str) -> None:
    w = torch.tensor([[1.0, -1, 1, 1], [0, 1, -1, 1], [1, -2, 1, 1], [1, 1, 2, -2], [2, 1, 1, -2], [NAN, NAN, NAN, 0], [-0.0, 0, 0, 0]])
    w0 = torch.tensor([5.0, 6, 7, 8]).expand(7, 4)
    kept = [[5, 6, 0, 0], [0, 6, 7, 0], [5, 6, 0, 0], [0, 0, 7, 8], [5, 0, 0, 8], [5, 0, 0, 8], [5, 6, 0, 0]]
    assert run(w, w0, None, device, backend).tolist() == kept


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_are_fp32_products(device: str, backend: str) -> None:
    """Neither exact, where (1 + e)^2 exceeds 1 + 2 e, nor rounded to the dtype of w, where close scales would tie."""
    e = 2.0**-23
    w, c = torch.tensor([1.0, 2, 1 + e, 0]), torch.tensor([1 + 2 * e, 1, 1 + e, 1])
    w0 = torch.tensor([5.0, 6, 7, 8])
    assert run(w, w0, c, device, backend).tolist() == [5, 6, 0, 0]
    assert run(w.double(), w0.double(), c.double(), device, "reference").tolist() == [0, 6, 7, 0]
    for dtype in LOW:
        w, c = torch.tensor([1.0, 2, 1, 0], dtype=dtype), torch.tensor([1.0, 1, 1 + e, 1])
        assert run(w, w0.to(dtype), c, device, backend).tolist() == [0, 6, 7, 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dead_column_is_kept_last_but_by_size(device: str, dtype: torch.dtype, backend: str) -> None:
    """Scales below 1e-20 are read as that: dead columns differ among themselves by |w|, and not by scale."""
    w = torch.tensor([[1.0, -2, 3, 0.25], [3, 2, -3, 0.25]], dtype=dtype)
    w0 = torch.tensor([5.0, 6, 7, 8], dtype=dtype).expand(2, 4)
    for c in ([0, 0, 0, 1.0], [9e-21, 1e-30, 0, 1], [1e-40, 0, -1, 1]):
        assert run(w, w0, torch.tensor(c), device, backend).tolist() == [[0, 0, 7, 8], [5, 0, 0, 8]]
    assert run(w[:1], w0[:1], torch.tensor([0, 3e-20, 0, 1]), device, backend).tolist() == [[0, 6, 0, 8]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_denormals_are_not_flushed(device: str, dtype: torch.dtype, backend: str) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    w = torch.tensor([0.25, -0.5, 0.125, -0.75]).mul(tiny).to(dtype)
    w0 = torch.tensor([0.5, -0.25, 0.125, -0.5]).mul(tiny).to(dtype)
    expected = torch.stack([torch.zeros((), dtype=dtype), w0[1], torch.zeros((), dtype=dtype), w0[3]])
    assert same_bits(run(w, w0, None, device, backend), expected)
    assert same_bits(run(w, w0, torch.ones(4), device, backend), expected)


# --- what is written -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropped_weights_are_positive_zeros_and_kept_ones_untouched(device: str, dtype: torch.dtype, backend: str) -> None:
    """Whatever they are: a dropped NaN or infinity leaves nothing behind, a kept one and a kept -0.0 stay."""
    w = torch.tensor([[3.0, -2, 1, 0], [0, 1, 2, 3], [1, 0, 0, 1]], dtype=dtype)
    w0 = torch.tensor([[-1.5, -0.0, -1.0, -0.0], [NAN, -INF, -INF, NAN], [-NAN, -INF, NAN, INF]], dtype=dtype)
    expected = torch.tensor([[-1.5, -0.0, 0.0, 0.0], [0.0, 0.0, -INF, NAN], [-NAN, 0.0, 0.0, INF]], dtype=dtype)
    assert same_bits(run(w, w0, None, device, backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_a_kept_nan_stay(device: str, dtype: torch.dtype, backend: str) -> None:
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    quiet = torch.tensor([NAN], dtype=dtype).view(bits)
    w0 = (quiet.expand(8) + torch.arange(8, dtype=bits)).view(dtype).view(2, 4)
    assert w0.isnan().all()
    out = run(torch.tensor([[1.0, 0, 2, 0], [0, 1, 0, 2]], dtype=dtype), w0, None, device, backend)
    zero = torch.zeros((), dtype=dtype)
    assert same_bits(out, torch.stack([w0[0, 0], zero, w0[0, 2], zero, zero, w0[1, 1], zero, w0[1, 3]]).view(2, 4))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conversion_rounds_to_nearest_even(device: str, dtype: torch.dtype, backend: str) -> None:
    """Half an ulp beyond an even and an odd number, just above half, and out of range."""
    for low, ulp in ((torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)):
        w0 = torch.tensor([1 + ulp / 2, -1 - 1.5 * ulp, 1 + 0.51 * ulp, 0, 1e-30, -1e-30, 1e30, -1e30], dtype=dtype)
        w = torch.tensor([[2.0, 1, 0, 0, 2, 1, 0, 0], [0, 0, 2, 1, 0, 0, 2, 1]], dtype=low)
        out = run(w, w0.expand(2, 8), None, device, backend)
        small, large = (0.0, INF) if low == torch.float16 else w0[[4, 6]].to(low).tolist()
        expected = [[1, -1 - 2 * ulp, 0, 0, small, -small, 0, 0], [0, 0, 1 + ulp, 0, 0, 0, large, -large]]
        assert same_bits(out, torch.tensor(expected, dtype=low))
    three = torch.tensor([1 / 3, -7.0, 1e-5, 2.0], dtype=dtype)
    assert same_bits(run(torch.tensor([1.0, 1, 0, 0]), three, None, device, backend), torch.tensor([1 / 3, -7.0, 0, 0]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", LOW)
def test_a_nan_survives_conversion(device: str, dtype: torch.dtype, backend: str) -> None:
    w0 = torch.tensor([[NAN, 1.0, -NAN, NAN]])
    w = torch.tensor([[2.0, 1.0, 0.0, 0.0]])
    for a, b in ((w.to(dtype), w0), (w, w0.to(dtype))):
        out = run(a, b, None, device, backend)
        assert out.isnan().tolist() == [[True, False, False, False]]
        assert same_bits(out[:, 1:], torch.tensor([[1.0, 0.0, 0.0]], dtype=a.dtype))


# --- memory ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "dtype0"), [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.bfloat16)])
def test_non_contiguous_views(device: str, poisoned: None, dtype: torch.dtype, dtype0: torch.dtype, backend: str) -> None:
    base, base0 = weights((24, 40)).to(device, dtype), weights((24, 40), seed=1).to(device, dtype0)

    def views(x: Tensor) -> list[Tensor]:
        return [x.t(), x[::2, :20], x[:, ::5], x[0].expand(3, 40), x.view(4, 6, 40).transpose(0, 1), x.t()[3::3]]

    for w, w0 in zip(views(base), views(base0), strict=True):
        c = column_scales(2 * w.shape[-1]).to(device)[::2]
        assert not any(x.is_contiguous() for x in (w, w0, c))
        for scale in (None, c):
            expected = by_hand(w.cpu(), w0.cpu(), None if scale is None else scale.cpu())
            for a, b in ((w, w0), (w, w0.contiguous()), (w.contiguous(), w0)):
                assert same_bits(run(a, b, scale, device, backend), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 2, 3, 4], ids=lambda n: f"offset {n}")
@pytest.mark.parametrize("backend", BACKENDS)
def test_views_that_are_not_aligned(device: str, backend: str, offset: int, dtype: torch.dtype) -> None:
    def shifted(values: Tensor) -> Tensor:
        flat = torch.full((values.numel() + 8,), NAN, dtype=dtype, device=device)
        flat[offset : offset + values.numel()] = values.flatten()
        return flat

    w, w0 = weights((17, 12)).to(dtype), weights((17, 12), seed=1).to(dtype)
    buffers = [shifted(w), shifted(w0), shifted(torch.zeros_like(w))]
    inside = [buffer[offset : offset + w.numel()].view(17, 12) for buffer in buffers]
    assert masked_weight_24(inside[0], inside[1], out=inside[2], backend=backend) is inside[2]
    for values, expected in zip(inside, (w, w0, by_hand(w, w0)), strict=True):
        assert same_bits(values, expected)
    for buffer in buffers:
        assert torch.cat([buffer[:offset], buffer[offset + w.numel() :]]).isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "dtype0"), [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_out(device: str, poisoned: None, scaled: bool, dtype: torch.dtype, dtype0: torch.dtype, backend: str) -> None:
    w, w0 = weights((12, 24)).to(device, dtype), weights((12, 24), seed=1).to(device, dtype0)
    c = column_scales(24) if scaled else None
    expected = by_hand(w.cpu(), w0.cpu(), c)
    options: dict[str, Any] = {"column_scale": None if c is None else c.to(device), "backend": backend}
    before = w.clone(), w0.clone()
    canvas = torch.full((12, 48), NAN, dtype=dtype, device=device)
    for out in (torch.empty_like(w), torch.empty(24, 12, dtype=dtype, device=device).t(), canvas[:, ::2]):
        assert masked_weight_24(w, w0, out=out, **options) is out
        assert same_bits(out, expected)
        assert same_bits(w, before[0])
        assert same_bits(w0, before[1])
    assert canvas[:, 1::2].isnan().all()
    for target in (w.clone(), w.t().contiguous().t()):
        assert masked_weight_24(target, w0, out=target, **options) is target
        assert same_bits(target, expected)
    if dtype == dtype0:
        assert masked_weight_24(w, w0, out=w0, **options) is w0
        assert same_bits(w0, expected)
        assert same_bits(w, before[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_dtypes(device: str, backend: str) -> None:
    w, w0 = weights((5, 12)), weights((5, 12), seed=1)
    scale = column_scales(12).bfloat16()
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert same_bits(run(w, w0, scale.to(dtype), device, backend), by_hand(w, w0, scale))


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_meta(scaled: bool, backend: str | None) -> None:
    """Shapes only, and no allocation but the result: memory is planned on such tensors."""
    called = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            called.append(func.__name__)
            return func(*args, **(kwargs or {}))

    w, w0 = torch.empty(8, 6, device="meta").t(), torch.empty(6, 8, dtype=torch.bfloat16, device="meta")
    scale = torch.empty(8, device="meta") if scaled else None
    given = torch.empty(6, 8, device="meta")
    with Record():
        out = masked_weight_24(w, w0, column_scale=scale, backend=backend)
        assert masked_weight_24(w, w0, column_scale=scale, out=given, backend=backend) is given
    assert (out.shape, out.dtype, out.device.type, out.is_contiguous()) == (w.shape, w.dtype, "meta", True)
    assert [name for name in called if "detach" not in name] == ["masked_weight_24.default", "masked_weight_24_out.default"]


# --- the public function ---------------------------------------------------------------------------------------------------------


def test_default_on_the_cpu_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    w, w0 = weights((6, 8)), weights((6, 8), seed=1)
    assert same_bits(masked_weight_24(w, w0), reference(w, w0))
    with pytest.raises(BackendError, match="masked_weight_24: expected a CUDA tensor for backend='triton', got cpu"):
        masked_weight_24(w, w0, backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters(device: str, backend: str) -> None:
    """Nothing is differentiated through; a parameter that requires grad may be written to."""
    w, w0, c = (torch.nn.Parameter(x.to(device)) for x in (weights((6, 8)), weights((6, 8), seed=1), column_scales(8)))
    before = [x.detach().clone() for x in (w, w0, c)]
    out = masked_weight_24(w, w0, column_scale=c, backend=backend)
    assert not out.requires_grad
    assert out.data_ptr() not in (w.data_ptr(), w0.data_ptr())
    assert all(same_bits(x.detach(), old) for x, old in zip((w, w0, c), before, strict=True))
    version = w._version
    assert masked_weight_24(w, w0, column_scale=c, out=w, backend=backend) is w
    assert w.requires_grad
    assert w.is_leaf
    assert w._version > version  # autograd can tell that a saved weight has changed
    assert same_bits(w.detach(), out)
    assert same_bits(out, by_hand(*(x.cpu() for x in before)))


def test_errors() -> None:
    w = torch.zeros(2, 8)
    with pytest.raises(TypeError, match="masked_weight_24: expected a tensor for w, got list"):
        masked_weight_24([1.0] * 4, w)
    with pytest.raises(TypeError, match=r"masked_weight_24: expected float32, float16, bfloat16 or float64 for w, got torch\.int64"):
        masked_weight_24(w.long(), w)
    with pytest.raises(ShapeError, match=r"masked_weight_24: expected the last dimension divisible by 4, got shape \(8, 2\)"):
        masked_weight_24(w.t(), w.t())
    with pytest.raises(ShapeError, match="masked_weight_24: expected a tensor of at least one dimension, got a scalar"):
        masked_weight_24(torch.tensor(1.0), w)
    with pytest.raises(TypeError, match="masked_weight_24: expected a tensor for w0, got NoneType"):
        masked_weight_24(w, None)
    with pytest.raises(TypeError, match=r"masked_weight_24: expected float32, float16, bfloat16 or float64 for w0, got torch\.bool"):
        masked_weight_24(w, w.bool())
    with pytest.raises(ShapeError, match=r"masked_weight_24: expected w0 of shape \(2, 8\), got \(1, 8\)"):
        masked_weight_24(w, w[:1])
    with pytest.raises(ConfigError, match="masked_weight_24: expected w0 on cpu, got meta"):
        masked_weight_24(w, w.to("meta"))
    with pytest.raises(TypeError, match="masked_weight_24: expected a tensor for column_scale, got float"):
        masked_weight_24(w, w, column_scale=2.0)
    with pytest.raises(ShapeError, match=r"masked_weight_24: expected column_scale of shape \(8,\), got \(1, 8\)"):
        masked_weight_24(w, w, column_scale=torch.ones(1, 8))
    with pytest.raises(ConfigError, match="masked_weight_24: expected column_scale on cpu, got meta"):
        masked_weight_24(w, w, column_scale=torch.ones(8, device="meta"))
    with pytest.raises(TypeError, match="masked_weight_24: expected a tensor for out, got list"):
        masked_weight_24(w, w, out=[])
    with pytest.raises(TypeError, match=r"masked_weight_24: expected out of dtype torch\.float32, got torch\.bfloat16"):
        masked_weight_24(w, w.bfloat16(), out=w.bfloat16())
    with pytest.raises(ShapeError, match=r"masked_weight_24: expected out of shape \(2, 8\), got \(2, 4\)"):
        masked_weight_24(w, w, out=torch.zeros(2, 4))
    with pytest.raises(ConfigError, match="masked_weight_24: expected out on cpu, got meta"):
        masked_weight_24(w, w, out=torch.zeros(2, 8, device="meta"))
    with pytest.raises(ConfigError, match="masked_weight_24: expected backend 'triton' or 'reference', got 'cuda'"):
        masked_weight_24(w, w, backend="cuda")


@needs_triton
def test_the_kernel_takes_no_fp64_weights() -> None:
    w = torch.zeros(2, 8)
    with pytest.raises(BackendError, match="masked_weight_24: expected fp32, fp16 or bf16 for backend='triton', got float64"):
        masked_weight_24(w.double(), w, backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(device: str, backend: str) -> None:
    w, w0, scale = weights((3, 8)).to(device), weights((3, 8), seed=1).to(device), column_scales(8).to(device)
    ops = torch.ops.proxsparse
    transposed = weights((8, 3)).to(device).t()
    for a, b in ((w, w0), (transposed, w0), (w[:0], w0[:0]), (w, w0.bfloat16()), (w.bfloat16(), w0.bfloat16())):
        torch.library.opcheck(ops.masked_weight_24.default, (a, b, scale, backend))
        torch.library.opcheck(ops.masked_weight_24_out.default, (a, b, None, backend, torch.zeros_like(a)))


def test_compiles_into_one_graph(device: str) -> None:
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(w: Tensor, w0: Tensor, scale: Tensor, out: Tensor) -> Tensor:
        masked_weight_24(w, w0, column_scale=scale, out=out)
        masked_weight_24(w + 1, w0, out=w)
        return 2 * masked_weight_24(w0.float(), w0)

    z, w0, scale = weights((6, 8)).to(device), weights((6, 8), seed=1).to(device).bfloat16(), column_scales(8).to(device)
    w, out = z.clone(), torch.full_like(z, NAN)
    result = step(w, w0, scale, out)
    assert same_bits(out, by_hand(z.cpu(), w0.cpu(), scale.cpu()))
    assert same_bits(w, by_hand((z + 1).cpu(), w0.cpu()))
    assert same_bits(result, 2 * by_hand(w0.float().cpu(), w0.cpu()))
