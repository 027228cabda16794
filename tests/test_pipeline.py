"""`prune` from the library: what a run folder holds, that anyone can load it, and that it can be repeated."""

from __future__ import annotations

import dataclasses
import gc
import json
import re
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from proxsparse_triton import load_masks, pipeline
from proxsparse_triton.calibration.sources import open_source
from proxsparse_triton.calibration.windows import evaluation_windows
from proxsparse_triton.errors import ConfigError, DataError, LearningError, ResourceError
from proxsparse_triton.formats.owned import MARKER
from proxsparse_triton.formats.verify import verify_folder
from proxsparse_triton.methods.magnitude import Magnitude, magnitude_mask
from proxsparse_triton.models.loading import load_tokenizer, resolve_model
from proxsparse_triton.pipeline import RunConfig, RunRecord, prune
from proxsparse_triton.progress import Progress
from proxsparse_triton.sparsity import check_mask

ROOT = Path(__file__).parents[1]
ASSET = ROOT / "proxsparse_triton" / "assets" / "pylm-2m"
# Four steps hardly move a mask by the derived settings; these do.
LEARN = {"recipe": "paper", "lambda1": 20.0, "lr": 2e-3}
RUN_FILES = {
    "config.json",
    "manifest.json",
    "masks.safetensors",
    "metrics.jsonl",
    "model.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
}

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


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class Notes(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        self.lines.append(message)


@dataclasses.dataclass(frozen=True)
class Finished:
    folder: Path
    record: RunRecord
    notes: list[str]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, text: str) -> Finished:
    out, notes = tmp_path_factory.mktemp("runs") / "run", Notes()
    record = prune(config(out, text, settings=LEARN), notes)
    return Finished(out, record, notes.lines)


def test_the_folder_holds_exactly_this(finished: Finished) -> None:
    files = {str(path.relative_to(finished.folder)) for path in finished.folder.rglob("*")}
    assert files == RUN_FILES | {"training.json"}  # the last one came with the original
    assert [path.name for path in finished.folder.parent.iterdir()] == ["run"]


def test_config_json(finished: Finished) -> None:
    written = json.loads((finished.folder / "config.json").read_text())
    entry = written.pop("proxsparse")
    assert entry == {"method": "proxsparse", "pattern": "2:4", "original": "demo", "weights_updated": False}
    assert written == json.loads((ASSET / "config.json").read_text())
    assert "quantization_config" not in written


def test_masks_and_weights(finished: Finished) -> None:
    """Original bits where the mask keeps, +0.0 where it does not, everything else untouched."""
    masks = load_masks(finished.folder)
    written, original = load_file(finished.folder / "model.safetensors"), load_file(ASSET / "model.safetensors")
    assert set(masks) == set(finished.record.parameters) <= set(original)
    assert len(masks) == 28
    assert set(written) == set(original)
    changed = 0
    for name, tensor in written.items():
        bits, before = tensor.view(torch.int16), original[name].view(torch.int16)
        if name in masks:
            mask = masks[name]
            check_mask("test", name, mask)
            assert torch.equal(bits, before.where(mask, torch.zeros_like(before))), name
            changed += int((mask != magnitude_mask(original[name])).sum())
        else:
            assert torch.equal(bits, before), name
    assert changed > 0, "four steps have not moved one mask: the test shows nothing"


