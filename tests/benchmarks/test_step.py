"""`pst bench step`: the bytes of each storage against the tensors themselves, and that nothing wrong is timed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from proxsparse_triton.benchmarks import step
from proxsparse_triton.benchmarks.step import ADAMW, NORM, STEP, STEP_LAMBDA2, STORAGES, Parameter, StepBench, Storage, parameter
from proxsparse_triton.benchmarks.timer import Machine, Rival, Roof, Timing, machine
from proxsparse_triton.errors import BackendError, ConfigError

CPU = torch.device("cpu")
SHAPE = (16, 256)
QUICK = machine("cpu", quick=True)
every_storage = pytest.mark.parametrize("storage", STORAGES, ids=lambda storage: storage.name)


@pytest.fixture
def small_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "SHAPES", (SHAPE,))
    monkeypatch.setattr(step, "CHECKED_ROWS", SHAPE[0])


def test_the_storages() -> None:
    names = [(str(s.dtype).removeprefix("torch."), s.moments, s.weight_bits) for s in STORAGES]
    assert names == [
        ("float32", "float32", 32),
        ("bfloat16", "float32", 16),
        ("bfloat16", "bfloat16", 16),
        ("bfloat16", "bfloat16", 24),
        ("bfloat16", "int8", 16),
    ]
    assert [s.like_torch for s in STORAGES] == [True, False, True, False, False]


@every_storage
@pytest.mark.parametrize("lambda2", [True, False])
def test_bytes_are_those_of_the_tensors(storage: Storage, lambda2: bool) -> None:
    """Every tensor of the state counts twice, read and written; the gradient and W0 once."""
    p = parameter(storage, SHAPE, CPU, 0)
    written = [p.w, p.state.exp_avg, p.state.exp_avg_sq, p.state.exp_avg_scale, p.state.exp_avg_sq_scale, p.state.residual]
    total = 2 * sum(tensor.nbytes for tensor in written if tensor is not None) + p.grad.nbytes + (p.w0.nbytes if lambda2 else 0)
    assert step.step_bytes(storage, lambda2) == total / p.w.numel()


def test_bytes_of_the_rival_and_the_norm_pass() -> None:
    for storage in STORAGES:
        p = parameter(storage, SHAPE, CPU, 0)
        assert step.norm_bytes(storage) == (p.w.nbytes + p.w0.nbytes + p.grad.nbytes) / p.w.numel()
        if storage.like_torch:  # no residual, the same moments: what our step without lambda2 moves
            assert step.adamw_bytes(storage) == step.step_bytes(storage, False)


@every_storage
@pytest.mark.usefixtures("small_check")
def test_a_wrong_step_is_seen(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = step.step_settings(storage, 0.005, 0.25)
    step.check_against_reference(storage, settings, QUICK)
    right = step.fused_step

    def no_prox(p: Parameter, s: Any, lambda2: bool, backend: str | None = None) -> Tensor:
        return right(p, step.step_settings(storage, 0.005 if backend else 0.0, 0.25), lambda2)

    def wrong_figures(p: Parameter, s: Any, lambda2: bool, backend: str | None = None) -> Tensor:
        return right(p, s, lambda2) * (1.0 if backend else 1.001)

    monkeypatch.setattr(step, "fused_step", wrong_figures)
    with pytest.raises(BackendError, match=r"bench step: expected the reference's step, got statistics"):
        step.check_against_reference(storage, settings, QUICK)
    if storage.dtype == torch.float32:  # one step's shrinkage is below a unit of bf16
        monkeypatch.setattr(step, "fused_step", no_prox)
        with pytest.raises(BackendError, match=r"of the values differ \(float32, moments float32, 32 bits, lambda2 on\)"):
            step.check_against_reference(storage, settings, QUICK)


def run(**settings: Any) -> list[dict[str, object]]:
    return list(StepBench(shapes=(SHAPE,), **settings).run(QUICK))


@pytest.mark.usefixtures("small_check")
def test_rows() -> None:
    rows = run(dtypes=("bfloat16",))
    assert len(rows) == 4 * 3 + 1
    for row in rows:
        weights, moved, us = SHAPE[0] * SHAPE[1], row["bytes_per_weight"], row["us"]
        assert row["gb_per_s"] == pytest.approx(moved * weights / us / 1e3)  # type: ignore[operator]
        assert row["backend"] == "reference"
    alike = {row["what"]: row for row in rows if (row["moments"], row["weight_bits"]) == ("bfloat16", 16)}
    assert list(alike) == [STEP_LAMBDA2, STEP, NORM, ADAMW]
    assert alike[ADAMW]["to_adamw"] == 1
    assert alike[STEP]["to_adamw"] == alike[STEP]["us"] / alike[ADAMW]["us"]  # type: ignore[operator]
    assert alike[NORM]["to_adamw"] is None
    assert all(row["to_adamw"] is None for row in rows if row["moments"] != "bfloat16")


@pytest.mark.usefixtures("small_check")
def test_the_rival_can_be_left_out() -> None:
    assert ADAMW not in {row["what"] for row in run(dtypes=("float32",), rival=False)}


def test_every_round_starts_from_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the prox would soon meet weights that are 2:4 already, which are cheaper."""
    seen = []
    parameters: list[Parameter] = []
    original = step.parameter

    def collect(*arguments: Any) -> Parameter:
        parameters.append(original(*arguments))
        return parameters[-1]

    def watch(rivals: list[Rival], clock: object, rounds: int) -> dict[str, Timing]:
        for rival in rivals:
            if rival.name in (STEP, STEP_LAMBDA2):
                assert rival.calls == len(parameters) == 3
                rival.work()
                changed = [not torch.equal(p.w, p.start) for p in parameters]
                assert rival.reset is not None
                rival.reset()
                seen.append((all(changed), all(torch.equal(p.w, p.start) for p in parameters)))
        return {rival.name: Timing(1.0, 1.0, 1.0, 1) for rival in rivals}

    monkeypatch.setattr(step, "measure", watch)
    monkeypatch.setattr(step, "parameter", collect)
    place = Machine(QUICK.device, QUICK.clock, 1, 3 * 14 * SHAPE[0] * SHAPE[1])
    rows = step._measured(STORAGES[2], SHAPE, step.step_settings(STORAGES[2], 0.005, 0.25), place, Roof(place), True)
    assert seen == [(True, True), (True, True)]
    assert {row["what"] for row in rows} == {STEP_LAMBDA2, STEP, NORM, ADAMW}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lambdas": (-1.0,)}, "bench step: expected a finite --lambda >= 0, got -1.0. Choose another value."),
        ({"lambda2": 0.0}, "bench step: expected a finite --lambda2 > 0, got 0.0. Choose another value."),
        ({"lambda2": math.nan}, "got nan"),
        ({"shapes": ((4, 10),)}, "bench step: expected --shape OUTxIN with IN divisible by 4, got 4x10"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        StepBench(**settings)
    assert message in str(error.value)


@pytest.mark.gpu
def test_on_the_card() -> None:
    rows = list(StepBench(shapes=((1024, 1024),)).run(machine("cuda", quick=True)))
    assert len(rows) == 5 * 3 + 2
    assert all(row["backend"] == "triton" for row in rows)
    assert all(0 < row["of_roof"] < 1.5 for row in rows)  # type: ignore[operator]
