"""The figures this project promises for pylm-2m, through the public pipeline: one comparison, all methods on the same windows.

Protocol: 400 calibration windows of 512 tokens, drawn with seed 0; perplexity on the first 128 held-out windows; fp32.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from proxsparse_triton.comparison import Comparison, compare
from proxsparse_triton.pipeline import RunConfig, prune

pytestmark = pytest.mark.slow

DATA = Path(__file__).parent / "data"
METHODS = ("magnitude", "wanda", "sparsegpt", "proxsparse")


def config(folder: Path, device: str) -> RunConfig:
    return RunConfig(
        model="demo",
        output=folder / "run",
        calibration=str(DATA / "calibration.jsonl.gz"),
        evaluation=str(DATA / "heldout.jsonl.gz"),
        samples=400,
        seqlen=512,
        evaluation_windows=128,
        seed=0,
        device=device,
    )


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory, device: str) -> Comparison:
    """proxsparse as published, with the learning rate that suits this model."""
    settings = {"proxsparse": {"recipe": "paper", "lr": 5e-4}}
    return compare(config(tmp_path_factory.mktemp("quality"), device), METHODS, settings)


@pytest.fixture(scope="module")
def perplexity(comparison: Comparison) -> dict[str, float]:
    figures = {"dense": comparison.inputs.dense_perplexity} | {row.record.method: row.record.perplexity for row in comparison.rows}
    assert all(figure is not None for figure in figures.values())
    return figures  # type: ignore[return-value]


def test_all_methods_ran_on_the_stated_windows(comparison: Comparison) -> None:
    assert tuple(row.record.method for row in comparison.rows) == METHODS
    calibration, evaluation = comparison.inputs.calibration, comparison.inputs.evaluation
    assert calibration is not None
    assert evaluation is not None
    assert (len(calibration.tokens), calibration.seqlen, calibration.seed) == (400, 512, 0)
    assert (len(evaluation.tokens), evaluation.seqlen) == (128, 512)


def test_dense(perplexity: dict[str, float]) -> None:
    assert perplexity["dense"] == pytest.approx(5.870, abs=0.01)


def test_magnitude(perplexity: dict[str, float]) -> None:
    assert perplexity["magnitude"] == pytest.approx(74.7, rel=0.01)


def test_wanda(perplexity: dict[str, float]) -> None:
    assert perplexity["wanda"] == pytest.approx(22.7, rel=0.05)


def test_sparsegpt_is_better_than_wanda(perplexity: dict[str, float]) -> None:
    assert perplexity["sparsegpt"] < perplexity["wanda"]
    assert perplexity["sparsegpt"] <= 15.0  # 14.43 when this was written: its updates are worth a third


def test_proxsparse(perplexity: dict[str, float]) -> None:
    assert perplexity["proxsparse"] <= 24.5


def test_the_learned_mask_is_not_the_one_it_started_from(comparison: Comparison) -> None:
    agreement = {row.record.method: row.magnitude_agreement for row in comparison.rows}
    assert agreement["magnitude"] == 1.0
    assert 0.9 < agreement["proxsparse"] < 0.99
    summary = comparison.rows[-1].record.summary
    assert summary["steps"] == 400
    assert 0.8 < summary["share_24"] <= 1.0  # type: ignore[operator]


def test_the_recipe_auto_beats_updated_weights_with_original_ones(perplexity: dict[str, float], tmp_path: Path, device: str) -> None:
    """Nothing tuned, half of its passes: 9.34 with both (mean of three seeds on a GPU)."""
    run = replace(config(tmp_path, device), settings={"epochs": 1})
    record = prune(run)
    assert record.perplexity is not None
    assert record.perplexity <= 10.5
    assert record.perplexity < 0.75 * perplexity["sparsegpt"]
    assert record.summary["steps"] == 400
    assert record.summary["agreement"]["wanda"] > record.summary["agreement"]["magnitude"] > 0.5  # type: ignore[index]