def test_metrics(finished: Finished) -> None:
    rows = rows_of(finished.folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert set(row) - {"warnings"} == {"step", "loss", "penalty", "grad_norm", "lr", "share_24", "layers", "mask_changes"}
        assert set(row["layers"]) == set(finished.record.parameters)
    assert rows[-1]["share_24"] > rows[0]["share_24"]
    assert rows[-1]["share_24"] == pytest.approx(finished.record.summary["share_24"])


def test_manifest(finished: Finished, text: str) -> None:
    manifest = json.loads((finished.folder / "manifest.json").read_text())
    assert manifest["tool"] == "proxsparse-triton"
    assert set(manifest["versions"]) >= {"python", "torch", "transformers", "safetensors"}
    assert set(manifest["model"]["files"]) == {"config.json", "model.safetensors"}
    assert manifest["model"]["spec"] == "demo"
    expected = {field.name for field in dataclasses.fields(RunConfig)} - {"output", "command"}
    assert set(manifest["config"]) == expected
    assert manifest["config"]["settings"] == LEARN
    assert manifest["config"]["seed"] == 42
    assert manifest["method"]["name"] == "proxsparse"
    assert manifest["method"]["settings"]["warmup"] == 0.1  # defaults are written out
    assert manifest["method"]["lambda1"] == 20.0
    assert set(manifest["parameters"]) == set(finished.record.parameters)
    assert manifest["skipped"] == {"lm_head": "output head"}
    assert manifest["device"] == "cpu"
    for side, windows in (("calibration", 4), ("evaluation", 4)):
        entry = manifest[side]
        assert (entry["windows"], entry["seqlen"], len(entry["fingerprint"])) == (windows, 64, 64)
        assert entry["source"] == f"{text} ({'heldout' if side == 'evaluation' else 'calibration'})"
    assert manifest["perplexity"] == {"dense": finished.record.dense_perplexity, "pruned": finished.record.perplexity}
    assert manifest["perplexity"]["pruned"] > manifest["perplexity"]["dense"] > 1
    assert manifest["seconds"] > 0
    assert manifest["peak_memory_bytes"] == finished.record.peak_memory > 0


def test_plan_is_noted_before_learning(finished: Finished) -> None:
    lines = finished.notes
    plan = next(i for i, line in enumerate(lines) if line.startswith("pruning 28 of 29 layers in model.layers: 1.6 M weights"))
    assert lines[plan + 1] == "  skipped lm_head [4096, 192]: output head"
    assert lines[plan + 2].startswith("proxsparse, recipe paper: 4 steps of 1 window (1 pass over 4), loss ce at the learned weights, ")
    assert "lambda1 20, lambda2 0, lr 0.002" in lines[plan + 2]


def test_verify_passes(finished: Finished) -> None:
    report = verify_folder(finished.folder, original=ASSET)
    assert report.ok, report.problems
    assert len(report.layers) == 28


PLAIN = """
import json, sys
sys.modules["proxsparse_triton"] = None  # must not be needed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
folder, windows = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    log_p = model(input_ids=windows).logits[:, :-1].double().log_softmax(-1)
loss = -log_p.gather(-1, windows[:, 1:, None]).mean()
print(json.dumps({**{key: sorted(map(str, value)) for key, value in info.items() if value}, "perplexity": float(loss.exp())}))
"""


def test_loads_in_a_fresh_process_without_this_package(finished: Finished, text: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(resolve_model(str(finished.folder)))
    windows, _ = evaluation_windows(open_source(text, split="heldout"), tokenizer, windows=4, seqlen=64)
    tokens = json.dumps([window.tolist() for window in windows.tokens])
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(finished.folder), tokens], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert not [word for word in ("missing", "unexpected", "newly initialized", "MISSING") if word in done.stderr], done.stderr
    report = json.loads(done.stdout)
    assert report == {"perplexity": pytest.approx(finished.record.perplexity, rel=1e-5)}


def test_the_same_run_twice(finished: Finished, text: str, tmp_path: Path) -> None:
    prune(config(tmp_path / "again", text, settings=LEARN))
    for name in ("masks.safetensors", "model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (finished.folder / name).read_bytes(), name
    assert rows_of(tmp_path / "again") == rows_of(finished.folder)
    one, other = (json.loads((run / "manifest.json").read_text()) for run in (finished.folder, tmp_path / "again"))
    assert {key for key in one if one[key] != other[key]} <= {"created", "seconds", "peak_memory_bytes"}


def test_another_seed_is_another_run(finished: Finished, text: str, tmp_path: Path) -> None:
    prune(config(tmp_path / "other", text, settings=LEARN, seed=1, evaluation_windows=1))
    assert (tmp_path / "other" / "masks.safetensors").read_bytes() != (finished.folder / "masks.safetensors").read_bytes()
    assert rows_of(tmp_path / "other")[0]["loss"] != rows_of(finished.folder)[0]["loss"]


def test_a_run_can_be_pruned_again(finished: Finished, text: str, tmp_path: Path) -> None:
    """The written folder is an ordinary model: magnitude on it finds the mask it has."""
    record = prune(config(tmp_path / "second", text, model=str(finished.folder), method="magnitude"))
    assert record.dense_perplexity == pytest.approx(finished.record.perplexity)
    assert record.perplexity == pytest.approx(record.dense_perplexity)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_other_methods_write_the_same_kind_of_folder(method: str, text: str, tmp_path: Path) -> None:
    record = prune(config(tmp_path / "run", text, method=method))
    assert {path.name for path in record.folder.iterdir()} == RUN_FILES | {"training.json"}
    manifest = json.loads((record.folder / "manifest.json").read_text())
    assert (manifest["calibration"] is None) == (method == "magnitude")
    assert manifest["weights_updated"] == (method == "sparsegpt")
    assert rows_of(record.folder) == []
    report = verify_folder(record.folder, original=ASSET)
    assert report.ok, report.problems
    assert sum(layer.changed or 0 for layer in report.layers) == 0 or method == "sparsegpt"


def test_only_some_layers(text: str, tmp_path: Path) -> None:
    record = prune(config(tmp_path / "run", text, method="wanda", include=("mlp",), skip=(r"layers\.[1-3]",)))
    assert record.parameters == tuple(f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
    skipped = json.loads((tmp_path / "run" / "manifest.json").read_text())["skipped"]
    assert skipped["model.layers.1.mlp.up_proj"] == r"matched --skip layers\.[1-3]"
    assert skipped["model.layers.0.self_attn.q_proj"] == "matched no --include"


def test_documents_of_unequal_length(text: str, tmp_path: Path) -> None:
    """The authors' windows: padded batches in learning, several lengths in the block-by-block methods."""
    for method, settings in (("proxsparse", {**LEARN, "batch_size": 3}), ("wanda", {})):
        record = prune(config(tmp_path / method, text, method=method, settings=settings, windows="documents", samples=7, seqlen=300))
        assert verify_folder(record.folder, original=ASSET).ok
    assert len(rows_of(tmp_path / "proxsparse")) == 3


def test_calibration_and_evaluation_share_no_document(text: str, tmp_path: Path) -> None:
    """The same file for both: what is evaluated on is left out of calibration, and said so."""
    notes = Notes()
    prune(config(tmp_path / "run", text, method="wanda", evaluation=text), notes)
    assert any(re.search("out of calibration: (it is|they are) evaluated on", line) for line in notes.lines)


@pytest.mark.parametrize("named", [False, True])
def test_fewer_evaluation_windows_than_asked(named: bool, text: str, tmp_path: Path) -> None:
    """What there is is measured on, and the count said; the text of --eval is treated alike."""
    notes = Notes()
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(Path(text).read_text().splitlines()[:4]))
    changes: dict[str, Any] = {"evaluation": str(few)} if named else {}
    record = prune(config(tmp_path / "run", text, method="magnitude", seqlen=512, evaluation_windows=10_000, **changes), notes)
    count = json.loads((tmp_path / "run" / "manifest.json").read_text())["evaluation"]["windows"]
    assert 1 <= count < 10_000
    assert any(line.endswith(f": {count} windows of 512 tokens to measure on, not 10000.") for line in notes.lines)
    assert record.perplexity is not None


def test_a_named_evaluation_text_without_one_window(text: str, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("def f(): pass")
    with pytest.raises(DataError, match=r"at least one window of 64 tokens from .*short\.txt, .* Lower --seqlen, or give more text"):
        prune(config(tmp_path / "run", text, evaluation=str(tmp_path / "short.txt")))


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_broken_calibration_text_is_an_error_for_every_method(method: str, tmp_path: Path) -> None:
    """Also where the method needs none and only the measurement would be lost."""
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "good"}\n{"text": 3}\n')
    with pytest.raises(DataError, match="line 2"):
        prune(config(tmp_path / "run", str(broken), method=method))
    assert [path.name for path in tmp_path.iterdir()] == ["broken.jsonl"]


def test_text_that_the_hub_does_not_give(tmp_path: Path) -> None:
    """Offline, the default text of a method that needs none: pruned, not measured, and why."""
    pytest.importorskip("datasets")
    notes = Notes()
    record = prune(config(tmp_path / "run", "c4", method="magnitude"), notes)
    assert record.perplexity is None
    assert any("No perplexity is measured" in line and "could not be reached" in line for line in notes.lines)
    with pytest.raises(DataError, match="could not be reached"):
        prune(config(tmp_path / "other", "c4", method="wanda"))


def test_text_too_short_to_hold_anything_out(text: str, tmp_path: Path) -> None:
    """One document: all of it is calibrated on, nothing is measured, and the reason is given."""
    short = tmp_path / "one.txt"
    short.write_text(json.loads(Path(text).read_text().splitlines()[0])["text"])
    notes = Notes()
    record = prune(config(tmp_path / "run", str(short), method="wanda"), notes)
    assert record.perplexity is None
    assert record.dense_perplexity is None
    (line,) = [line for line in notes.lines if line.startswith("No perplexity is measured; name a text with --eval. The reason: ")]
    assert "one.txt" in line
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["evaluation"] is None
    assert manifest["calibration"]["source"] == str(short)


def test_one_model_in_memory_at_a_time(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the written folder is loaded to be measured, the model that was pruned is gone."""
    alive: list[weakref.ref[nn.Module]] = []
    load = pipeline.load_model

    def spy(*args: Any, **kwargs: Any) -> nn.Module:
        gc.collect()
        assert not [ref for ref in alive if ref() is not None]
        model = load(*args, **kwargs)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(pipeline, "load_model", spy)
    prune(config(tmp_path / "run", text, settings=LEARN, samples=1, evaluation_windows=1))
    assert len(alive) == 2


def test_divergence_keeps_the_metrics(text: str, tmp_path: Path) -> None:
    """Real divergence by an absurd learning rate; step 1 has rate 0, step 2 breaks the weights, step 3 sees it."""
    out = tmp_path / "run"
    with pytest.raises(LearningError, match=r"at step 3 of 4, first seen in model\."):
        prune(config(out, text, settings={"recipe": "paper", "lr": 1e30, "lambda1": 0.1}))
    assert not out.exists()
    partial = tmp_path / "run.partial"
    assert {path.name for path in partial.iterdir()} == {"metrics.jsonl", MARKER}
    assert [row["step"] for row in rows_of(partial)] == [1, 2]
    # and the next attempt under the same name starts afresh
    prune(config(out, text, settings=LEARN))
    assert len(rows_of(out)) == 4
    assert not partial.exists()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory")])
def test_out_of_memory_names_the_settings(error: Exception, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(self: Magnitude, task: object) -> None:
        raise error

    monkeypatch.setattr(Magnitude, "prune", exhausted)
    with pytest.raises(ResourceError, match=r"prune: expected memory for magnitude on cpu, got out of memory\. Lower --seqlen, --samples"):
        prune(config(tmp_path / "run", text, method="magnitude"))
    assert list(tmp_path.iterdir()) == []


def test_settings_are_checked_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "resolve_model", lambda *args, **kwargs: pytest.fail("the model was looked at"))
    with pytest.raises(ConfigError, match="lambda1"):
        prune(config(tmp_path / "run", "stdlib", settings={"lambda1": -1.0}))
    with pytest.raises(ConfigError, match="got 'wnada'"):
        prune(config(tmp_path / "run", "stdlib", method="wnada"))


def test_gpu_memory_decides_about_checkpointing(finished: Finished, text: str, tmp_path: Path) -> None:
    """A limit that a step only keeps with it; the masks are the same."""
    assert finished.record.summary["checkpointing"] is False
    record = prune(config(tmp_path / "run", text, settings=LEARN, gpu_memory=0.001))
    assert record.summary["checkpointing"] is True
    assert (record.folder / "masks.safetensors").read_bytes() == (finished.folder / "masks.safetensors").read_bytes()
    assert json.loads((record.folder / "manifest.json").read_text())["config"]["gpu_memory"] == 0.001


def test_text_is_read_before_the_weights(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "load_model", lambda *args, **kwargs: pytest.fail("the weights were loaded"))
    with pytest.raises(DataError, match="Lower --samples or --seqlen"):
        prune(config(tmp_path / "run", text, samples=100_000))
    with pytest.raises(ConfigError, match="--seqlen of at most 512, the model's limit, got 513"):
        prune(config(tmp_path / "run", text, seqlen=513))


def test_default_window_is_the_models_limit() -> None:
    from transformers import LlamaConfig

    assert pipeline.checked_seqlen(None, LlamaConfig(max_position_embeddings=512)) == 512
    assert pipeline.checked_seqlen(None, LlamaConfig(max_position_embeddings=131072)) == 4096
    assert pipeline.checked_seqlen(8192, LlamaConfig(max_position_embeddings=131072)) == 8192
