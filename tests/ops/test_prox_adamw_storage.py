"""`prox_adamw_`: how weights and moments are stored, what does not depend on sharding, and gradients that are not finite."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from adversarial import same_bits
from stepping import (
    BF16,
    FP32,
    HAVE_TRITON,
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

from proxsparse_triton.ops import prox_adamw_
from proxsparse_triton.reference.storage import encode_first, encode_second, join_residual, random_bits, round_bf16, split_residual
from proxsparse_triton.sparsity import count_24_blocks, count_negative_zeros
from proxsparse_triton.step import AdamState, StepSettings

NAN, INF = float("nan"), float("inf")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter
tiles = pytest.fixture(autouse=True, scope="module")(small_tiles)


@pytest.fixture
def one_tile_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles of the card in the interpreter too: how exactly a block is solved depends on its neighbours."""
    if HAVE_TRITON:
        from proxsparse_triton.kernels import launch, prox_adamw

        monkeypatch.setattr(prox_adamw, "fused", lambda *_: launch.FUSED)


# --- storage ------------------------------------------------------------------------------------------------------------------------


def first_step(storage: Storage, device: str, backend: str, settings: StepSettings) -> Case:
    """From bf16 weights and zero moments, which every storage holds exactly, so that all compute the same step."""
    made = case((9, 140), storage).to(device)
    made.w.copy_(normal(9, 140).bfloat16())
    made.grad = normal(9, 140, seed=1).bfloat16().to(device, made.w.dtype)
    for name, x in made.tensors().items():
        if name != "w":
            x.zero_()
    made.step(settings, backend)
    return made


@every_backend
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("storage", [s for s in STORAGES if s[0] == BF16], ids=storage_name)
def test_what_is_stored_is_the_fp32_result_rounded(
    device: str, backend: str, storage: Storage, stochastic: bool, one_tile_for_all: None
) -> None:
    """Weights and bf16 moments bit for bit; 8-bit codes too but for one in 500 by one, where fp32 roundings meet a border."""
    settings = dataclasses.replace(SPARSE, lambda2=0.0, step=1, stochastic=stochastic, seed=0xFEDCBA9876543210, offset=12345)
    exact = first_step((FP32, 0, "fp32"), device, backend, settings)
    stored = first_step(storage, device, backend, settings)
    rand16 = random_bits(exact.w.cpu(), settings.seed, settings.offset) if stochastic else None
    w = exact.w.cpu()
    if stored.state.residual is None:
        expected = [round_bf16(w, rand16)]
    else:
        expected = list(split_residual(w, stored.state.residual.dtype, None if rand16 is None else rand16 & 0xFF))
        assert torch.equal(stored.state.residual.cpu(), expected[1])
    assert same_bits(stored.w, expected[0])
    for name, encode in (("exp_avg", encode_first), ("exp_avg_sq", encode_second)):
        value, actual = getattr(exact.state, name).cpu(), getattr(stored.state, name).cpu()
        if storage[2] == "int8":
            codes, scale = encode(value, 0.5 if rand16 is None else (rand16 + 0.5) / 65536)
            assert torch.equal(getattr(stored.state, f"{name}_scale").cpu(), scale)
            distance = (actual.int() - codes.int()).abs()
            assert distance.max() <= 1
            assert distance.sum() <= 3
        elif storage[2] == "bf16":
            assert same_bits(actual, round_bf16(value, rand16))
        else:
            assert torch.equal(actual, value)


