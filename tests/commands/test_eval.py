"""`pst eval`: the table and the JSON, the dense original of a run, and bad input in one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from packing import magnitude_run
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from proxsparse_triton.cli import main
from proxsparse_triton.commands import eval_table
from proxsparse_triton.evaluation import text as text_module
from proxsparse_triton.export import export_run
from proxsparse_triton.formats.manifest import write_manifest

datasets = pytest.importorskip("datasets")

ROOT = Path(__file__).parents[2]
ASSET = ROOT / "proxsparse_triton" / "assets" / "pylm-2m"
TASK = "tests/data/tasks/next_line.yaml"
TEXT = ["--perplexity", "tests/data/heldout.jsonl.gz", "--seqlen", "512", "--windows", "4"]


@pytest.fixture(autouse=True)
def own_data_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model without every second weight of its decoder, saved as an ordinary folder."""
    folder = tmp_path_factory.mktemp("damaged")
    model = AutoModelForCausalLM.from_pretrained(ASSET, dtype=torch.float32)
    for layer in model.model.layers.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data[..., ::2] = 0.0
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSET / name, folder)
    return folder


def run(*arguments: object) -> Result:
    """The command as a user runs it, on the CPU unless told otherwise."""
    device = [] if "--device" in arguments else ["--device", "cpu"]
    return CliRunner().invoke(main, ["eval", *map(str, arguments), *device])


