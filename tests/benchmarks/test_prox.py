"""`pst bench prox`: what is measured, that nothing wrong is timed, and what the rows say."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from proxsparse_triton.benchmarks import prox
from proxsparse_triton.benchmarks.prox import NEAR_TIES, RIVAL_LAMBDAS, RIVAL_SHAPE, SIGMA, Case, ProxBench, bytes_per_weight, worse_blocks
from proxsparse_triton.benchmarks.timer import HostClock, Machine, machine
from proxsparse_triton.errors import BackendError, ConfigError, ProxSparseError
from proxsparse_triton.ops import prox_24

CPU = torch.device("cpu")
SMALL = ((32, 64),)
QUICK = machine("cpu", quick=True)
CARD = Machine(torch.device("cuda"), HostClock(), 1, 0)  # its cases can be listed without one


def test_all_llama_shapes_strengths_and_the_hard_regime() -> None:
    cases = ProxBench()._cases(CARD)
    assert len(cases) == 2 * 3 * (5 + 1)
    assert {case.shape for case in cases} == {(4096, 4096), (11008, 4096), (4096, 11008)}
    assert {case.lam_scale for case in cases if not case.near_ties} == {0.001, 0.005, 0.02, 0.1, 0.5}
    assert {case.lam_scale for case in cases if case.near_ties} == {1.0}


def test_the_published_algorithm_runs_where_it_is_affordable() -> None:
    bench = ProxBench()
    with_rivals = [case for case in bench._cases(CARD) if bench._with_rivals(case, CARD)]
    assert {(case.shape, case.lam_scale) for case in with_rivals} == {(RIVAL_SHAPE, lam) for lam in RIVAL_LAMBDAS}
    assert len(with_rivals) == 4
    for rival in (True, False):
        bench = ProxBench(rival=rival)
        assert {bench._with_rivals(case, CARD) for case in bench._cases(CARD)} == {rival}


def test_weights_have_the_scale_they_claim() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(dtype, (256, 512), 0.5)
        z = case.weights(CPU, 0)
        assert z.dtype == dtype
        assert float(z.float().square().mean().sqrt()) == pytest.approx(SIGMA, rel=0.02)
        assert torch.equal(z, case.weights(CPU, 0))
        assert not torch.equal(z, case.weights(CPU, 1))
        assert case.lam * SIGMA == pytest.approx(0.5)


def test_near_ties_are_hard() -> None:
    case = Case(torch.float32, (256, 512), 1.0, near_ties=True)
    blocks = case.weights(CPU, 0).view(-1, 4)
    magnitude = blocks.abs()
    spread = (magnitude.amax(-1) - magnitude.amin(-1)) / magnitude.mean(-1)
    assert spread.quantile(0.01) > 0.2e-3
    assert spread.quantile(0.99) < 0.5
    assert 0.5 * SIGMA < magnitude.mean() < 1.5 * SIGMA
    assert (blocks < 0).float().mean() == pytest.approx(0.5, abs=0.02)
    kept = (prox_24(blocks, case.lam) != 0).sum(-1).bincount(minlength=5) / len(blocks)
    assert (kept[2:] > 0.1).all(), "two, three and four kept weights compete"


def test_a_wrong_answer_is_seen() -> None:
    case = Case(torch.float32, (32, 64), 0.5)
    z = case.weights(CPU, 0)
    right = prox_24(z, case.lam)
    assert worse_blocks(case, z, right) == 0
    wrong = right.clone()
    wrong[3, 8:12] = z[3, 8:12]
    wrong[4, 0] = math.nan
    assert worse_blocks(case, z, wrong) == 2 / (32 * 64 / 4)
    assert worse_blocks(case, z, z) > 0.9


def test_rounding_to_bf16_is_not_worse_but_two_more_units_are() -> None:
    case = Case(torch.bfloat16, (64, 256), 0.1)
    z = case.weights(CPU, 0)
    w = prox_24(z.float(), case.lam).bfloat16()
    assert worse_blocks(case, z, w) == 0
    assert worse_blocks(case, z, (w.view(torch.int16) - 4 * (w != 0).to(torch.int16)).view(torch.bfloat16)) > 0.5


def test_large_tensors_are_checked_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(torch.float32, (33, 64), 0.5)
    z = case.weights(CPU, 0)
    wrong = prox_24(z, case.lam)
    wrong[32] = z[32]
    whole = worse_blocks(case, z, wrong)
    monkeypatch.setattr(prox, "CHECKED_WEIGHTS", 300)
    assert worse_blocks(case, z, wrong) == whole > 0


def test_nothing_wrong_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(z: Tensor, lam: float, *, out: Tensor) -> Tensor:
        return out.copy_(z)

    monkeypatch.setattr(prox, "prox_24", broken)
    monkeypatch.setattr(prox, "measure", lambda *_: pytest.fail("timed"))
    with pytest.raises(BackendError, match=r"bench prox: expected answers as good as the reference's, got .*% of the blocks solved worse"):
        list(ProxBench(shapes=SMALL, lambdas=(0.5,)).run(QUICK))


def test_rows() -> None:
    rows = list(ProxBench(dtypes=("bfloat16",), shapes=SMALL, lambdas=(0.1,), rival=True).run(QUICK))
    assert [row["what"] for row in rows] == ["prox_24 (reference)", "copy of the same tensor", "published, eager"]
    for row in rows:
        assert (row["bench"], row["dtype"], row["shape"], row["lam_scale"], row["blocks"]) == ("prox", "bfloat16", "32x64", 0.1, "normal")
        assert row["gb_per_s"] == pytest.approx(4 * 32 * 64 / row["us"] / 1e3)  # type: ignore[operator]
        assert row["us_20"] <= row["us"] <= row["us_80"]  # type: ignore[operator]
    ours, copy, published = rows
    assert ours["worse_blocks"] == 0
    assert ours["times_ours"] == 1
    assert published["worse_blocks"] is not None
    assert copy["worse_blocks"] is None
    assert published["times_ours"] == published["us"] / ours["us"]  # type: ignore[operator]


def test_the_default_on_a_cpu_is_small() -> None:
    cases = ProxBench(dtypes=("float32",))._cases(QUICK)
    assert {case.shape for case in cases} == {prox.CPU_SHAPE}
    assert [case.name for case in cases][-1] == f"float32 512x1024, lam*scale 1, {NEAR_TIES}"


def test_bytes_per_weight() -> None:
    assert (bytes_per_weight(torch.bfloat16), bytes_per_weight(torch.float32)) == (4, 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lambdas": (0.0,)}, "bench prox: expected a finite --lambda > 0, got 0.0. Choose another value."),
        ({"lambdas": (0.1, math.inf)}, "got inf"),
        ({"shapes": ((8, 6),)}, "bench prox: expected --shape OUTxIN with IN divisible by 4, got 8x6. Choose another."),
        ({"shapes": ((0, 8),)}, "got 0x8"),
    ],
)
def test_bad_settings(settings: dict[str, tuple[float, ...]], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        ProxBench(**settings)  # type: ignore[arg-type]
    assert isinstance(error.value, ProxSparseError)
    assert message in str(error.value)


@pytest.mark.gpu
def test_on_the_card() -> None:
    place = machine("cuda", quick=True)
    rows = list(ProxBench(shapes=((1024, 1024),), lambdas=(0.005,), rival=True).run(place))
    by_name = {row["what"]: row for row in rows if row["dtype"] == "bfloat16"}
    assert set(by_name) == {"prox_24 (triton)", "copy of the same tensor", "published, eager", "published, torch.compile"}
    ours = by_name["prox_24 (triton)"]
    assert ours["scratch_bytes"] == 0
    assert 0 < ours["of_roof"] < 1.5  # type: ignore[operator]
    assert by_name["published, eager"]["scratch_bytes"] > 0  # type: ignore[operator]
    assert by_name["published, eager"]["us"] > ours["us"]  # type: ignore[operator]
