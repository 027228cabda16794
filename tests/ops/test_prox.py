"""`prox_24`: the kernel against the oracle and the reference, then edges, errors and compilation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from adversarial import (
    BACKENDS,
    HAVE_TRITON,
    LAMBDAS,
    LOW,
    WORSE,
    all_blocks,
    assert_same_solution,
    needs_triton,
    same_bits,
    solution_gaps,
    weights,
    worse_than_oracle,
)
from torch import Tensor

from proxsparse_triton.errors import BackendError, ConfigError, ShapeError
from proxsparse_triton.ops import prox_24
from proxsparse_triton.reference.prox import prox_24 as reference
from proxsparse_triton.sparsity import count_negative_zeros, is_24

NAN, INF = float("nan"), float("inf")
SHAPES = [(4,), (1, 4), (3, 4), (63, 500), (7, 12), (2, 3, 8), (3, 5, 2, 4), (0, 8), (5, 0), (2, 0, 4)]

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter


def column_scales(width: int) -> Tensor:
    return torch.rand(width, generator=torch.Generator().manual_seed(9)) + 0.1


@pytest.fixture(autouse=True, scope="module")
def many_programs() -> Iterator[None]:
    """Smaller tiles under the interpreter, so that several programs share the work there too."""
    with pytest.MonkeyPatch.context() as patch:
        if HAVE_TRITON:
            from proxsparse_triton.kernels import launch

            patch.setattr(launch, "INTERPRETER_TILE", 2048)
        yield


# --- against the oracle and the reference ---------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("lam", LAMBDAS)
def test_kernel_is_never_worse_than_the_oracle(device: str, poisoned: None, lam: float) -> None:
    w = prox_24(all_blocks().float().to(device), lam, backend="triton")
    assert worse_than_oracle(w, lam) == {}


@needs_triton
@pytest.mark.parametrize("lam", LAMBDAS)
def test_kernel_is_the_reference_on_the_adversarial_set(device: str, lam: float) -> None:
    z = all_blocks().float()
    assert_same_solution(prox_24(z.to(device), lam, backend="triton"), reference(z, lam), z, lam)


@needs_triton
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_is_the_reference_fp32(device: str, poisoned: None, shape: tuple[int, ...], scaled: bool) -> None:
    z = weights(shape)
    scale = column_scales(shape[-1]) if scaled else None
    w = prox_24(z.to(device), 0.5, column_scale=None if scale is None else scale.to(device), backend="triton")
    assert (w.shape, w.dtype, w.device.type, w.is_contiguous()) == (z.shape, z.dtype, device, True)
    assert_same_solution(w, reference(z, 0.5, column_scale=scale), z, 0.5, scale)


@needs_triton
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", SHAPES)
def test_low_precision(device: str, poisoned: None, shape: tuple[int, ...], dtype: torch.dtype, scaled: bool) -> None:
    """A kernel's bf16 or fp16 result is its fp32 result rounded to nearest even; against the reference it is equal, or one ulp
    off, or the two fp32 points are equally good to 1e-6 |z|^2 / 2. At least 999 of 1000 weights are equal bit for bit."""
    z = weights(shape).to(dtype)
    scale = column_scales(shape[-1]) if scaled else None
    on_device = {"column_scale": None if scale is None else scale.to(device), "backend": "triton"}
    w = prox_24(z.to(device), 0.5, **on_device)
    assert (w.shape, w.dtype) == (z.shape, dtype)
    solved = prox_24(z.float().to(device), 0.5, **on_device)
    assert same_bits(w, solved.to(dtype))
    expected = reference(z, 0.5, column_scale=scale)
    if z.numel() == 0:
        return
    equal = w.cpu() == expected
    assert equal.float().mean() >= 0.999
    one_ulp = (w.cpu().double() - expected.double()).abs() <= torch.finfo(dtype).eps * expected.double().abs()
    fine = solution_gaps(solved, reference(z.float(), 0.5, column_scale=scale), z, 0.5, scale) <= WORSE
    assert (one_ulp.unflatten(-1, (-1, 4)).all(-1) | fine).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_non_contiguous_views(device: str, poisoned: None, dtype: torch.dtype, backend: str) -> None:
    base = weights((24, 40)).to(dtype).to(device)
    for view in (base.t(), base[::2, :20], base[:, ::5], base[0].expand(3, 40), base.view(4, 6, 40).transpose(0, 1), base.t()[3::3]):
        scale = column_scales(2 * view.shape[-1]).to(device)[::2]
        assert not view.is_contiguous()
        assert not scale.is_contiguous()
        for c in (None, scale):
            w = prox_24(view, 0.5, column_scale=c, backend=backend)
            assert w.is_contiguous()
            assert same_bits(w, prox_24(view.contiguous(), 0.5, column_scale=None if c is None else c.contiguous(), backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lam", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_out(device: str, poisoned: None, dtype: torch.dtype, lam: float, backend: str) -> None:
    z = weights((12, 24)).to(dtype).to(device)
    before, expected = z.clone(), prox_24(z, lam, backend=backend)
    canvas = torch.full((12, 48), NAN, dtype=dtype, device=device)
    for out in (torch.empty_like(z), torch.empty(24, 12, dtype=dtype, device=device).t(), canvas[:, ::2]):
        assert prox_24(z, lam, out=out, backend=backend) is out
        assert same_bits(out, expected)
        assert same_bits(z, before)
    assert canvas[:, 1::2].isnan().all()
    transposed = z.t().contiguous().t()
    for target in (z, transposed):
        assert prox_24(target, lam, out=target, backend=backend) is target
        assert same_bits(target, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_dtypes(device: str, backend: str) -> None:
    z = weights((5, 12)).to(device)
    scale = column_scales(12).bfloat16()
    expected = prox_24(z, 0.5, column_scale=scale.float().to(device), backend=backend)
    for dtype in (torch.bfloat16, torch.float64):
        assert same_bits(prox_24(z, 0.5, column_scale=scale.to(dtype).to(device), backend=backend), expected)


def test_fp64_stays_fp64(device: str) -> None:
    z = all_blocks()[:2000].to(device)
    w = prox_24(z, 0.7)
    assert w.dtype == torch.float64
    torch.testing.assert_close(w.cpu(), reference(all_blocks()[:2000], 0.7), rtol=1e-12, atol=1e-14)


# --- edges ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("offset", [1, 2, 3, 4], ids=lambda n: f"offset {n}")
@pytest.mark.parametrize("backend", BACKENDS)
def test_views_that_are_not_aligned(device: str, backend: str, offset: int, dtype: torch.dtype) -> None:
    """In place in a flat buffer of parameters, hard blocks among easy ones."""
    easy = torch.arange(2048) % 3 > 0
    flat = torch.zeros(2048 * 4 + 8, dtype=dtype, device=device)
    values = (torch.where(easy[:, None], 0.1, 1.0) * weights((2048, 4))).to(dtype)
    flat[offset : offset + values.numel()] = values.flatten().to(device)
    view = flat[offset : offset + values.numel()].view(-1, 64)
    prox_24(view, 1.0, out=view, backend=backend)
    assert not flat[:offset].any()
    assert not flat[offset + values.numel() :].any()
    expected = prox_24(values.float(), 1.0, backend="reference")
    if dtype == torch.float32:
        assert_same_solution(view.view(-1, 4), expected, values, 1.0)
    else:
        eps = torch.finfo(dtype).eps
        assert ((view.view(-1, 4).cpu().float() - expected).abs() <= 2 * eps * values.float().abs().amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("lam", [1e-25, 1e-19, 1e-3, 1.0, 1e20])
@pytest.mark.parametrize("backend", BACKENDS)
def test_dead_columns(device: str, backend: str, lam: float) -> None:
    """A column whose scale is 0 is as good as dropped; nothing overflows, and no block keeps four weights for it at great strength."""
    z = torch.tensor([[5.0, 1e-27, 2e-27, 3e-27], [1.0, 2.0, 3.0, 4.0]], device=device)
    scale = torch.tensor([1.0, 0.0, 0.0, 0.0], device=device)
    w = prox_24(z, lam, column_scale=scale, backend=backend).cpu()
    assert w.isfinite().all()
    assert torch.equal(w[:, 0], z[:, 0].cpu())
    if lam >= 1:
        assert ((w != 0).sum(-1) <= 2).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lam", [1e-3, 1.0, 1e30])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_special_values(device: str, poisoned: None, lam: float, scaled: bool, backend: str) -> None:
    cases = [
        ([0.0, -0.0, 0.0, -0.0], [0.0, 0.0, 0.0, 0.0]),
        ([-0.0, 0.0, -3.0, -0.0], [0.0, 0.0, -3.0, 0.0]),
        ([INF, -INF, 1.0, 2.0], [INF, -INF, 0.0, 0.0]),
        ([INF, INF, -INF, INF], [INF, INF, 0.0, 0.0]),
        ([-INF, 1.0, 2.0, 3.0], [-INF, 0.0, 0.0, 3.0]),
        ([0.0, 0.0, 0.0, -INF], [0.0, 0.0, 0.0, -INF]),
        ([NAN, 1.0, 2.0, 3.0], [NAN] * 4),
        ([0.0, -NAN, 0.0, 0.0], [NAN] * 4),
        ([NAN, INF, -INF, 0.0], [NAN] * 4),
        ([1e38, 3e38, -3e38, 2e38], [0.0, 3e38, -3e38, 0.0]),
        ([-1e38, -1e38, 1e38, 1e38], [-1e38, -1e38, 0.0, 0.0]),
        ([4e-45, -1e-40, 0.0, 0.0], [4e-45, -1e-40, 0.0, 0.0]),
    ]
    z = torch.tensor([[x for case, _ in cases for x in case]])
    expected = torch.tensor([[x for _, case in cases for x in case]])
    scale = torch.full((z.shape[-1],), 0.5, device=device) if scaled else None
    w = prox_24(z.to(device), lam, column_scale=scale, backend=backend).cpu()
    torch.testing.assert_close(w, expected, rtol=0, atol=0, equal_nan=True)
    assert count_negative_zeros(w) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_stays_in_its_block(device: str, backend: str) -> None:
    z = weights((6, 8)).to(device)
    expected = prox_24(z, 0.5, backend=backend)
    z[2, 5] = NAN
    expected[2, 4:] = NAN
    assert torch.equal(prox_24(z, 0.5, backend=backend).nan_to_num(77), expected.nan_to_num(77))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_denormals_are_not_flushed(device: str, dtype: torch.dtype, backend: str) -> None:
    if (device, dtype, backend) == ("cpu", torch.bfloat16, "triton"):
        pytest.skip("Triton's interpreter flushes bf16 denormals when it converts")
    tiny = torch.finfo(dtype).smallest_normal
    z = torch.tensor([[1.0, -0.5, 0.25, 0.125]]).mul(tiny).to(dtype)
    for lam in (1e-3, 1.0):
        assert same_bits(prox_24(z.to(device), lam, backend=backend), z)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lam", [1000.0, 1e38])
def test_huge_strength_keeps_the_two_largest_unshrunk(device: str, lam: float, backend: str) -> None:
    z = weights((50, 8)).abs() + 0.01
    w = prox_24(z.to(device), lam, backend=backend).cpu()
    assert is_24(w)
    kept = z.unflatten(-1, (-1, 4)).sort(dim=-1, descending=True, stable=True).indices[..., :2]
    mask = torch.zeros(50, 2, 4, dtype=torch.bool).scatter_(-1, kept, True).flatten(-2)
    assert same_bits(w, torch.where(mask, z, 0.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_smallest_strengths(device: str, backend: str) -> None:
    z = weights((7, 12)).to(device)
    for lam in (5e-324, 1e-300, 1e-40, 2.0**-126, 1e-30):
        torch.testing.assert_close(prox_24(z, lam, backend=backend), z, rtol=1e-7, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lowest_index(device: str, backend: str) -> None:
    z = torch.tensor([[3.0, 3, -3, 3], [1.0, 3, 3, 3], [-1.0, 1, 1, 1], [0.9, -1, 1, 1]])
    w = prox_24(z.to(device), 1.0, backend=backend).cpu()
    assert (w != 0).int().tolist() == [[1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 1, 0], [0, 1, 1, 1]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_underflow_is_positive_zero(device: str, backend: str) -> None:
    """A strength at which the smallest weight survives in fp32, yet underflows in fp16, must not leave a -0.0."""
    z = torch.tensor([[-0.25, -0.25, -0.125, -0.03125]], dtype=torch.float16)
    low, high = 0.01, 1.0
    for _ in range(60):
        lam = (low + high) / 2
        smallest = -prox_24(z.float().to(device), lam, backend=backend)[0, 3].item()
        if 0 < smallest < 2.0**-26:
            break
        low, high = (lam, high) if smallest > 0 else (low, lam)
    assert 0 < smallest < 2.0**-26
    w = prox_24(z.to(device), lam, backend=backend)
    assert same_bits(w[0, 3:], torch.zeros(1, dtype=torch.float16))
    assert count_negative_zeros(w) == 0


# --- the public function --------------------------------------------------------------------------------------------------------


def test_default_on_the_cpu_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    z = weights((6, 8))
    assert same_bits(prox_24(z, 0.5), reference(z, 0.5))
    with pytest.raises(BackendError, match="prox_24: expected a CUDA tensor for backend='triton', got cpu"):
        prox_24(z, 0.5, backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters(device: str, backend: str) -> None:
    """Not differentiated through; a parameter that requires grad can be updated in place."""
    p = torch.nn.Parameter(weights((6, 8)).to(device))
    expected = prox_24(p.detach(), 0.5, backend=backend)
    w = prox_24(p, 0.5, backend=backend)
    assert not w.requires_grad
    assert w.data_ptr() != p.data_ptr()
    version = p._version
    assert prox_24(p, 0.5, out=p, backend=backend) is p
    assert p.requires_grad
    assert p.is_leaf
    assert p._version > version  # autograd can tell that a saved weight has changed
    assert same_bits(p.detach(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_input_is_left_alone(device: str, backend: str) -> None:
    z = weights((6, 8)).to(device)
    for lam in (0.0, 0.5):
        before = z.clone()
        w = prox_24(z, lam, backend=backend)
        assert w.data_ptr() != z.data_ptr()
        assert same_bits(z, before)


def test_errors() -> None:
    z = torch.zeros(2, 8)
    with pytest.raises(TypeError, match="prox_24: expected a tensor for z, got list"):
        prox_24([1.0] * 4, 1.0)
    with pytest.raises(TypeError, match=r"prox_24: expected float32, float16, bfloat16 or float64 for z, got torch\.int64"):
        prox_24(z.long(), 1.0)
    with pytest.raises(ShapeError, match=r"prox_24: expected the last dimension divisible by 4, got shape \(8, 2\)"):
        prox_24(z.t(), 1.0)
    with pytest.raises(ShapeError, match="prox_24: expected a tensor of at least one dimension, got a scalar"):
        prox_24(torch.tensor(1.0), 1.0)
    for lam in (-1.0, NAN, INF, "1", None, torch.tensor(1.0)):
        with pytest.raises(ConfigError, match="prox_24: expected a finite lam >= 0, got"):
            prox_24(z, lam)
    with pytest.raises(TypeError, match="prox_24: expected a tensor for column_scale, got float"):
        prox_24(z, 1.0, column_scale=2.0)
    with pytest.raises(ShapeError, match=r"prox_24: expected column_scale of shape \(8,\), got \(1, 8\)"):
        prox_24(z, 1.0, column_scale=torch.ones(1, 8))
    with pytest.raises(ConfigError, match="prox_24: expected column_scale on cpu, got meta"):
        prox_24(z, 1.0, column_scale=torch.ones(8, device="meta"))
    with pytest.raises(TypeError, match="prox_24: expected a tensor for out, got list"):
        prox_24(z, 1.0, out=[])
    with pytest.raises(TypeError, match=r"prox_24: expected out of dtype torch\.float32, got torch\.bfloat16"):
        prox_24(z, 1.0, out=z.bfloat16())
    with pytest.raises(ShapeError, match=r"prox_24: expected out of shape \(2, 8\), got \(2, 4\)"):
        prox_24(z, 1.0, out=torch.zeros(2, 4))
    with pytest.raises(ConfigError, match="prox_24: expected out on cpu, got meta"):
        prox_24(z, 1.0, out=torch.zeros(2, 8, device="meta"))
    with pytest.raises(ConfigError, match="prox_24: expected backend 'triton' or 'reference', got 'cuda'"):
        prox_24(z, 1.0, backend="cuda")
    with pytest.raises(BackendError, match="prox_24: expected fp32, fp16 or bf16 for backend='triton', got float64"):
        prox_24(z.double(), 1.0, backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(device: str, backend: str) -> None:
    z, scale = weights((3, 8)).to(device), column_scales(8).to(device)
    ops = torch.ops.proxsparse
    for view in (z, weights((8, 4)).to(device).t(), z[:0], z.bfloat16()):
        torch.library.opcheck(ops.prox_24.default, (view, 0.5, scale, backend))
        torch.library.opcheck(ops.prox_24_out.default, (view, 0.5, None, backend, torch.zeros_like(view)))


def test_compiles_into_one_graph(device: str) -> None:
    """With a strength that changes, as under a schedule, and in place on the tensor it reads."""
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(w: Tensor, scale: Tensor, out: Tensor, lam: float) -> Tensor:
        prox_24(w, lam, out=w)
        prox_24(w + 1, lam, column_scale=scale, out=out)
        return 2 * prox_24(w - 1, lam)

    scale = column_scales(8).to(device)
    for lam in (0.5, 0.25, 0.75):
        z = weights((6, 8)).to(device)
        w, out = z.clone(), torch.full_like(z, NAN)
        result = step(w, scale, out, lam)
        assert same_bits(w, prox_24(z, lam))
        assert same_bits(out, prox_24(w + 1, lam, column_scale=scale))
        assert same_bits(result, 2 * prox_24(w - 1, lam))
