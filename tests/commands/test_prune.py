"""`pst prune`: result on stdout, progress on stderr, and every bad input as one line with exit code 1 and nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from proxsparse_triton.cli import main
from proxsparse_triton.errors import ConfigError
from proxsparse_triton.formats.owned import MARKER
from proxsparse_triton.methods import proxsparse
from proxsparse_triton.methods.magnitude import Magnitude

ROOT = Path(__file__).parents[2]
ASSET = ROOT / "proxsparse_triton" / "assets" / "pylm-2m"
SMALL = ["--samples", "4", "--seqlen", "64", "--eval-windows", "4"]
LEARN = ["--recipe", "paper", "--lambda1", "20", "--lr", "2e-3"]

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*arguments: object) -> Result:
    """The command as a user runs it, on the CPU unless told otherwise."""
    device = [] if "--device" in arguments else ["--device", "cpu"]
    return CliRunner().invoke(main, ["prune", *map(str, arguments), *device])


def failed(*arguments: object, output: Path, code: int = 1) -> str:
    """The message of a run that fails: the last line on stderr, nothing on stdout, nothing under the output's name."""
    before = sorted(output.parent.iterdir())
    result = run(*arguments, "-o", output)
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert [line for line in lines if line.startswith("pst: ")] == lines[-1:]
    assert "Traceback" not in result.stderr
    assert sorted(output.parent.iterdir()) == before
    return lines[-1]


def test_result_on_stdout_and_the_rest_on_stderr(text: str, tmp_path: Path) -> None:
    result = run("demo", "-o", tmp_path / "run", "--calibration", text, *SMALL, *LEARN)
    assert result.exit_code == 0, result.output
    assert "pruning 28 of 29 layers" in result.stderr
    assert "skipped lm_head [4096, 192]: output head" in result.stderr
    assert "proxsparse, recipe paper: 4 steps of 1 window (1 pass over 4)" in result.stderr
    assert "lambda1 20, lambda2 0, lr 0.002" in result.stderr
    assert "pruning" not in result.stdout
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert f"{manifest['perplexity']['pruned']:.3f}" in result.stdout
    assert f"{manifest['perplexity']['dense']:.3f}" in result.stdout
    assert CliRunner().invoke(main, ["verify", str(tmp_path / "run"), "--original", "demo"]).exit_code == 0


