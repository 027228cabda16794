"""Several methods on the same text: one folder each, figures that can be compared."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from proxsparse_triton import comparison, pipeline
from proxsparse_triton.comparison import Comparison, agreement, compare
from proxsparse_triton.errors import ConfigError, LearningError
from proxsparse_triton.formats.owned import MARKER
from proxsparse_triton.formats.verify import verify_folder
from proxsparse_triton.methods.magnitude import Magnitude
from proxsparse_triton.methods.wanda import Wanda
from proxsparse_triton.models.selection import LayerPlan
from proxsparse_triton.pipeline import RunConfig, prune

ROOT = Path(__file__).parents[1]
ASSET = ROOT / "proxsparse_triton" / "assets" / "pylm-2m"
METHODS = ("magnitude", "wanda", "sparsegpt", "proxsparse")
SETTINGS = {"proxsparse": {"recipe": "paper", "lambda1": 20.0, "lr": 2e-3}, "sparsegpt": {"mask_only": True}}

pytestmark = pytest.mark.usefixtures("one_thread")


def config(output: Path, text: str, **changes: Any) -> RunConfig:
    settings = {
        "model": "demo",
        "output": output,
        "calibration": text,
        "samples": 4,
        "seqlen": 64,
        "evaluation_windows": 4,
        "device": "cpu",
    }
    return RunConfig(**{**settings, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, text: str) -> tuple[Path, Comparison, list[bool]]:
    """The comparison, and for each model loaded whether another one was still alive."""
    out = tmp_path_factory.mktemp("runs") / "table"
    alive: list[weakref.ref[nn.Module]] = []
    others: list[bool] = []
    load = pipeline.load_model

    def spy(*args: Any, **kwargs: Any) -> nn.Module:
        gc.collect()
        others.append(any(ref() is not None for ref in alive))
        model = load(*args, **kwargs)
        alive.append(weakref.ref(model))
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "load_model", spy)
        patch.setattr(comparison, "load_model", spy)
        result = compare(config(out, text), METHODS, SETTINGS)
    return out, result, others


def test_one_complete_run_folder_per_method(finished: tuple[Path, Comparison, list[bool]]) -> None:
    out, result, _ = finished
    assert {path.name for path in out.iterdir()} - {"report"} == {*METHODS, "manifest.json", "report.html"}  # report: pictures
    assert [path.name for path in out.parent.iterdir()] == ["table"]
    for row in result.rows:
        assert row.record.folder == out / row.record.method
        report = verify_folder(row.record.folder, original=ASSET)
        assert report.ok, report.problems
        manifest = json.loads((row.record.folder / "manifest.json").read_text())
        assert manifest["perplexity"] == {"dense": result.inputs.dense_perplexity, "pruned": row.record.perplexity}
        assert manifest["config"]["method"] == manifest["method"]["name"] == row.record.method
        assert manifest["config"]["settings"] == SETTINGS.get(row.record.method, {})


def test_all_methods_saw_the_same_windows(finished: tuple[Path, Comparison, list[bool]]) -> None:
    out, result, _ = finished
    assert result.inputs.calibration is not None
    assert result.inputs.evaluation is not None
    for method in METHODS:
        manifest = json.loads((out / method / "manifest.json").read_text())
        if method == "magnitude":  # reads none
            assert manifest["calibration"] is None
        else:
            assert manifest["calibration"]["fingerprint"] == result.inputs.calibration.fingerprint
        assert manifest["evaluation"]["fingerprint"] == result.inputs.evaluation.fingerprint


def test_every_method_starts_from_the_dense_model(finished: tuple[Path, Comparison, list[bool]], text: str, tmp_path: Path) -> None:
    """The last of four gives what it gives alone: nothing of the earlier ones is left in the model."""
    out, result, _ = finished
    record = prune(config(tmp_path / "alone", text, settings=SETTINGS["proxsparse"]))
    assert (tmp_path / "alone" / "masks.safetensors").read_bytes() == (out / "proxsparse" / "masks.safetensors").read_bytes()
    assert record.perplexity == result.rows[-1].record.perplexity
    assert record.dense_perplexity == result.inputs.dense_perplexity


def test_figures(finished: tuple[Path, Comparison, list[bool]]) -> None:
    _, result, _ = finished
    rows = {row.record.method: row for row in result.rows}
    assert tuple(rows) == METHODS
    assert rows["magnitude"].magnitude_agreement == 1.0
    assert 0.5 < rows["wanda"].magnitude_agreement < 0.95
    assert 0.5 < rows["proxsparse"].magnitude_agreement < 1.0
    dense = result.inputs.dense_perplexity
    assert dense is not None
    for row in result.rows:
        assert row.record.perplexity is not None
        assert row.record.perplexity > dense
        assert row.record.seconds > 0
        assert row.record.peak_memory > 0
    assert rows["wanda"].record.perplexity < rows["magnitude"].record.perplexity  # type: ignore[operator]


def test_manifest_of_the_comparison(finished: tuple[Path, Comparison, list[bool]]) -> None:
    out, result, _ = finished
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["tool"] == "proxsparse-triton"
    assert manifest["perplexity"] == {"dense": result.inputs.dense_perplexity}
    assert [entry["folder"] for entry in manifest["comparison"]] == list(METHODS)
    assert [entry["magnitude_agreement"] for entry in manifest["comparison"]] == [row.magnitude_agreement for row in result.rows]
    assert manifest["comparison"][-1]["lambda1"] == 20.0
    assert ".partial" not in (out / "manifest.json").read_text()


def test_one_model_in_memory_at_a_time(finished: tuple[Path, Comparison, list[bool]]) -> None:
    others = finished[2]
    assert len(others) == 2 * len(METHODS)  # the dense one and the written one of each method
    assert not any(others)


def test_agreement_counts_blocks() -> None:
    kept = torch.tensor([[True, True, False, False] * 3])
    other = torch.tensor([[True, True, False, False, False, False, True, True, True, False, True, False]])
    assert agreement({"a": kept}, {"a": kept}) == 1.0
    assert agreement({"a": kept}, {"a": other}) == pytest.approx(1 / 3)
    # over all layers together, not the mean of the layers' shares
    assert agreement({"a": kept, "b": kept[:, :4]}, {"a": other, "b": kept[:, :4]}) == pytest.approx(2 / 4)


def test_every_method_is_repaired(text: str, tmp_path: Path) -> None:
    """The same repair after each mask; magnitude, which reads no text, is calibrated for it as well."""
    plan: Any = {"include": (r"layers\.0\.",), "repair": "least-squares"}
    result = compare(config(tmp_path / "run", text, **plan), ["magnitude", "wanda"], {})
    entries = json.loads((tmp_path / "run" / "manifest.json").read_text())["comparison"]
    assert [entry["repair"] for entry in entries] == [{"kind": "least-squares"}] * 2
    for row in result.rows:
        manifest = json.loads((row.record.folder / "manifest.json").read_text())
        assert manifest["weights_updated"] is True
        assert manifest["calibration"]["windows"] == 4
        assert verify_folder(row.record.folder, original=ASSET).ok


@pytest.mark.parametrize("methods", [[], ["wanda", "wanda"]])
def test_methods_once_each(methods: list[str], text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="compare: expected at least one method, each once"):
        compare(config(tmp_path / "run", text), methods, {})
    assert list(tmp_path.iterdir()) == []


def test_a_method_that_diverges_keeps_its_metrics(text: str, tmp_path: Path) -> None:
    """No folder under the output's name, but the steps that were taken can be read, and what had finished is a run."""
    with pytest.raises(LearningError, match="at step 3 of 4"):
        compare(config(tmp_path / "run", text), ["magnitude", "proxsparse"], {"proxsparse": {"recipe": "paper", "lr": 1e30}})
    left = tmp_path / "run.partial"
    assert [path.name for path in tmp_path.iterdir()] == ["run.partial"]
    assert {path.name for path in left.iterdir()} == {"magnitude", "proxsparse.partial", MARKER}
    assert {path.name for path in (left / "proxsparse.partial").iterdir()} == {"metrics.jsonl", MARKER}
    assert verify_folder(left / "magnitude", original=ASSET).ok
    rows = (tmp_path / "run.partial" / "proxsparse.partial" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2]