@every_backend
@pytest.mark.parametrize("storage", [(BF16, 0, "bf16"), (BF16, 8, "int8"), (BF16, 16, "fp32")], ids=storage_name)  # each kind once
def test_shards_of_rows_are_the_whole(device: str, backend: str, storage: Storage, one_tile_for_all: None) -> None:
    """Bit for bit, whatever is stepped first, where rows are whole tiles: random bits belong to a weight's place in the whole tensor."""
    whole = case((5, 128), storage).to(device)
    settings = dataclasses.replace(SPARSE, stochastic=True, seed=77)
    shards = [whole.clone(lambda x, rows=rows: x[rows].clone()) for rows in (slice(3, 5), slice(0, 3))]
    total = whole.step(settings, backend, w0=whole.w0)
    parts = [
        shard.step(dataclasses.replace(settings, offset=offset), backend, w0=shard.w0)
        for shard, offset in zip(shards, (3 * 32, 0), strict=True)
    ]
    torch.testing.assert_close(total, parts[0] + parts[1], rtol=1e-5, atol=0)
    for name, x in whole.tensors().items():
        assert torch.equal(x, torch.cat([shards[1].tensors()[name], shards[0].tensors()[name]])), name


@every_backend
def test_same_seed_same_bits(device: str, backend: str) -> None:
    settings = dataclasses.replace(SPARSE, stochastic=True, seed=5)
    results = []
    for s in (settings, settings, dataclasses.replace(settings, seed=6)):
        made = case((9, 140), (BF16, 0, "int8")).to(device)
        made.step(s, backend)
        results.append(made.tensors())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert all(not torch.equal(results[0][name], results[2][name]) for name in ("w", "exp_avg", "exp_avg_sq"))


@every_backend
def test_stochastic_rounding_is_unbiased(device: str, backend: str) -> None:
    """Weights and moments whose exact new values lie between two storable numbers come out right on average, to 4.5 standard errors."""
    settings = StepSettings(lr=0.01, beta1=0.9, beta2=0.99, eps=1.0, weight_decay=0.05, step=1, stochastic=True, seed=1)
    # Fewer rows for 8 bits, which are slow in the interpreter. Steps of the storage near the largest moments, 0.15 and 0.0225.
    for moments, rows, first, second in (("bf16", 512, 2.0**-10, 2.0**-13), ("int8", 64, 0.15 * 2 / 127, 0.0225 * 4 / 255)):
        made = case((rows, 128), (BF16, 0, moments)).to(device)
        for x in made.tensors().values():
            x.zero_()
        made.w.fill_(1.0)
        made.grad.copy_(torch.linspace(0.5, 1.5, 128).to(BF16).expand(rows, 128))
        made.step(settings, backend)
        grad = made.grad[0].double().cpu()
        exact = (1 - 0.01 * 0.05) - 0.01 * grad / (grad + 1)
        m, v = made.moments()
        for actual, wanted, step in ((made.weight(), exact, 2.0**-8), (m, 0.1 * grad, first), (v, 0.01 * grad.square(), second)):
            error = actual.double().mean(0) - wanted
            assert (error.abs() <= 4.5 * step / 2 / rows**0.5).all()
            assert abs(error.mean()) <= 4.5 * step / 2 / (128 * rows) ** 0.5
        if moments == "bf16":  # neighbouring weights draw bits of their own
            up = made.weight()[:, 10:20] > exact[10:20].float()
            assert (torch.corrcoef(up.double().t()) - torch.eye(10)).abs().max() < 0.25


@every_backend
def test_sixteen_residual_bits_are_fp32(device: str, backend: str) -> None:
    """After many steps the weight with its residual is the fp32 weight, bit for bit, and the bf16 part is it rounded to nearest."""
    w0 = normal(16, 40).bfloat16().to(device)
    low, full = w0.clone(), w0.float()
    residual = torch.zeros(16, 40, dtype=torch.int16, device=device)
    states = [
        AdamState(torch.zeros(16, 40, device=device), torch.zeros(16, 40, device=device), residual=r) for r in (residual, None)
    ]  # fmt: skip
    for step in range(1, 31):
        grad = normal(16, 40, seed=step).to(device)
        settings = dataclasses.replace(SPARSE, step=step, lambda1=0.005, stochastic=True, seed=step)
        for w, state in zip((low, full), states, strict=True):
            prox_adamw_(w, grad, state, settings, w0=w0, backend=backend)
    assert same_bits(join_residual(low.cpu(), residual.cpu()), full)
    assert torch.equal(states[0].exp_avg, states[1].exp_avg)
    assert ((low.float() - full).abs() <= 2.0**-8 * full.abs()).all()
    assert 0 < count_24_blocks(full) < 160