def test_json_for_machines(text: str, tmp_path: Path) -> None:
    result = run("demo", "-o", tmp_path / "run", "--calibration", text, *SMALL, "--method", "magnitude", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert report == {
        "method": "magnitude",
        "repair": None,
        "output": str(tmp_path / "run"),
        "perplexity": manifest["perplexity"],
        "evaluation": manifest["evaluation"],
        "seconds": manifest["seconds"],
        "peak_memory_bytes": manifest["peak_memory_bytes"],
        "layers": 28,
        "decoder": manifest["decoder"],
    }


def test_options_reach_the_run(text: str, tmp_path: Path) -> None:
    options = {
        "--lambda1": 20.0, "--lambda2": 0.25, "--frozen-eps": 0.5, "--lr": 0.001, "--batch-size": 2, "--epochs": 2,
        "--weight-bits": 32, "--moments": "int8", "--clip-mode": "loss", "--gpu-memory": 0.25,
        "--seed": 7, "--eval": text, "--text-field": "text", "--dtype": "bfloat16", "--include": "layers.0", "--skip": "mlp",
    }  # fmt: skip
    flat = [part for pair in options.items() for part in pair]
    result = run("demo", "-o", tmp_path / "run", "--calibration", text, *SMALL, *flat, "--checkpointing")
    assert result.exit_code == 0, result.output
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    settings = {
        "lambda1": 20.0, "lambda2": 0.25, "frozen_eps": 0.5, "lr": 0.001, "batch_size": 2, "epochs": 2,
        "weight_bits": 32, "moments": "int8", "clip_mode": "loss", "checkpointing": True,
    }  # fmt: skip
    assert manifest["config"]["gpu_memory"] == 0.25
    assert manifest["config"]["settings"] == settings
    assert manifest["method"]["settings"].items() >= settings.items()
    assert manifest["method"]["steps"] == 4
    found = {key: manifest["config"][key] for key in ("seed", "evaluation", "dtype", "include", "skip", "samples", "seqlen")}
    assert found == {
        "seed": 7, "evaluation": text, "dtype": "bfloat16", "include": ["layers.0"], "skip": ["mlp"], "samples": 4, "seqlen": 64,
    }  # fmt: skip
    assert len(manifest["parameters"]) == 4
    assert "-0.0" not in result.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["penalty"] > 0


def test_preset_gives_the_papers_settings(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given by hand wins over the preset."""
    seen: list[proxsparse.ProxSparse] = []

    def stop(self: proxsparse.ProxSparse, task: object) -> None:
        seen.append(self)
        raise ConfigError("stop here")

    monkeypatch.setattr(proxsparse.ProxSparse, "prune", stop)
    arguments = ["demo", "--calibration", text, *SMALL, "--preset", "llama-2-13b"]
    failed(*arguments, output=tmp_path / "run")
    failed(*arguments, "--lambda1", "0", output=tmp_path / "run")
    first, second = seen
    assert (first.lambda1, first.lr, first.lambda2, first.frozen_eps) == (0.5, 1e-4, 0.25, 0.5)
    assert (second.lambda1, second.lr) == (0.0, 1e-4)
    # the context of the preset, where none is given
    message = failed("demo", "--calibration", text, "--preset", "llama-2-7b", output=tmp_path / "run")
    assert "--seqlen of at most 512, the model's limit, got 4096" in message


def plan(*arguments: object, output: Path) -> Result:
    result = run("demo", "-o", output, "--plan", *arguments)
    assert result.exit_code == 0, result.output
    assert not output.exists()
    return result


def test_plan_prints_and_does_nothing(tmp_path: Path) -> None:
    """Every item above nothing, the decisions, and no verdict where there is nothing to hold it against."""
    out = plan("--lambda2", "1", output=tmp_path / "run").stdout
    for line in ("weights", "moments", "pretrained", "activations", "workspace", "peak", "time", "checkpointing"):
        assert line in out
    assert "residual" not in out  # fp32 weights have none
    assert "plan of demo: 800 steps" in out
    if not torch.cuda.is_available():
        assert "give its size with --gpu-memory GB" in out
        assert "not known for this device" in out
    assert list(tmp_path.iterdir()) == []


def test_plan_needs_no_output_and_no_weights(tmp_path: Path) -> None:
    folder = tmp_path / "config alone"
    folder.mkdir()
    shutil.copy(ASSET / "config.json", folder)
    result = run(folder, "--plan", "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["decoder"]["share"] == 1.0
    assert plan["items"] == json.loads(run("demo", "--plan", "--json").stdout)["items"]
    result = run("demo", "--method", "magnitude")
    assert (result.exit_code, "Missing option '-o'" in result.output) == (2, True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    assert "expected dense weights, got a quantised model (fp8)" in run(folder, "--plan").output


def test_plan_says_whether_it_fits_and_what_to_change(tmp_path: Path) -> None:
    assert "fits into 80.00 GB" in plan("--gpu-memory", "80", output=tmp_path / "run").stdout
    out = plan("--gpu-memory", "0.4", "--batch-size", "8", "--no-checkpointing", output=tmp_path / "run").stdout
    assert "does not fit into 400 MB; with --checkpointing it would, at " in out
    assert "does not fit into 1 MB, whatever the precision: lower --seqlen" in plan("--gpu-memory", "0.001", output=tmp_path / "run").stdout
    out = plan("--gpu-memory", "0.2", "--samples", "4000", "--repair", "least-squares", output=tmp_path / "run").stdout
    assert "fits into 200 MB" in out  # the hidden states of all windows, 1.6 GB, wait in host memory


def test_plan_for_machines(tmp_path: Path) -> None:
    report = json.loads(plan("--gpu-memory", "0.05", "--dtype", "bfloat16", "--json", output=tmp_path / "run").stdout)
    assert report["peak_bytes"] == sum(report["items"].values()) > 50e6
    assert (report["steps"], report["gpu_memory_bytes"], report["fits"], report["change"]) == (800, 50_000_000, False, [])
    assert report["settings"] == {"weight_bits": 24, "moments": "float32", "checkpointing": True}
    assert report["changed_peak_bytes"] is None


def test_plan_refuses_what_the_run_would(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert "finite lambda1 >= 0, got nan" in failed("demo", "--plan", "--lambda1", "nan", output=out)
    assert "plan: expected --method proxsparse, got wanda" in failed("demo", "--plan", "--method", "wanda", output=out)
    assert "--seqlen of at most 512" in failed("demo", "--plan", "--preset", "llama-2-7b", output=out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "0"], "--samples of at least 1, got 0"),
        (["--samples", "-3"], "--samples of at least 1, got -3"),
        (["--eval-windows", "0"], "--eval-windows of at least 1, got 0"),
        (["--seqlen", "1"], "--seqlen of at least 2, got 1"),
        (["--seqlen", "0", "--preset", "llama-2-7b"], "--seqlen of at least 2, got 0"),
        (["--seqlen", "513"], "--seqlen of at most 512, the model's limit, got 513"),
        (["--seed", "-1"], "--seed of at least 0, got -1"),
        (["--seed", str(2**63)], "seed below 2^63"),
        (["--samples", "100000"], "Lower --samples or --seqlen, or give more text"),
        (["--lambda1", "-0.1"], "lambda1 >= 0, got -0.1"),
        (["--lambda1", "nan"], "lambda1 >= 0, got nan"),
        (["--lambda1", "inf"], "lambda1 >= 0, got inf"),
        (["--lambda2", "-1"], "lambda2 >= 0, got -1.0"),
        (["--lambda2", "nan"], "lambda2 >= 0, got nan"),
        (["--frozen-eps", "0"], "frozen_eps > 0, got 0.0"),
        (["--lr", "0"], "lr > 0, got 0.0"),
        (["--lr", "-1e-4"], "lr > 0, got -0.0001"),
        (["--lr", "nan"], "lr > 0, got nan"),
        (["--batch-size", "0"], "batch_size >= 1, got 0"),
        (["--weight-bits", "8"], "weight_bits to be one of 16, 24, 32, got 8"),
        (["--weight-bits", "16"], "--weight-bits 16 with bf16 weights only, got torch.float32"),
        (["--gpu-memory", "0"], "--gpu-memory above 0, got 0.0"),
        (["--gpu-memory", "nan"], "--gpu-memory above 0, got nan"),
        (["--epochs", "0"], "epochs >= 1, got 0"),
        (["--method", "wnada"], "expected one of magnitude, proxsparse, sparsegpt, wanda, got 'wnada'"),
        (
            ["--method", "wanda", "--lambda1", "1"],
            "expected only its own settings, got --lambda1. Leave it out, or use --method proxsparse.",
        ),
        (["--method", "magnitude", "--mask-only"], "got --mask-only"),
        (["--dampening", "0.1"], "method proxsparse: expected only its own settings"),
        (["--method", "sparsegpt", "--dampening", "0"], "finite dampening > 0, got 0.0"),
        (["--method", "sparsegpt", "--dampening", "inf"], "finite dampening > 0, got inf"),
        (["--preset", "llama"], "preset: expected one of llama-2-7b"),
        (["--method", "wanda", "--preset", "llama-2-7b"], "--preset with --method proxsparse only, got --method wanda"),
        (["--include", "no_such_layer"], "got 'no_such_layer', which matches none of 29"),
        (["--skip", "("], "--skip: expected a regular expression, got '('"),
        (["--skip", "."], "expected at least one layer to prune"),
        (["--calibration", "absent.jsonl"], "'absent.jsonl': expected a source of text"),
        (["--eval", "absent.jsonl"], "'absent.jsonl': expected a source of text"),
        (["--calibration", ""], "'': expected a source of text"),
        (["--text-field", "body"], "body"),
        (["--text-field", "body", "--method", "magnitude"], "body"),
    ],
)
def test_bad_settings(arguments: list[str], message: str, text: str, tmp_path: Path) -> None:
    # later options win over the defaults given first
    assert message in failed("demo", "--calibration", text, *SMALL, *arguments, output=tmp_path / "run")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(text: str, tmp_path: Path) -> None:
    message = failed("demo", "--calibration", text, *SMALL, "--device", "cuda", output=tmp_path / "run")
    assert "expected a CUDA GPU for cuda, got 0 GPUs. Use --device cpu" in message


BAD_TEXTS: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.txt", b"", "expected text"),
    "blank": ("a.jsonl", b'{"text": "  "}\n{"text": ""}\n', "no document that is not blank"),
    "short": ("a.txt", b"def f(): pass", "Lower --samples or --seqlen"),
    "not UTF-8": ("a.txt", b"caf\xe9 " * 1000, "UTF-8"),
    "not JSON": ("a.jsonl", b'{"text": "good"}\n{"text": "good"}\n{"text": broken\n', "line 3"),
    "no text field": ("a.jsonl", b'{"text": "good"}\n{"body": "good"}\n', "line 2"),
    "another kind of file": ("a.docx", b"PK", "expected a file ending in"),
}


@pytest.mark.parametrize("kind", BAD_TEXTS)
def test_bad_text(kind: str, tmp_path: Path) -> None:
    name, content, message = BAD_TEXTS[kind]
    (tmp_path / name).write_bytes(content)
    found = failed("demo", "--calibration", tmp_path / name, *SMALL, output=tmp_path / "run")
    assert message in found
    assert name in found


def _copy(folder: Path) -> Path:
    return Path(shutil.copytree(ASSET, folder))


def _no_such_folder(folder: Path) -> str:
    return "expected"


def _empty(folder: Path) -> str:
    folder.mkdir()
    return "expected a model folder, got an empty one"


def _truncated(folder: Path) -> str:
    weights = _copy(folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return "model.safetensors"


def _corrupt(folder: Path) -> str:
    weights = _copy(folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:8] + b"not json" + weights.read_bytes()[16:])
    return "model.safetensors"


def _absent_shard(folder: Path) -> str:
    names = {"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}
    (_copy(folder) / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (folder / "model.safetensors").unlink()
    return "model-00001-of-00002.safetensors"


def _broken_config(folder: Path) -> str:
    (_copy(folder) / "config.json").write_text("{")
    return "config.json"


def _unsafe_pickle(folder: Path) -> str:
    (_copy(folder) / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(print))
    return "pytorch_model.bin"


def _other_shapes(folder: Path) -> str:
    config = json.loads((_copy(folder) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 516}))
    return "of another shape"


def _no_tokenizer(folder: Path) -> str:
    _copy(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    return "tokenizer"


def _no_linears(folder: Path) -> str:
    """GPT-2 stores its weights transposed, in Conv1D modules."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=4096, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSET / name, folder)
    return "Conv1D stores the weight transposed (GPT-2): not supported"


BAD_MODELS = (
    _no_such_folder, _empty, _truncated, _corrupt, _absent_shard, _broken_config, _unsafe_pickle, _other_shapes, _no_tokenizer, _no_linears,
)  # fmt: skip


@pytest.mark.parametrize("spoil", BAD_MODELS, ids=lambda spoil: spoil.__name__)
def test_bad_model(spoil: Callable[[Path], str], text: str, tmp_path: Path) -> None:
    message = spoil(tmp_path / "model")
    found = failed(tmp_path / "model", "--calibration", text, *SMALL, "--method", "magnitude", output=tmp_path / "run")
    assert message in found


def test_hub_id_without_network(text: str, tmp_path: Path) -> None:
    found = failed("someone/some-model", "--calibration", text, *SMALL, output=tmp_path / "run")
    assert "someone/some-model" in found


def test_an_output_that_holds_something_is_kept(text: str, tmp_path: Path) -> None:
    arguments = ["demo", "--calibration", text, *SMALL, "--method", "magnitude"]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    assert "a folder with other files, which is kept" in failed(*arguments, output=foreign)
    assert "--overwrite only replaces" in failed(*arguments, "--overwrite", output=foreign)
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]
    (tmp_path / "file").write_text("x")
    assert "got the file" in failed(*arguments, output=tmp_path / "file")


def test_overwrite_replaces_an_earlier_run_only_when_the_new_one_is_complete(text: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["demo", "--calibration", text, *SMALL]
    assert run(*arguments, "--method", "magnitude", "-o", out).exit_code == 0
    assert "an earlier run, which is kept" in failed(*arguments, "--method", "wanda", output=out)
    failed(*arguments, "--method", "wanda", "--overwrite", "--include", "nothing", output=out)
    assert json.loads((out / "manifest.json").read_text())["method"]["name"] == "magnitude"
    assert run(*arguments, "--method", "wanda", "--overwrite", "-o", out).exit_code == 0
    assert json.loads((out / "manifest.json").read_text())["method"]["name"] == "wanda"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission_to_write(text: str, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert "permission denied" in failed("demo", "--calibration", text, *SMALL, output=locked / "run")


def test_divergence_keeps_the_metrics(text: str, tmp_path: Path) -> None:
    result = run("demo", "-o", tmp_path / "run", "--calibration", text, *SMALL, "--recipe", "paper", "--lr", "1e30")
    assert result.exit_code == 1
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("pst: learning: expected finite losses and gradients, got loss ")
    assert "at step 3 of 4, first seen in model." in line
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"run.partial/metrics.jsonl", f"run.partial/{MARKER}"}
    assert len((tmp_path / "run.partial" / "metrics.jsonl").read_text().splitlines()) == 2


def test_out_of_memory(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(self: Magnitude, task: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSecond line")

    monkeypatch.setattr(Magnitude, "prune", exhausted)
    message = failed("demo", "--calibration", text, *SMALL, "--method", "magnitude", output=tmp_path / "run")
    assert "Lower --seqlen, --samples or --batch-size, or learn with --dtype bfloat16." in message


def test_keyboard_interrupt(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Magnitude, task: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Magnitude, "prune", interrupted)
    message = failed("demo", "--calibration", text, *SMALL, "--method", "magnitude", output=tmp_path / "run", code=130)
    assert message == "pst: interrupted; nothing half-written was left under the output's name"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_control_c_while_learning(text: str, tmp_path: Path) -> None:
    """A real process and a real signal, in the middle of the steps."""
    # The jobs of a shell may be started with SIGINT ignored.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from proxsparse_triton.cli import main; main()"
    arguments = ["prune", "demo", "-o", "run", "--calibration", text, *SMALL, "--epochs", "500", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "run.partial" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert err.strip().splitlines()[-1].startswith("pst: interrupted")
    assert "Traceback" not in err
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"run.partial/metrics.jsonl", f"run.partial/{MARKER}"}


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--debug", "prune", "demo", "-o", str(tmp_path / "run"), "--lambda1", "nan"])
    assert isinstance(result.exception, ConfigError)
    assert result.exit_code == 1


def test_usage_errors_exit_with_2(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    for arguments in (["demo"], ["-o", out], ["demo", "-o", out, "--nope"], ["demo", "-o", out, "--samples", "few"],
                      ["demo", "-o", out, "--windows", "whole"], ["demo", "-o", out, "--dtype", "int8"]):  # fmt: skip
        result = CliRunner().invoke(main, ["prune", *arguments])
        assert result.exit_code == 2, arguments
        assert "Usage:" in result.stderr
    assert list(tmp_path.iterdir()) == []
