"""`frozen_penalty`, its accumulation and `gradient_square`: gradients, kernel against reference, what is kept for backward, errors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from adversarial import BACKENDS, HAVE_TRITON, needs_triton
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from proxsparse_triton.errors import BackendError, ConfigError, ShapeError
from proxsparse_triton.ops import accumulate_frozen_penalty, frozen_penalty, gradient_square
from proxsparse_triton.reference import frozen_penalty as reference

NAN, INF = float("nan"), float("inf")
LAM, EPS = 0.25, 0.1
LOW = (torch.bfloat16, torch.float16)
# Element counts around the tile of 1024: below, above, a multiple.
SHAPES = [(), (1,), (3, 4), (63, 50), (7, 11), (2, 3, 8), (4, 512), (0, 8), (5, 0)]

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter


@pytest.fixture(autouse=True, scope="module")
def many_programs() -> Iterator[None]:
    """The tile of the card under the interpreter, so that several partial sums meet there too."""
    with pytest.MonkeyPatch.context() as patch:
        if HAVE_TRITON:
            from proxsparse_triton.kernels import frozen_penalty as kernel

            patch.setattr(kernel, "INTERPRETER_TILE", kernel.TILE)
        yield


def weights(shape: tuple[int, ...], w_dtype: torch.dtype = torch.float32, w0_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Learnt weights near the pretrained ones, some of which are exactly 0, -0 or negative; some learnt ones pruned."""
    generator = torch.Generator().manual_seed(3)
    w0 = torch.randn(shape, generator=generator, dtype=torch.float64)
    w = w0 + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    kind = torch.rand(shape, generator=generator)
    w0 = torch.where(kind < 0.1, 0.0, torch.where(kind < 0.15, -0.0, w0))
    w = torch.where((kind > 0.15) & (kind < 0.25), 0.0, w)
    return w.to(w_dtype), w0.to(w0_dtype or w_dtype)


def plain(w: Tensor, w0: Tensor, lam: float, eps: float) -> Tensor:
    """The formula as an autograd graph."""
    return lam * (w / (w0 + torch.where(w0 < 0, -eps, eps).to(w.dtype)) * (w - w0)).square().sum()


# --- value and gradient -----------------------------------------------------------------------------------------------------------


def test_gradcheck_fp64(device: str) -> None:
    w, w0 = (x.to(device) for x in weights((3, 8), torch.float64))
    assert torch.autograd.gradcheck(lambda w: frozen_penalty(w, w0, LAM, EPS), (w.requires_grad_(),))