def measured(*arguments: object) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def failed(*arguments: object) -> str:
    """The message of a run that ends with exit code 1: one line on stderr, nothing on stdout."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("pst: ")
    return message


def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_model(*args: Any, **kwargs: Any) -> None:
        pytest.fail("the weights were loaded before the check")

    monkeypatch.setattr("proxsparse_triton.models.loading.load_model", load_model)


def test_a_packed_folder_runs_packed(tmp_path: Path) -> None:
    """On a CPU the weight is unpacked for each product: the same numbers as its run's, and the same original to compare with."""
    run_folder = magnitude_run(tmp_path / "run")
    folder = export_run(str(run_folder), tmp_path / "packed", format="packed").folder
    dense, packed = measured(run_folder, *TEXT), measured(folder, *TEXT)
    assert packed["model"] == str(folder)
    assert packed["dense"] == dense["dense"] == str(ASSET)
    (one,), (other,) = packed["perplexity"], dense["perplexity"]
    assert one["perplexity"] == pytest.approx(other["perplexity"], rel=1e-5)
    assert one["dense"] == other["dense"] < one["perplexity"]
    shard = next(folder.glob("packed-*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert shard.name in failed(folder, *TEXT)


def test_json_names_corpus_length_and_count() -> None:
    report = measured("demo", *TEXT)
    assert {key: report[key] for key in ("model", "dense", "device", "dtype", "tasks")} == {
        "model": "demo",
        "dense": None,
        "device": "cpu",
        "dtype": "float32",
        "tasks": None,
    }
    (entry,) = report["perplexity"]
    assert (entry["corpus"], entry["seqlen"], entry["windows"]) == ("tests/data/heldout.jsonl.gz", 512, 4)
    assert len(entry["fingerprint"]) == 64
    assert "recovery" not in entry
    model, tokenizer = AutoModelForCausalLM.from_pretrained(ASSET, dtype=torch.float32), AutoTokenizer.from_pretrained(ASSET)
    assert entry["perplexity"] == pytest.approx(_by_hand(model, tokenizer), rel=1e-5)


def _by_hand(model: nn.Module, tokenizer: Any) -> float:
    import gzip

    ids: list[int] = []
    with gzip.open(ROOT / "tests/data/heldout.jsonl.gz", "rt", encoding="utf-8") as lines:
        while len(ids) < 4 * 512:
            ids += [0, *tokenizer(json.loads(next(lines))["text"], add_special_tokens=False)["input_ids"]]
    windows = torch.tensor(ids[: 4 * 512]).view(4, 512)
    with torch.no_grad():
        log_p = model(input_ids=windows).logits[:, :-1].double().log_softmax(-1)
    return float((-log_p.gather(-1, windows[:, 1:, None]).mean()).exp())


def test_dense_and_damaged_in_one_table(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = measured(damaged, *TEXT, "--tasks", TASK, "--dense", "demo", "--batch-size", "16")
    (text,) = report["perplexity"]
    assert text["perplexity"] > 5 * text["dense"]
    assert text["recovery"] == pytest.approx(100 * text["dense"] / text["perplexity"])
    (task,) = report["tasks"]["scores"]
    assert task["score"] < task["dense"]["score"]
    assert task["recovery"] == pytest.approx(100 * task["score"] / task["dense"]["score"])
    assert report["tasks"]["recovery"] == task["recovery"]
    assert (report["tasks"]["num_fewshot"], report["tasks"]["limit"], task["samples"]) == (0, None, 24)

    eval_table.print_report(report)
    table = capsys.readouterr().out
    assert "as good as dense (perplexity: dense / pruned, accuracy: pruned / dense)" in " ".join(table.split())
    for words in (
        "measure",
        "dense",
        "pruned",
        "recovery",
        "perplexity, tests/data/heldout.jsonl.gz, 4 windows of 512",
        "0-shot, all documents",
    ):
        assert words in table
    line = next(line for line in table.splitlines() if "next_line, acc " in line)
    error = task["stderr"]["acc"]
    assert f"{task['dense']['score']:.4f} ± " in line
    assert line.split()[-5:] == [f"{task['score']:.4f}", "±", f"{error:.4f}", f"{task['recovery']:.1f}", "%"]
    assert f"{text['perplexity']:.3f}" in table
    assert f"{text['recovery']:.1f} %" in table
    assert "next_line, acc_norm" in table


def test_table_on_stdout_notes_on_stderr() -> None:
    result = run("demo", *TEXT, "--tasks", TASK, "--limit", "2")
    assert result.exit_code == 0, result.output
    assert "demo (float32, cpu)" in result.stdout
    assert "the first 2 documents of each" in " ".join(result.stdout.split())
    assert "recovery" not in result.stdout.lower()
    assert "Loading demo" in result.stderr
    assert "Loading" not in result.stdout


def test_mean_of_several_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    def side(value: float) -> dict[str, Any]:
        return {"score": value, "metrics": {"acc": value}, "stderr": {}}

    scores = [{"task": name, "metric": "acc", "samples": 9, **side(0.5), "dense": side(0.8), "recovery": 62.5} for name in "ab"]
    tasks = {"num_fewshot": 0, "limit": None, "scores": scores, "mean": 0.5, "dense_mean": 0.8, "recovery": 62.5}
    eval_table.print_report({"model": "m", "dense": "d", "device": "cpu", "dtype": "float32", "perplexity": [], "tasks": tasks})
    assert "mean of 2 tasks, acc   0.8000   0.5000     62.5 %" in capsys.readouterr().out


def test_original_of_a_run_is_measured_by_default(damaged: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(damaged, folder)
    write_manifest(folder, {"model": {"spec": "demo", "revision": None}})
    report = measured(folder, *TEXT)
    assert report["dense"] == "demo"
    assert report["perplexity"][0]["recovery"] < 50
    assert measured(folder, *TEXT, "--no-dense")["dense"] is None


@pytest.mark.parametrize("model", ["/no/such/model", {"spec": "/no/such/model"}])
def test_original_that_is_gone_is_a_note(damaged: Path, tmp_path: Path, model: object) -> None:
    folder = tmp_path / "run"
    shutil.copytree(damaged, folder)
    write_manifest(folder, {"model": model})
    result = run(folder, *TEXT)
    assert result.exit_code == 0, result.output
    assert "The dense original is not measured: " in result.stderr
    assert "--no-dense" in result.stderr
    assert "recovery" not in result.stdout


def test_several_texts_and_limit(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("def add(a, b):\n    return a + b\n\n\n" * 60, encoding="utf-8")
    report = measured(
        "demo", *TEXT[:2], "--perplexity", tmp_path / "short.txt", "--seqlen", "64", "--windows", "2", "--tasks", TASK, "--limit", "3"
    )
    assert [entry["windows"] for entry in report["perplexity"]] == [2, 2]
    assert report["perplexity"][1]["perplexity"] < report["perplexity"][0]["perplexity"]  # it repeats itself
    assert (report["tasks"]["limit"], report["tasks"]["scores"][0]["samples"]) == (3, 3)


def test_default_length_is_the_models_limit(tmp_path: Path) -> None:
    short = tmp_path / "short"
    shutil.copytree(ASSET, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 96}))
    (entry,) = measured(short, *TEXT[:2], "--windows", "2")["perplexity"]
    assert entry["seqlen"] == 96
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    (entry,) = measured(short, *TEXT[:2], "--windows", "1")["perplexity"]
    assert entry["seqlen"] == 2048


@pytest.mark.parametrize(
    ("spec", "split", "count"),
    [
        ("wikitext2", "heldout", None),
        ("stdlib", "heldout", None),
        ("c4", "heldout", 256),
        ("owner/data", "heldout", 256),
        ("tests/data/heldout.jsonl.gz", "all", None),
    ],
)
def test_which_text_is_read(spec: str, split: str, count: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(text_module, "open_source", lambda spec, split, **options: seen.append((spec, split)))

    def evaluation_windows(source: Any, tokenizer: Any, *, windows: int | None, **options: Any) -> tuple[str, frozenset[str]]:
        seen.append(windows)
        return "windows", frozenset()

    monkeypatch.setattr(text_module, "evaluation_windows", evaluation_windows)
    text_module.windows_to_measure(spec, tokenizer=None, windows=None, seqlen=512)  # type: ignore[arg-type]
    text_module.windows_to_measure(spec, tokenizer=None, windows=7, seqlen=512)  # type: ignore[arg-type]
    assert seen == [(spec, split), count, (spec, split), 7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --perplexity SRC, --tasks A,B,C, or both"),
        (["--tasks", " , "], "--tasks needs at least one name"),
        (["--tasks", "boolq", "--dense", "demo", "--no-dense"], "--dense and --no-dense contradict each other"),
        (["--tasks", "boolq", "--seqlen", "128"], "--seqlen has no effect without --perplexity"),
        (["--tasks", "boolq", "--windows", "8"], "--windows has no effect without --perplexity"),
        (["--perplexity", "stdlib", "--limit", "8"], "--limit has no effect without --tasks"),
        (["--perplexity", "stdlib", "--windows", "0"], "--windows"),
        (["--perplexity", "stdlib", "--windows", "-3"], "--windows"),
        (["--perplexity", "stdlib", "--seqlen", "1"], "--seqlen"),
        (["--perplexity", "stdlib", "--batch-size", "0"], "--batch-size"),
        (["--tasks", "boolq", "--limit", "0"], "--limit"),
        (["--tasks", "boolq", "--dtype", "int8"], "--dtype"),
        (["--tasks", "boolq", "--device", "tpu"], "--device"),
    ],
)
def test_wrong_usage_is_exit_2(options: list[str], message: str) -> None:
    result = run("demo", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_seqlen_beyond_the_limit_before_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_weights(monkeypatch)
    short = tmp_path / "short"
    shutil.copytree(ASSET, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 96}))
    for options in ((short,), ("demo", "--dense", short)):
        message = failed(*options, *TEXT)
        assert f"expected --seqlen of at most 96, the limit of {short}, got 512" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["/no/such/model", *TEXT], "expected a model folder"),
        (["demo", *TEXT, "--dense", "/no/such/model"], "expected a model folder"),
        (["demo", "--perplexity", "no/such.jsonl"], "no/such.jsonl"),
        (["demo", "--perplexity", "tests/conftest.py", "--seqlen", "64", "--windows", "1000"], "expected 1000 windows of 64 tokens"),
        (["demo", "--tasks", "no/such.yaml"], "no/such.yaml: expected a readable task file"),
    ],
)
def test_bad_input_is_one_line_before_the_weights(options: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    no_weights(monkeypatch)
    assert message in failed(*options)


def test_cuda_asked_for_and_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "expected a CUDA GPU for --device cuda, got none" in failed("demo", *TEXT, "--device", "cuda")


def test_two_tokenizers_cannot_share_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_weights(monkeypatch)
    other = tmp_path / "other"
    shutil.copytree(ASSET, other)
    text = (other / "tokenizer.json").read_text(encoding="utf-8")
    tokenizer = json.loads(text)
    first, second = list(tokenizer["model"]["vocab"])[-2:]
    vocab = tokenizer["model"]["vocab"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    assert "expected one tokenizer for demo and" in failed("demo", *TEXT, "--dense", other)


def test_help_and_import_need_no_torch() -> None:
    code = (
        "import sys; from proxsparse_triton.commands.eval import evaluate; evaluate.main(['--help'], standalone_mode=False);"
        "assert not {'torch', 'transformers', 'lm_eval', 'datasets', 'rich'} & set(sys.modules), 'heavy import'"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "--perplexity" in found.stdout
