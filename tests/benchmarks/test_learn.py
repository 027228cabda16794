"""`pst bench learn` on a tiny model: the loops run, and the rows say what they should."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from proxsparse_triton.benchmarks import learn, timer
from proxsparse_triton.benchmarks.learn import OURS, PLAIN, SKIPPED, TURNS, Case, LearnBench
from proxsparse_triton.benchmarks.shapes import TINY, build, config_of, step_flops
from proxsparse_triton.benchmarks.timer import HostClock, machine
from proxsparse_triton.errors import ConfigError, ResourceError
from proxsparse_triton.models.selection import plan_layers
from proxsparse_triton.training.loop import steps_of

CPU = torch.device("cpu")
QUICK = machine("cpu", quick=True)


@pytest.fixture(autouse=True)
def known_matmul_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learn, "matmul_rate", lambda place: 1e12)


pytestmark = pytest.mark.usefixtures("one_thread")


def run(**settings: Any) -> list[dict[str, Any]]:
    return list(LearnBench(**{"steps": 5, **settings}).run(QUICK))


def test_rows() -> None:
    ours, plain = run()
    config = config_of(TINY)
    flops = step_flops(build(config, CPU), config, learn.TINY_TOKENS)
    for row in (ours, plain):
        assert (row["bench"], row["model"], row["tokens"], row["steps"]) == ("learn", TINY, learn.TINY_TOKENS, 5)
        assert row["samples"] == TURNS * (5 - SKIPPED)
        assert row["tokens_per_s"] == pytest.approx(learn.TINY_TOKENS / row["ms"] * 1e3)
        assert row["mfu"] == pytest.approx(flops / (row["ms"] / 1e3) / 1e12)
        assert 0 < row["optimizer_share"] < 1
        assert row["optimizer_share"] == pytest.approx(row["optimizer_ms"] / row["ms"])
        assert row["minutes_400_steps"] == pytest.approx(400 * row["ms"] / 60e3)
        assert row["peak_bytes"] is None  # a CPU process has no peak of its own
    assert (ours["what"], plain["what"]) == (OURS, PLAIN)
    assert ours["to_plain"] == pytest.approx(ours["ms"] / plain["ms"])
    assert plain["to_plain"] == 1
    assert (ours["weight_bits"], ours["moments"], ours["lambda2"]) == (24, "float32", learn.LAMBDA2)
    assert (plain["weight_bits"], plain["moments"], plain["lambda2"]) == (16, "bfloat16", None)


def test_settings_reach_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[object, ...]] = []
    original = learn.learn

    def watched(model: Any, windows: Any, optimizer: Any, config: Any, loss_of: Any) -> None:
        original(model, windows, optimizer, config, loss_of)
        prox, plain = optimizer.param_groups
        w = prox["params"][0]
        state = optimizer.state[w]
        shapes = {tuple(window.shape) for window in windows}
        seen.append(
            (len(windows), shapes, config.checkpointing, prox["lambda2"], plain["prox"], state["exp_avg"].dtype, "residual" in state)
        )

    monkeypatch.setattr(learn, "learn", watched)
    rows = run(tokens=48, lambda2=0.0, weight_bits=16, moments="int8", checkpointing=True, rival=False)
    assert seen == [(5, {(48,)}, True, 0.0, False, torch.int8, False)] * TURNS
    (row,) = rows
    assert (row["tokens"], row["moments"], row["weight_bits"], row["checkpointing"], row["lambda2"]) == (48, "int8", 16, "on", 0.0)
    assert row["to_plain"] is None


@pytest.mark.parametrize(
    ("settings", "loss"), [({"recipe": "auto"}, "kl"), ({"recipe": "auto", "loss": "ce"}, "ce"), ({"loss": "kl"}, "kl")]
)
def test_recipes_reach_the_loop(settings: dict[str, Any], loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `pst prune` would learn with: its loss, its groups, and only what learns; the plain loop then learns everything again."""
    seen: list[tuple[object, ...]] = []
    plain: list[bool] = []
    original, original_plain = learn.learn, learn.learn_plain

    def watched(model: Any, windows: Any, optimizer: Any, config: Any, loss_of: Any) -> None:
        prox = [group for group in optimizer.param_groups if group["prox"]]
        learning = sum(p.requires_grad for p in model.parameters())
        scaled = all(group["column_scale"] is not None for group in prox)
        seen.append((type(loss_of).__name__, len(prox), scaled, learning, steps_of(len(windows), config)))
        original(model, windows, optimizer, config, loss_of)

    def watched_plain(model: Any, *rest: Any) -> None:
        plain.append(all(p.requires_grad for p in model.parameters()))
        original_plain(model, *rest)

    monkeypatch.setattr(learn, "learn", watched)
    monkeypatch.setattr(learn, "learn_plain", watched_plain)
    ours, other = run(steps=2, **settings)
    auto = settings.get("recipe") == "auto"
    model = build(config_of(TINY), CPU)
    layers = len(plan_layers(model).selected())
    expected = (layers, True, layers) if auto else (1, False, len(list(model.parameters())))
    assert seen == [("DistillationLoss" if loss == "kl" else "NextTokenLoss", *expected, 2)] * TURNS  # steps, not passes
    assert plain == [True] * TURNS
    assert (ours["recipe"], ours["loss"]) == ("auto" if auto else "paper", loss)
    assert (other["recipe"], other["loss"]) == (None, "ce")
    assert ours["steps"] == 2