@pytest.mark.parametrize("backend", BACKENDS)
def test_value_and_gradient_match_fp64_finite_differences(device: str, backend: str) -> None:
    """Central differences of the formula in fp64, per weight: the kernel's fp32 value and gradient agree to fp32 accuracy."""
    w, w0 = weights((3, 8))
    exact, exact0 = w.double(), w0.double()

    def value(w: Tensor) -> Tensor:
        a = 1 / torch.where(exact0 < 0, exact0 - EPS, exact0 + EPS)
        return LAM * (a * w * (w - exact0)).square()  # per weight: nothing is lost in the sum

    h = 1e-5
    differences = (value(exact + h) - value(exact - h)) / (2 * h)
    leaf = w.to(device).requires_grad_()
    result = frozen_penalty(leaf, w0.to(device), LAM, EPS, backend=backend)
    result.backward()
    assert (result.dtype, result.shape) == (torch.float32, torch.Size([]))
    torch.testing.assert_close(result.detach().cpu().double(), value(exact).sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(leaf.grad.cpu().double(), differences, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_closed_form_is_autograd_of_the_formula(device: str, backend: str) -> None:
    w, w0 = (x.to(device) for x in weights((63, 50)))
    mine, theirs = w.clone().requires_grad_(), w.clone().requires_grad_()
    value, expected = frozen_penalty(mine, w0, LAM, EPS, backend=backend), plain(theirs, w0, LAM, EPS)
    (3 * value).backward()
    (3 * expected).backward()
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_and_negative_pretrained_weights(device: str, backend: str) -> None:
    """sgn(0) = +1, for -0.0 too: a = 1 / eps at zero, and 1 / (w0 - eps) below."""
    w0 = torch.tensor([0.0, -0.0, -1.0, 1.0, -1e-30], device=device)
    w = torch.tensor([0.5, 0.5, -0.5, 0.5, 0.5], device=device, requires_grad=True)
    a = torch.tensor([2.0, 2.0, -1 / 1.5, 1 / 1.5, -2.0], device=device)
    r = a * w.detach() * (w.detach() - w0)
    value = frozen_penalty(w, w0, 1.0, 0.5, backend=backend)
    value.backward()
    torch.testing.assert_close(value.detach(), r.square().sum())
    torch.testing.assert_close(w.grad, 2 * r * a * (2 * w.detach() - w0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_flat_at_zero_and_at_the_pretrained_value(device: str, poisoned: None, backend: str) -> None:
    _, w0 = (x.to(device) for x in weights((7, 11)))
    for w in (torch.zeros_like(w0), w0):
        leaf = w.clone().requires_grad_()
        value = frozen_penalty(leaf, w0, LAM, EPS, backend=backend)
        value.backward()
        assert value.item() == 0
        assert (leaf.grad == 0).all()


# --- kernel against reference -----------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), *[(x, x) for x in LOW]], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_is_the_reference(device: str, poisoned: None, shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    w, w0 = weights(shape, *dtypes)
    leaf = w.to(device).requires_grad_()
    value = frozen_penalty(leaf, w0.to(device), LAM, EPS, backend="triton")
    value.backward()
    assert (value.dtype, value.device.type, leaf.grad.dtype) == (torch.float32, device, w.dtype)
    torch.testing.assert_close(value.detach().cpu(), reference.frozen_penalty_value(w, w0, LAM, EPS), rtol=1e-5, atol=0)
    assert_same_gradient(leaf.grad, reference.frozen_penalty_grad(w, w0, LAM, EPS))


def assert_same_gradient(actual: Tensor, expected: Tensor) -> None:
    """fp32: 1e-5 relative; bf16 and fp16: within one ulp, and 99 of 100 equal bit for bit."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    if expected.dtype in LOW:
        assert expected.numel() == 0 or (actual.cpu() == expected).float().mean() >= 0.99
        info = torch.finfo(expected.dtype)
        torch.testing.assert_close(actual.cpu(), expected, rtol=info.eps, atol=info.smallest_normal * info.eps)
    else:
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.float32, torch.bfloat16, torch.bfloat16), *[(x, x, x) for x in LOW],
                                    (torch.bfloat16, torch.bfloat16, torch.float32)], ids=str)  # fmt: skip
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accumulate(device: str, poisoned: None, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], backend: str) -> None:
    w, w0 = weights(shape, *dtypes[:2])
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(dtypes[2])
    expected = (grad.double() + analytic(w, w0)).to(dtypes[2])
    on_device = grad.to(device)
    leaf = w.to(device).requires_grad_()
    value = accumulate_frozen_penalty(leaf, w0.to(device), LAM, EPS, on_device, backend=backend)
    assert not value.requires_grad
    assert (value.dtype, value.shape, leaf.grad) == (torch.float32, torch.Size([]), None)
    torch.testing.assert_close(value.cpu().double(), reference.frozen_penalty_value(w.double(), w0.double(), LAM, EPS), rtol=1e-5, atol=0)
    tolerance = torch.finfo(dtypes[2]).eps if dtypes[2] in LOW else 1e-5
    torch.testing.assert_close(on_device.cpu(), expected, rtol=tolerance, atol=2e-6)


def analytic(w: Tensor, w0: Tensor) -> Tensor:
    return reference.frozen_penalty_grad(w.double(), w0.double(), LAM, EPS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_contiguous_views(device: str, poisoned: None, dtype: torch.dtype, backend: str) -> None:
    w, w0 = (x.to(device) for x in weights((24, 40), dtype))
    for view in (lambda x: x.t(), lambda x: x[::2, 3:20], lambda x: x[0].expand(3, 40)):
        leaf = view(w).detach().requires_grad_()
        value = frozen_penalty(leaf, view(w0), LAM, EPS, backend=backend)
        value.backward()
        dense = view(w).contiguous().requires_grad_()
        expected = frozen_penalty(dense, view(w0).contiguous(), LAM, EPS, backend=backend)
        expected.backward()
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(leaf.grad, dense.grad, rtol=1e-6, atol=0)
    canvas = torch.zeros(40, 48, dtype=dtype, device=device)
    for grad in (canvas[:, ::2].t(), torch.zeros(40, 24, dtype=dtype, device=device).t()):
        accumulate_frozen_penalty(w, w0, LAM, EPS, grad, backend=backend)
        expected = torch.zeros_like(w)
        accumulate_frozen_penalty(w, w0, LAM, EPS, expected, backend=backend)
        assert torch.equal(grad, expected)
    assert (canvas[:, 1::2] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=12)
@given(
    pairs=st.lists(st.tuples(st.floats(-4, 4, width=16), st.floats(-4, 4, width=16)), min_size=1, max_size=40),
    lam=st.floats(0, 100, width=32),
    eps=st.floats(0.0625, 2, width=32),
)
def test_one_read_gives_what_two_calls_give(device: str, backend: str, pairs: list[tuple[float, float]], lam: float, eps: float) -> None:
    w, w0 = torch.tensor(pairs, device=device).unbind(-1)
    leaf = w.clone().requires_grad_()
    value = frozen_penalty(leaf, w0, lam, eps, backend=backend)
    value.backward()
    grad = torch.zeros_like(w)
    assert accumulate_frozen_penalty(w, w0, lam, eps, grad, backend=backend) == value
    torch.testing.assert_close(grad, leaf.grad, rtol=1e-6, atol=0)
    assert value >= 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_show(device: str, backend: str) -> None:
    for bad in (NAN, INF):
        w = torch.tensor([1.0, bad], device=device)
        assert not accumulate_frozen_penalty(w, torch.ones_like(w), LAM, EPS, torch.zeros_like(w), backend=backend).isfinite()


@needs_triton
def test_deterministic(device: str) -> None:
    w, w0 = (x.to(device) for x in weights((63, 50)))
    assert len({accumulate_frozen_penalty(w, w0, LAM, EPS, torch.zeros_like(w), backend="triton").item() for _ in range(3)}) == 1


# --- autograd -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)], ids=str
)
def test_nothing_but_the_weights_is_kept_for_backward(device: str, dtypes: tuple[torch.dtype, torch.dtype], backend: str) -> None:
    w, w0 = (x.to(device) for x in weights((24, 40), *dtypes))
    w.requires_grad_()
    kept: list[int] = []

    def pack(saved: Tensor) -> Tensor:
        kept.append(saved.untyped_storage().data_ptr())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        value = frozen_penalty(w, w0, LAM, EPS, backend=backend)
    assert sorted(kept) == sorted([w.untyped_storage().data_ptr(), w0.untyped_storage().data_ptr()])
    value.backward()
    assert w.grad is not None


def test_pretrained_weights_are_constant(device: str) -> None:
    w, w0 = (x.to(device).requires_grad_() for x in weights((3, 4)))
    frozen_penalty(w, w0, LAM, EPS).backward()
    assert w0.grad is None
    assert not frozen_penalty(w.detach(), w0.detach(), LAM, EPS).requires_grad


def test_changed_weights_are_noticed_in_backward(device: str) -> None:
    w, w0 = (x.to(device) for x in weights((3, 4)))
    w.requires_grad_()
    value = frozen_penalty(w, w0, LAM, EPS)
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_a_second_derivative_is_refused(device: str) -> None:
    w, w0 = (x.to(device) for x in weights((3, 4)))
    w.requires_grad_()
    (gradient,) = torch.autograd.grad(frozen_penalty(w, w0, LAM, EPS) * w.sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_zero_strength(device: str) -> None:
    w, w0 = (x.to(device) for x in weights((3, 4)))
    grad = torch.ones_like(w)
    assert accumulate_frozen_penalty(w, w0, 0.0, EPS, grad) == 0
    assert (grad == 1).all()


# --- errors ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["frozen_penalty", "accumulate_frozen_penalty"])
def test_errors(name: str) -> None:
    def call(w: object, w0: object, lam: object = LAM, eps: object = EPS, **keywords: object) -> Tensor:
        if name == "frozen_penalty":
            return frozen_penalty(w, w0, lam, eps, **keywords)
        return accumulate_frozen_penalty(w, w0, lam, eps, torch.zeros(2, 4), **keywords)

    w = torch.zeros(2, 4)
    with pytest.raises(TypeError, match=f"{name}: expected a tensor for w, got NoneType"):
        call(None, w)
    with pytest.raises(TypeError, match=rf"{name}: expected float32, float16, bfloat16 or float64 for w0, got torch\.int64"):
        call(w, w.long())
    with pytest.raises(ShapeError, match=rf"{name}: expected w0 of shape \(2, 4\), got \(4, 2\)"):
        call(w, w.t())
    with pytest.raises(ConfigError, match=f"{name}: expected w0 on cpu, got meta"):
        call(w, torch.zeros(2, 4, device="meta"))
    for lam in (-1.0, NAN, INF, None):
        with pytest.raises(ConfigError, match=f"{name}: expected a finite lam >= 0, got"):
            call(w, w, lam)
    for eps in (0.0, -1.0, NAN, INF, None):
        with pytest.raises(ConfigError, match=f"{name}: expected a finite frozen_eps > 0, got"):
            call(w, w, LAM, eps)
    with pytest.raises(ConfigError, match=f"{name}: expected backend 'triton' or 'reference', got 'cuda'"):
        call(w, w, backend="cuda")
    with pytest.raises(BackendError, match=f"{name}: expected fp32, fp16 or bf16 for backend='triton', got float64"):
        call(w.double(), w, backend="triton")


def test_errors_of_the_gradient() -> None:
    w = torch.zeros(2, 4)
    with pytest.raises(ConfigError, match="accumulate_frozen_penalty: expected a gradient to add to, got None"):
        accumulate_frozen_penalty(w, w, LAM, EPS, None)
    with pytest.raises(TypeError, match="accumulate_frozen_penalty: expected a tensor for grad, got float"):
        accumulate_frozen_penalty(w, w, LAM, EPS, 0.0)
    with pytest.raises(ShapeError, match=r"accumulate_frozen_penalty: expected grad of shape \(2, 4\), got \(8,\)"):
        accumulate_frozen_penalty(w, w, LAM, EPS, torch.zeros(8))


def test_default_on_the_cpu_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    w, w0 = weights((3, 4))
    assert frozen_penalty(w, w0, LAM, EPS) == reference.frozen_penalty_value(w, w0, LAM, EPS)
    with pytest.raises(BackendError, match="frozen_penalty: expected a CUDA tensor for backend='triton', got cpu"):
        frozen_penalty(w, w0, LAM, EPS, backend="triton")


# --- on the card ----------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_on_the_card(dtype: torch.dtype) -> None:
    """Forward and accumulation allocate partial sums only (8 bytes for 512 weights), backward one gradient."""
    torch.manual_seed(0)
    w0 = (0.02 * torch.randn(4096, 11008, device="cuda")).to(dtype)
    w = (w0 * 1.1).requires_grad_()
    size = w0.numel() * w0.element_size()

    def peak(run) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    grad = torch.zeros_like(w0)
    values: list[Tensor] = []
    assert peak(lambda: values.append(frozen_penalty(w, w0, LAM, EPS))) < size / 100
    assert peak(lambda: accumulate_frozen_penalty(w, w0, LAM, EPS, grad)) < size / 100
    assert peak(values[0].backward) < 1.01 * size
    torch.testing.assert_close(w.grad, grad, rtol=2 * torch.finfo(dtype).eps, atol=0)
    expected = reference.frozen_penalty_value(w.detach().double(), w0.double(), LAM, EPS)
    torch.testing.assert_close(values[0].detach().double(), expected, rtol=1e-5, atol=0)


# --- gradient_square --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.float32, torch.bfloat16, torch.float32), *[(x, x, x) for x in LOW],
                                    (torch.bfloat16, torch.bfloat16, torch.float32)], ids=str)  # fmt: skip
@pytest.mark.parametrize("shape", [*SHAPES, (3, 6001)], ids=str)
def test_gradient_square_is_the_square_of_the_sum(
    device: str, poisoned: None, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], backend: str
) -> None:
    """Against fp64, with and without the penalty; what it reads stays as it is. The largest shape takes three programs on the card."""
    w, w0 = (x.to(device) for x in weights(shape, *dtypes[:2]))
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtypes[2]).to(device)
    before = w.clone(), w0.clone(), grad.clone()
    total = grad.double()
    plain_square = gradient_square(w, None, LAM, EPS, grad, backend=backend)
    torch.testing.assert_close(plain_square.double(), total.square().sum(), rtol=1e-5, atol=0)
    accumulate_frozen_penalty(w.double(), w0.double(), LAM, EPS, total)
    square = gradient_square(w, w0, LAM, EPS, grad, backend=backend)
    assert (square.dtype, square.shape, square.requires_grad) == (torch.float64, torch.Size([]), False)
    torch.testing.assert_close(square.double(), total.square().sum(), rtol=1e-5, atol=0)
    assert all(torch.equal(x, y) for x, y in zip((w, w0, grad), before, strict=True))


@needs_triton
@pytest.mark.parametrize("row", [4, 8])
@pytest.mark.parametrize("n", [1, 767, 768, 769, 2000])
def test_norm_pass_of_several_tiles(device: str, n: int, row: int) -> None:
    """Programs of three tiles, which the interpreter does not get otherwise; nothing beyond the last weight is read."""
    from proxsparse_triton.kernels.frozen_penalty import _gradient_square_kernel

    w, w0 = (x.to(device) for x in weights((3000,)))
    grad = torch.randn(3000, generator=torch.Generator().manual_seed(5)).to(device)
    expected = reference.gradient_square(w[:n], w0[:n], LAM, EPS, grad[:n])
    for x in (w, w0, grad):
        x[n:] = NAN
    partial = torch.full((-(-n // 768),), NAN, device=device)
    _gradient_square_kernel[(len(partial),)](w, w0, grad, partial, LAM, EPS, n, HAS_W0=True, ROW=row, TILE=256, TILES=3)
    torch.testing.assert_close(partial.sum(dtype=torch.float64), expected, rtol=1e-6, atol=0)


@needs_triton
def test_gradient_square_is_deterministic(device: str) -> None:
    w, w0 = (x.to(device) for x in weights((63, 50)))
    assert len({gradient_square(w, w0, LAM, EPS, w, backend="triton").item() for _ in range(3)}) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_square_of_views_and_of_nan(device: str, backend: str) -> None:
    w, w0 = (x.to(device) for x in weights((7, 11)))
    grad = torch.randn(7, 11, generator=torch.Generator().manual_seed(5)).to(device)
    expected = gradient_square(w, w0, LAM, EPS, grad, backend=backend)
    views = [x.t().contiguous().t() for x in (w, w0, grad)]
    torch.testing.assert_close(gradient_square(*views[:2], LAM, EPS, views[2], backend=backend), expected, rtol=1e-6, atol=0)
    grad[3, 3] = NAN
    assert gradient_square(w, w0, LAM, EPS, grad, backend=backend).isnan()


def test_gradient_square_errors() -> None:
    w = torch.zeros(2, 4)
    for arguments, error, message in (
        ((w, torch.zeros(4, 2), 1.0, 0.1, w), ShapeError, r"gradient_square: expected w0 of shape \(2, 4\), got \(4, 2\)"),
        ((w, None, 1.0, 0.1, torch.zeros(4, 2)), ShapeError, r"gradient_square: expected grad of shape \(2, 4\), got \(4, 2\)"),
        ((w, w, -1.0, 0.1, w), ConfigError, "gradient_square: expected a finite lam >= 0"),
        ((w, w, 1.0, 0.1, None), TypeError, "gradient_square: expected a tensor for grad, got NoneType"),
    ):
        with pytest.raises(error, match=message):
            gradient_square(*arguments)