def test_a_page_that_fails_leaves_the_comparison(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> None:
        raise OSError("no page today")

    monkeypatch.setattr(comparison, "write_report", fails)
    with pytest.raises(OSError, match="no page today"):
        compare(config(tmp_path / "run", text), ["magnitude"], {})
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"magnitude", "manifest.json"}


def test_what_one_method_refuses_is_refused_before_the_others_run(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(self: Wanda, plan: LayerPlan) -> None:
        raise ConfigError(f"wanda: expected other layers, got {plan.selected()[0]}. Leave it out.")

    monkeypatch.setattr(Wanda, "check", refuses)
    monkeypatch.setattr(Magnitude, "prune", lambda self, task: pytest.fail("work was done"))
    with pytest.raises(ConfigError, match="wanda: expected other layers"):
        compare(config(tmp_path / "run", text), ["magnitude", "wanda"], {})
    assert list(tmp_path.iterdir()) == []


def test_a_method_that_is_interrupted_leaves_those_before_it(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(self: Magnitude, task: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Magnitude, "prune", bug)
    with pytest.raises(KeyboardInterrupt):
        compare(config(tmp_path / "run", text), ["wanda", "magnitude"], {})
    assert [path.name for path in tmp_path.iterdir()] == ["run.partial"]
    assert {path.name for path in (tmp_path / "run.partial").iterdir()} == {"wanda", MARKER}
    assert verify_folder(tmp_path / "run.partial" / "wanda", original=ASSET).ok