@every_backend
@every_storage
def test_zeros_stay_plus_zero(device: str, backend: str, storage: Storage) -> None:
    """Pruned blocks without a gradient stay as they are, and nothing is ever -0.0."""
    made = case((5, 128), storage).to(device)
    for x in made.tensors().values():
        x[1:3] = 0
    made.grad[1:3] = 0
    made.step(dataclasses.replace(SPARSE, lambda1=1.0, stochastic=True), backend)
    assert (made.weight()[1:3] == 0).all()
    assert count_negative_zeros(made.w) == 0
    assert made.state.residual is None or (made.state.residual[made.w == 0] == 0).all()


@every_backend
@every_storage
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_a_nan_weight_stays_nan(device: str, backend: str, storage: Storage, stochastic: bool) -> None:
    """The card's own NaN is all ones: random bits on top would wrap around to -0.0 and hide it."""
    made = case((64, 8), storage).to(device)
    made.w[:, 3] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32).to(made.w.dtype)
    made.step(dataclasses.replace(SPARSE, stochastic=stochastic), backend)
    assert made.w[:, :4].isnan().all()
    assert made.w[:, 4:].isfinite().all()


# --- gradients that are not finite --------------------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("storage", [s for s in STORAGES if s[2] != "int8"], ids=storage_name)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_blocks_without_finite_gradient_are_left_alone(device: str, backend: str, storage: Storage, value: float) -> None:
    settings = dataclasses.replace(SPARSE, stochastic=True)
    before, healthy, broken = (case((6, 12), storage).to(device) for _ in range(3))
    broken.grad[2, 5] = value
    broken.grad[4, 0] = value
    healthy.step(settings, backend, w0=healthy.w0)
    assert broken.step(settings, backend, w0=broken.w0)[3] == 2
    untouched = torch.zeros(6, 12, dtype=torch.bool, device=device)
    untouched[2, 4:8] = untouched[4, 0:4] = True
    for name, x in broken.tensors().items():
        assert torch.equal(x[untouched], before.tensors()[name][untouched]), name
    # The kernel's solver may take another way to the same point when one block of its tile is broken.
    for mine, theirs in ((broken.weight(), healthy.weight()), *zip(broken.moments(), healthy.moments(), strict=True)):
        exact = {"rtol": 0, "atol": 0} if backend == "reference" else {"rtol": 2.0**-7, "atol": 1e-6}
        torch.testing.assert_close(mine[~untouched.cpu()], theirs[~untouched.cpu()], **exact)


@every_backend
@pytest.mark.parametrize("lambda1", [0.0, 0.1])
@pytest.mark.parametrize("value", [NAN, INF, 1e20])
def test_a_block_that_is_left_alone_does_not_count_as_stepped(device: str, backend: str, lambda1: float, value: float) -> None:
    """Though it is 2:4; the square of 1e20 is infinite in fp32."""
    made = case((1, 8), (FP32, 0, "fp32")).to(device)
    made.w.copy_(torch.tensor([[1.0, 0.0, 0.0, 2.0, 1.0, 0.0, 0.0, 2.0]]))
    made.grad.zero_()
    made.grad[0, 0] = value
    for x in (made.state.exp_avg, made.state.exp_avg_sq):
        x.zero_()
    statistics = made.step(dataclasses.replace(SPARSE, lambda1=lambda1, lambda2=0.0), backend)
    assert statistics[2:].tolist() == [1, 1]


@every_backend
@every_storage
@pytest.mark.parametrize("value", [NAN, INF])
def test_nothing_is_written_without_a_finite_coefficient(device: str, backend: str, storage: Storage, value: float) -> None:
    made = case((5, 128), storage).to(device)
    before = made.clone().tensors()
    statistics = made.step(SPARSE, backend, w0=made.w0, grad_coef=torch.tensor(value, device=device))
    assert all(torch.equal(x, before[name]) for name, x in made.tensors().items())
    assert statistics.isfinite().all()
    assert statistics[3] == 0
