"""Runs whose kept weights are repaired: what the folder says of it, what is in the files, and what it takes."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from proxsparse_triton import load_masks, pipeline
from proxsparse_triton.errors import ConfigError, DataError, LearningError
from proxsparse_triton.formats.owned import MARKER
from proxsparse_triton.formats.verify import verify_folder
from proxsparse_triton.methods.repair import Repair
from proxsparse_triton.pipeline import RunConfig, prune
from proxsparse_triton.report.reading import read_steps

ROOT = Path(__file__).parents[1]
ASSET = ROOT / "proxsparse_triton" / "assets" / "pylm-2m"
SETTINGS: dict[str, dict[str, object]] = {"proxsparse": {"steps": 2}}
FIRST = (r"layers\.0\.",)

pytestmark = pytest.mark.usefixtures("one_thread")


def config(output: Path, text: str, method: str, **changes: Any) -> RunConfig:
    settings = {
        "model": "demo",
        "output": output,
        "method": method,
        "settings": SETTINGS.get(method, {}),
        "calibration": text,
        "samples": 4,
        "seqlen": 64,
        "evaluation_windows": 4,
        "device": "cpu",
    }
    return RunConfig(**{**settings, **changes})


def manifest(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return content


@pytest.mark.parametrize(
    ("method", "kind"), [("magnitude", "finetune"), ("wanda", "both"), ("sparsegpt", "least-squares"), ("proxsparse", "least-squares")]
)
def test_after_every_method(method: str, kind: str, text: str, tmp_path: Path) -> None:
    """The mask is the method's own; the files hold other weights under it, +0.0 elsewhere and the original bits of all the rest."""
    steps = None if kind == "least-squares" else 2
    record = prune(config(tmp_path / "run", text, method, repair=kind, repair_steps=steps, include=FIRST))
    prune(config(tmp_path / "plain", text, method, include=FIRST))
    assert (tmp_path / "run" / "masks.safetensors").read_bytes() == (tmp_path / "plain" / "masks.safetensors").read_bytes()
    found = manifest(record.folder)
    assert found["weights_updated"] is True
    assert found["method"]["name"] == method
    assert found["method"]["repair"] == record.summary["repair"]
    assert found["method"]["repair"]["kind"] == kind
    assert found["method"]["repair"].get("steps") == steps
    assert (found["config"]["repair"], found["config"]["repair_steps"]) == (kind, steps)
    assert found["calibration"]["windows"] == 4  # magnitude alone would need none
    entry = json.loads((record.folder / "config.json").read_text())["proxsparse"]
    assert entry == {"method": method, "pattern": "2:4", "original": "demo", "weights_updated": True}
    masks = load_masks(record.folder)
    written, plain, original = (load_file(folder / "model.safetensors") for folder in (record.folder, tmp_path / "plain", ASSET))
    assert len(masks) == 7
    for name, tensor in written.items():
        bits = tensor.view(torch.int16)
        if name not in masks:
            assert torch.equal(bits, original[name].view(torch.int16)), name
            continue
        assert not bits[~masks[name]].any(), name
        assert not torch.equal(tensor, plain[name]), name
    report = verify_folder(record.folder, original=ASSET)
    assert report.ok, report.problems
    assert all(layer.changed for layer in report.layers)
    written = bytearray((record.folder / "model.safetensors").read_bytes())
    written[-1] ^= 1
    (record.folder / "model.safetensors").write_bytes(written)
    assert any("is not the file that was written" in problem for problem in verify_folder(record.folder).problems)


def test_without_it_nothing_is_said(text: str, tmp_path: Path) -> None:
    record = prune(config(tmp_path / "run", text, "magnitude", include=FIRST))
    found = manifest(record.folder)
    assert "repair" not in found["method"]
    assert (found["config"]["repair"], found["weights_updated"], found["calibration"]) == (None, False, None)


def test_it_is_worth_it_and_can_be_repeated(text: str, tmp_path: Path) -> None:
    """Least squares after magnitude on 16 windows: perplexity of the written model on text it has not seen."""
    more: dict[str, Any] = {"samples": 16, "evaluation_windows": 16}
    plain = prune(config(tmp_path / "plain", text, "magnitude", **more)).perplexity
    record = prune(config(tmp_path / "run", text, "magnitude", repair="least-squares", **more))
    assert plain is not None
    assert record.perplexity is not None
    assert record.dense_perplexity is not None
    assert record.dense_perplexity < record.perplexity < 0.7 * plain
    prune(config(tmp_path / "again", text, "magnitude", repair="least-squares", **more))
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (record.folder / "model.safetensors").read_bytes()


def test_a_repair_that_fails_leaves_the_masks(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learning may have taken hours: what it found is kept."""

    def fails(self: Repair, task: object, result: object) -> None:
        raise LearningError("repair: expected luck, got none. Try again.")

    monkeypatch.setattr(Repair, "run", fails)
    with pytest.raises(LearningError, match="expected luck"):
        prune(config(tmp_path / "run", text, "proxsparse", repair="both", include=FIRST))
    assert [path.name for path in tmp_path.iterdir()] == ["run.partial"]
    assert {path.name for path in (tmp_path / "run.partial").iterdir()} == {"metrics.jsonl", "masks.safetensors", MARKER}
    assert len(load_masks(tmp_path / "run.partial")) == 7


def test_steps_of_repair_are_no_steps_of_the_mask(text: str, tmp_path: Path) -> None:
    settings: dict[str, object] = {"steps": 3, "batch_size": 2}
    prune(config(tmp_path / "run", text, "proxsparse", settings=settings, repair="finetune", repair_steps=2, include=FIRST))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(row.get("phase"), row["step"]) for row in rows] == [(None, 1), (None, 2), (None, 3), ("repair", 1), ("repair", 2)]
    steps, problems = read_steps(tmp_path / "run" / "metrics.jsonl")
    assert problems == []
    assert [step for step, _ in steps.loss] == [1, 2, 3]


def test_one_model_in_memory_at_a_time(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that was pruned, the dense one that is repaired, the written one."""
    alive: list[weakref.ref[nn.Module]] = []
    load = pipeline.load_model

    def spy(*args: Any, **kwargs: Any) -> nn.Module:
        gc.collect()
        assert not [ref for ref in alive if ref() is not None]
        model = load(*args, **kwargs)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(pipeline, "load_model", spy)
    changes: dict[str, Any] = {"samples": 1, "evaluation_windows": 1, "include": FIRST}
    prune(config(tmp_path / "run", text, "wanda", repair="both", repair_steps=1, **changes))
    assert len(alive) == 3


def test_it_needs_text_even_where_the_method_does_not(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="could not be reached"):
        prune(config(tmp_path / "run", "c4", "magnitude", repair="least-squares"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repair_steps": 5}, "prune: expected --repair-steps with --repair, got it alone. Add --repair, or leave it out."),
        ({"repair": "all"}, "repair: expected --repair both, least-squares, finetune, got 'all'."),
        ({"repair": "least-squares", "repair_steps": 5}, "repair: expected --repair-steps with fine-tuning"),
        ({"repair": "both", "repair_steps": 0}, "--repair-steps of at least 1, got 0"),
    ],
)
def test_settings_are_checked_at_once(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        config(tmp_path / "run", "stdlib", "magnitude", **changes)
    assert message in str(error.value)
