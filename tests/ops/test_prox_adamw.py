"""`prox_adamw_`: against AdamW, the chain of operations and the reference; statistics, layouts, edges, errors."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from adversarial import assert_same_solution, needs_triton
from stepping import (
    BF16,
    FP32,
    SETTINGS,
    SPARSE,
    STORAGES,
    Case,
    Storage,
    case,
    every_backend,
    every_storage,
    normal,
    small_tiles,
    storage_name,
)

from proxsparse_triton.errors import BackendError, ConfigError, ShapeError
from proxsparse_triton.ops import accumulate_frozen_penalty, frozen_penalty, gradient_square, prox_24, prox_adamw_
from proxsparse_triton.sparsity import count_24_blocks
from proxsparse_triton.step import AdamState

NAN = float("nan")
# Every storage at a size of several groups of moments with a rest; every shape with the plainest and the most involved storage.
SHAPES = [(4,), (7, 12), (2, 3, 8), (1, 128)]
KERNEL_GRID = [((9, 140), storage) for storage in STORAGES]
KERNEL_GRID += [(shape, storage) for shape in SHAPES for storage in ((FP32, 0, "fp32"), (BF16, 8, "int8"))]
KERNEL_GRID += [((63, 500), (BF16, 8, "bf16"))]  # 8-bit moments of that size take ten seconds in the interpreter

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter
tiles = pytest.fixture(autouse=True, scope="module")(small_tiles)


# --- against AdamW, the chain and the reference -------------------------------------------------------------------------------------


@every_backend
def test_without_strengths_it_is_adamw(device: str, backend: str) -> None:
    w = normal(63, 20).to(device)
    p = torch.nn.Parameter(w.clone())
    adamw = torch.optim.AdamW([p], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    state = AdamState(torch.zeros_like(w), torch.zeros_like(w))
    for step in range(1, 8):
        p.grad = normal(63, 20, seed=step).to(device)
        adamw.step()
        prox_adamw_(w, p.grad, state, dataclasses.replace(SETTINGS, step=step), backend=backend)
        torch.testing.assert_close(w, p.detach(), rtol=2e-6, atol=2e-7)
    torch.testing.assert_close(state.exp_avg, adamw.state[p]["exp_avg"], rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(state.exp_avg_sq, adamw.state[p]["exp_avg_sq"], rtol=2e-6, atol=1e-9)


@every_backend
@pytest.mark.parametrize("clip_total", [True, False])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_it_is_the_chain_step_by_step(device: str, backend: str, clip_total: bool, scaled: bool) -> None:
    """Each step starts from the chain's tensors: a rounding may decide which of two equally good points the prox takes."""
    w0 = normal(63, 20)
    p = torch.nn.Parameter(w0.clone())
    adamw = torch.optim.AdamW([p], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    scale = normal(20, seed=50).abs() + 0.1 if scaled else None
    start = p.detach().clone(), torch.zeros_like(w0), torch.zeros_like(w0)
    for step in range(1, 8):
        grad = normal(63, 20, seed=step)
        p.grad = grad.clone()
        if clip_total:
            accumulate_frozen_penalty(p.detach(), w0, 0.1, 0.1, p.grad, backend="reference")
            norm = torch.nn.utils.clip_grad_norm_([p], 5.0)
        else:
            norm = torch.nn.utils.clip_grad_norm_([p], 5.0)
            accumulate_frozen_penalty(p.detach(), w0, 0.1, 0.1, p.grad, backend="reference")
        adamw.step()
        z = p.detach().clone()
        p.data = prox_24(z, 0.05, column_scale=scale, backend="reference")
        w, m, v = (x.to(device, copy=True) for x in start)
        settings = dataclasses.replace(SETTINGS, step=step, lambda1=0.05, lambda2=0.1, clip_total=clip_total)
        statistics = prox_adamw_(
            w,
            grad.to(device),
            AdamState(m, v),
            settings,
            w0=w0.to(device),
            column_scale=None if scale is None else scale.to(device),
            grad_coef=(5.0 / (norm + 1e-6)).to(device),
            backend=backend,
        )
        assert_same_solution(w, p.detach(), z, 0.05, scale)
        torch.testing.assert_close(statistics[1].sqrt().cpu().float(), norm, rtol=1e-5, atol=0)
        state = adamw.state[p]
        torch.testing.assert_close(m.cpu(), state["exp_avg"], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(v.cpu(), state["exp_avg_sq"], rtol=1e-5, atol=1e-9)
        start = p.detach().clone(), state["exp_avg"].clone(), state["exp_avg_sq"].clone()


@needs_triton
@pytest.mark.parametrize(
    ("shape", "storage"), KERNEL_GRID, ids=lambda x: storage_name(x) if len(x) == 3 and isinstance(x[2], str) else str(x)
)
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_kernel_is_the_reference(device: str, poisoned: None, shape: tuple[int, ...], storage: Storage, stochastic: bool) -> None:
    """Without a prox, whose rounding the chain's test covers. All but 1 number in 500 (2 in a small tensor) agree to fp32 rounding, those
    by one step of their storage, where a rounding falls on the other side of a border: 24-bit weights have a border every 256 ulp of the
    fp32 arithmetic, in which the card's fused operations and the CPU differ by one or two, so there 1 in 50."""
    settings = dataclasses.replace(SPARSE, lambda1=0.0, stochastic=stochastic, seed=0xFEDCBA9876543210, offset=12345)
    expected = case(shape, storage)
    actual = expected.to(device)
    coef = torch.tensor(0.7)
    statistics = actual.step(settings, "triton", w0=actual.w0, grad_coef=coef.to(device))
    reference = expected.step(settings, "reference", w0=expected.w0, grad_coef=coef)
    few = max(2, expected.w.numel() // (50 if storage[1] == 8 else 500))
    torch.testing.assert_close(statistics[:2].cpu(), reference[:2], rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(statistics[2:].cpu(), reference[2:], rtol=0, atol=few)
    weight_step = {0: 2.0**-7, 8: 2.0**-15, 16: 2e-6}[storage[1] if storage[0] == BF16 else 16]
    moment_steps = {"fp32": (2e-6, 2e-6), "bf16": (2.0**-7, 2.0**-7), "int8": (0.02, 0.02)}[storage[2]]
    for mine, theirs, step in (
        (actual.weight(), expected.weight(), weight_step),
        *zip(actual.moments(), expected.moments(), moment_steps, strict=True),
    ):
        scale = theirs.abs().max()
        difference = (mine - theirs).abs()
        assert int((difference > 2e-6 * theirs.abs() + 2e-7 * scale).sum()) <= few
        # An 8-bit code's neighbour is at most 2 / 127 (first) or 4 / 255 (second) of the largest moment away.
        assert (difference <= step * (scale if step == 0.02 else theirs.abs()) + 2e-7 * scale).all()


@every_backend
@every_storage
def test_statistics(device: str, backend: str, storage: Storage) -> None:
    made = case((7, 12), storage).to(device)
    exact = made.weight().double()
    penalty = frozen_penalty(exact, made.w0.cpu().double(), 0.1, 0.1)
    for clip_total in (True, False):
        now = made.clone()
        settings = dataclasses.replace(SPARSE, clip_total=clip_total)
        statistics = now.step(settings, backend, w0=now.w0, grad_coef=torch.tensor(0.5, device=device)).cpu()
        assert (statistics.dtype, statistics.shape) == (torch.float64, (4,))
        w0 = made.w0.cpu() if clip_total else None
        square = gradient_square(exact, w0, 0.1, 0.1, made.grad.cpu().to(FP32))
        torch.testing.assert_close(statistics[0], penalty, rtol=1e-5, atol=0)
        torch.testing.assert_close(statistics[1], square, rtol=1e-5, atol=0)
        assert statistics[2] == count_24_blocks(now.w).item()
        assert statistics[3] == 0


# --- layouts and edges --------------------------------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("storage", [(FP32, 0, "fp32"), (BF16, 0, "int8"), (BF16, 16, "bf16")], ids=storage_name)  # each kind once
def test_non_contiguous_views(device: str, poisoned: None, backend: str, storage: Storage) -> None:
    expected = case((20, 12), storage).to(device)
    actual = expected.clone()
    canvas = torch.full((12, 40), NAN, dtype=actual.w.dtype, device=device)
    actual.w = canvas[:, ::2].t().copy_(actual.w)
    actual.grad, actual.w0 = actual.grad.t().contiguous().t(), actual.w0.t().contiguous().t()
    scale = (normal(24, seed=9).abs() + 0.5).to(device)[::2]
    settings = dataclasses.replace(SPARSE, stochastic=True)
    statistics = actual.step(settings, backend, w0=actual.w0, column_scale=scale)
    reference = expected.step(settings, backend, w0=expected.w0, column_scale=scale.contiguous())
    torch.testing.assert_close(statistics, reference, rtol=1e-6, atol=0)
    assert all(torch.equal(x, expected.tensors()[name]) for name, x in actual.tensors().items())
    assert canvas[:, 1::2].isnan().all()


@every_backend
@pytest.mark.parametrize("shape", [(0, 8), (5, 0), (2, 0, 4)])
def test_empty(device: str, backend: str, shape: tuple[int, ...]) -> None:
    w = torch.zeros(shape, device=device)
    statistics = prox_adamw_(w, w.clone(), AdamState(w.clone(), w.clone()), SPARSE, w0=w, backend=backend)
    assert statistics.tolist() == [0, 0, 0, 0]
    assert (statistics.dtype, statistics.device.type) == (torch.float64, device)


@every_backend
def test_fp32_gradient_of_bf16_weights(device: str, backend: str) -> None:
    """A gradient that was accumulated in fp32 is used as it is."""
    one, other = (case((7, 12), (BF16, 8, "fp32")).to(device) for _ in range(2))
    other.grad = one.grad.float()
    settings = dataclasses.replace(SPARSE, lambda1=0.0)  # a prox may magnify the rounding by which two compiled kernels differ
    for made in (one, other):
        made.step(settings, backend)
    torch.testing.assert_close(one.weight(), other.weight(), rtol=2.0**-15, atol=0)
    for mine, theirs in zip(one.moments(), other.moments(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)


@every_backend
def test_a_parameter_with_a_graph(device: str, backend: str) -> None:
    """Leaves that require grad are stepped in place, and autograd does not mind."""
    p = torch.nn.Parameter(normal(4, 8).to(device))
    prox_adamw_(
        p, torch.ones_like(p), AdamState(torch.zeros(4, 8, device=device), torch.zeros(4, 8, device=device)), SETTINGS, backend=backend
    )
    p.square().sum().backward()
    assert p.grad is not None


# --- errors -------------------------------------------------------------------------------------------------------------------------


def changed(made: Case, **changes: object) -> Case:
    fields = {field.name for field in dataclasses.fields(AdamState)}
    state = dataclasses.replace(made.state, **{name: x for name, x in changes.items() if name in fields})
    return dataclasses.replace(made, state=state, **{name: x for name, x in changes.items() if name not in fields})


W = torch.zeros(4, 8)
ERRORS = [
    ({"w": torch.zeros(4, 6)}, ShapeError, "expected the last dimension divisible by 4, got shape"),
    ({"w": torch.zeros(4, 8, dtype=torch.int32)}, TypeError, "expected float32, float16, bfloat16 or float64 for w"),
    ({"w": torch.zeros(4, 8, dtype=torch.float16)}, TypeError, "expected float32, bfloat16 or float64 for w, got torch.float16"),
    ({"w": [1.0]}, TypeError, "expected a tensor for w, got list"),
    ({"grad": None}, ConfigError, "expected a gradient, got None. Run backward first."),
    ({"grad": W.to_sparse()}, TypeError, "expected a dense gradient, got torch.sparse_coo. Use embeddings with sparse=False."),
    ({"grad": torch.zeros(8, 4)}, ShapeError, "expected grad of shape (4, 8), got (8, 4)"),
    ({"grad": W.bfloat16()}, TypeError, "expected grad of dtype torch.float32 like w, got torch.bfloat16"),
    ({"grad": W.to("meta")}, ConfigError, "expected grad on cpu, got meta"),
    ({"exp_avg": W.half()}, TypeError, "for w of dtype torch.float32, got (torch.float16, torch.float32)"),
    ({"exp_avg_sq": torch.zeros(8, 4)}, ShapeError, "expected exp_avg_sq of shape (4, 8), got (8, 4)"),
    ({"exp_avg": torch.zeros(8, 4).t()}, ConfigError, "expected a contiguous exp_avg, got strides (1, 4)"),
    ({"exp_avg_scale": torch.zeros(1)}, ConfigError, "expected exp_avg_scale beside 8-bit moments only"),
    ({"exp_avg": W.char(), "exp_avg_sq": W.byte()}, ConfigError, "expected exp_avg_scale beside 8-bit moments only"),
    ({"residual": W.char()}, TypeError, "expected an int8 or int16 residual beside bfloat16 weights, got torch.int8 beside torch.float32"),
    ({"w0": torch.zeros(8, 4)}, ShapeError, "expected w0 of shape (4, 8), got (8, 4)"),
    ({"column_scale": torch.ones(4)}, ShapeError, "expected column_scale of shape (8,), got (4,)"),
    ({"grad_coef": torch.ones(1)}, ShapeError, "expected grad_coef of shape (), got (1,)"),
    ({"backend": "cuda"}, ConfigError, "expected backend 'triton' or 'reference', got 'cuda'"),
]


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS, ids=[message[:60] for _, _, message in ERRORS])
def test_errors(changes: dict[str, object], error: type[Exception], message: str) -> None:
    options = {name: changes[name] for name in ("w0", "column_scale", "grad_coef", "backend") if name in changes}
    made = changed(
        Case(W.clone(), W.clone(), AdamState(W.clone(), W.clone()), W), **{n: x for n, x in changes.items() if n not in options}
    )  # fmt: skip
    with pytest.raises(error) as caught:
        made.step(SETTINGS, **options)
    assert str(caught.value).startswith("prox_adamw_: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fp64_needs_the_reference() -> None:
    w = torch.zeros(4, 8, dtype=torch.float64)
    state = AdamState(w.clone(), w.clone())
    with pytest.raises(BackendError, match=r"fp32, fp16 or bf16 for backend='triton'|expected Triton"):
        prox_adamw_(w, w, state, SETTINGS, backend="triton")
    with pytest.raises(TypeError, match=r"expected moments \(torch.float64, torch.float64\)"):
        prox_adamw_(w, w, AdamState(W, W), SETTINGS)
    prox_adamw_(w, w, state, SETTINGS)