def test_the_loops_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = []
    original = learn._turn

    def watched(loop: str, *rest: Any) -> Any:
        turns.append(loop)
        return original(loop, *rest)

    monkeypatch.setattr(learn, "_turn", watched)
    run(steps=2)
    assert turns == [OURS, PLAIN] * TURNS


def test_a_loop_that_does_not_fit_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(learn, "learn_plain", too_large)
    ours, plain = run(steps=2)
    assert (plain["what"], plain["note"]) == (PLAIN, "out of memory")
    assert "ms" not in plain
    assert ours["ms"] > 0
    assert ours["to_plain"] is None


def test_a_model_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(learn, "build", too_large)
    with pytest.raises(ResourceError, match=r"bench learn: expected room for tiny, got out of memory. Choose a smaller --model."):
        run()


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(learn, "learn_ours", broken)
    with pytest.raises(RuntimeError, match="something else"):
        run(steps=2)


def test_the_first_steps_are_left_out() -> None:
    """A step lasts from the end of one optimiser step to the end of the next."""
    marks = learn._Marks(QUICK)
    marks.after = [100.0, 110.0, 115.0, 118.0, 120.0, 123.0]
    marks.before = [99.0, 109.0, 114.0, 117.5, 119.0, 121.5]
    turn = marks.turn(replace(QUICK, clock=HostClock()))
    assert turn.steps == [3.0, 2.0, 3.0]
    assert turn.optimizer == [0.5, 1.0, 1.5]
    short = learn._Marks(QUICK)
    short.before, short.after = [1.0, 3.0], [2.0, 5.0]
    assert short.turn(QUICK).steps == [3.0]


def test_predicted_peaks_of_llama_2_7b() -> None:
    """What stays (weights, bf16 moments, W0) alone is 53 GB; the plain loop has no W0."""
    bench = LearnBench(checkpointing=True)
    case: Case = bench._case("llama-2-7b", config_of("llama-2-7b"), QUICK)
    weights = 2 * 6_738_415_616
    pruned = 2 * 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert case.plan.settings.moments == "bfloat16"
    step = sum(case.plan.items[key] for key in ("gradients", "activations", "logits", "workspace"))
    assert 0.9 * weights < step < 1.5 * weights
    assert case.predicted(OURS) == pytest.approx(3 * weights + pruned + step, rel=1e-3)
    assert case.predicted(PLAIN) == pytest.approx(3 * weights + step, rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 1}, "bench learn: expected --steps of at least 2, got 1. Choose another value."),
        ({"tokens": 1}, "bench learn: expected --tokens of at least 2, got 1. Choose another value."),
        ({"lambda2": -0.5}, "bench learn: expected a finite --lambda2 >= 0, got -0.5. Choose another value."),
        ({"lambda2": math.inf}, "got inf"),
        (
            {"models": ("tiny", "gpt")},
            "bench learn: expected --model of llama-2-7b, llama-3.1-8b, llama-2-13b, qwen2.5-14b, tiny, got 'gpt'",
        ),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        LearnBench(**settings)
    assert message in str(error.value)


@pytest.mark.gpu
def test_on_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learn, "matmul_rate", timer.matmul_rate)
    ours, plain = list(LearnBench(models=(TINY,), steps=6).run(machine("cuda", quick=True)))
    for row in (ours, plain):
        assert row["peak_bytes"] > 0  # type: ignore[operator]
        assert 0 < row["mfu"] < 1  # type: ignore[operator]
        assert row["matmul_tflops"] > 10  # type: ignore[operator]
