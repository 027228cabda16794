"""`pst bench`: on a machine without a GPU it says what it cannot measure and measures the reference."""

from __future__ import annotations

import csv
import importlib
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from proxsparse_triton.benchmarks import learn, linear, plot, prox, step
from proxsparse_triton.cli import main
from proxsparse_triton.commands.bench import BENCHES, QUICK, SUMMARIES, TITLES

SMALL = ["--shape", "16x64", "--lambda", "0.1", "--rounds", "1"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "SHAPES", ((16, 256),))
    monkeypatch.setattr(step, "CHECKED_ROWS", 16)
    monkeypatch.setattr(learn, "matmul_rate", lambda place: 1e12)
    monkeypatch.setattr(linear, "CPU_TOKENS", (1, 64))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments), "--device", "cpu"])


def failed(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()[-1:]
    return line


def test_every_bench_has_its_settings() -> None:
    for name, settings in BENCHES.items():
        module = importlib.import_module(f"proxsparse_triton.benchmarks.{name}")
        kind = getattr(module, settings)
        assert hasattr(kind, "run")
        kind(**QUICK[name])
        assert hasattr(module, "summarise") == (name in SUMMARIES)
    assert set(TITLES) == set(BENCHES) >= set(plot.PLOTTED)


def test_table_and_what_cannot_be_measured() -> None:
    result = run("prox", *SMALL, "--dtype", "float32")
    assert result.exit_code == 0, result.output
    lines = [line.strip() for line in result.stdout.splitlines() if line.strip()]
    assert lines[0] == "prox_24: one tensor in, one out"
    assert lines[1].split()[:3] == ["what", "dtype", "shape"]
    assert any(line.startswith("prox_24 (reference)") and "16x64" in line for line in lines)
    assert "of copy" not in result.stdout
    assert lines[-1].startswith("GPU none (")
    (note,) = (line for line in result.stderr.splitlines() if line.startswith("No GPU"))
    assert note == (
        "No GPU: the plain-torch reference is measured on the CPU. "
        "Not measured: the prox kernel and its share of the copy bandwidth, the compiled rival, scratch memory."
    )


def test_all_by_default_as_json_and_csv(tmp_path: Path) -> None:
    path = tmp_path / "cpu.csv"
    options = ["--dtype", "bfloat16", "--steps", "2", "--no-rival", "--commit", "abc1234", "--json", "-o", path]
    result = run(*SMALL, *options)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    counts = {"prox": 2, "masked": 2, "step": 12, "learn": 1, "linear": 9, "decode": 4}
    assert [row["bench"] for row in report["rows"]] == [name for name, count in counts.items() for _ in range(count)]
    assert [row["shape"] for row in report["summaries"]["linear"]] == ["16x64"]
    assert report["environment"]["commit"] == "abc1234"
    for row in report["rows"]:
        assert {key: row[key] for key in report["environment"]} == report["environment"]
    with path.open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [(row["bench"], row["what"]) for row in written] == [(row["bench"], row.get("what", "")) for row in report["rows"]]
    assert {row["commit"] for row in written} == {"abc1234"}
    assert {row["torch"] for row in written} == {report["environment"]["torch"]}


def test_rows_before_a_failure_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cpu.csv"
    original = prox._measured
    cases = []

    def fails_later(case: prox.Case, *rest: object) -> list[dict[str, object]]:
        cases.append(case)
        if len(cases) > 1:
            raise prox.BackendError("bench prox: expected a right answer, got a wrong one. Report it.")
        return original(case, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(prox, "_measured", fails_later)
    assert "got a wrong one" in failed("prox", *SMALL, "-o", path)
    with path.open(newline="") as file:
        assert {row["dtype"] for row in csv.DictReader(file)} == {"bfloat16"}


def test_quick_is_small() -> None:
    result = run("prox", "--quick", "--dtype", "float32", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert {row["shape"] for row in rows} == {"256x512"}
    assert {row["samples"] for row in rows} == {3}


def test_linear_has_a_second_table() -> None:
    result = run("linear", "--shape", "16x64", "--tokens", 1, "--tokens", 5, "--rounds", 2, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert {row["tokens"] for row in report["rows"]} == {1, 5}
    assert {row["samples"] for row in report["rows"] if "samples" in row} == {2}
    (summary,) = report["summaries"]["linear"]
    assert (summary["shape"], summary["mode"], summary["library_from"]) == ("16x64", "eager", None)
    assert "Library: none: not a CUDA GPU" in result.stderr
    text = run("linear", "--quick").stdout
    assert "Linear layers on 2:4 weights against dense ones, bf16" in text
    assert "none: not a CUDA GPU" in text
    assert text.index("Where they break even with dense") > text.index("GPU none (")


def test_options_of_decode() -> None:
    options = ["--model", "tiny", "--batch", 1, "--batch", 3, "--prompt", 5, "--new-tokens", 4, "--no-compile", "--rounds", 1]
    result = run("decode", *options, "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [(row["variant"], row["batch"], row["prompt"], row["new_tokens"], row["samples"]) for row in rows] == [
        (variant, batch, 5, 4, 1) for variant in ("dense", "sparse") for batch in (1, 3)
    ]
    assert "summaries" not in json.loads(result.stdout)


def test_a_plot_of_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(plot, "check_plot", lambda path: None)
    monkeypatch.setattr(plot, "plot", lambda rows, path: drawn.append((len(rows), path)))
    path = tmp_path / "linear.png"
    result = run("linear", "--shape", "16x64", "--tokens", 1, "--rounds", 1, "--plot", path)
    assert result.exit_code == 0, result.output
    assert drawn == [(4, path)]


def test_options_of_learn() -> None:
    options = ["--model", "tiny", "--steps", 2, "--tokens", 32, "--lambda2", 0, "--weight-bits", 16, "--moments", "int8", "--checkpointing"]
    result = run("learn", *options, "--json")
    assert result.exit_code == 0, result.output
    ours, plain = json.loads(result.stdout)["rows"]
    assert (ours["tokens"], ours["lambda2"], ours["weight_bits"], ours["moments"], ours["checkpointing"]) == (32, 0, 16, "int8", "on")
    assert plain["checkpointing"] == "on"
    assert "tiny: recipe paper, loss ce, 16-bit weights, int8 moments, lambda2 0, checkpointing on, predicted peak" in result.stderr


@pytest.mark.parametrize(("options", "recipe", "loss"), [(["--recipe", "auto"], "auto", "kl"), (["--loss", "kl"], "paper", "kl")])
def test_recipe_of_learn(options: list[str], recipe: str, loss: str) -> None:
    result = run("learn", "--model", "tiny", "--steps", 2, "--tokens", 16, "--no-rival", *options, "--json")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["rows"]
    assert (row["recipe"], row["loss"]) == (recipe, loss)
    assert f"tiny: recipe {recipe}, loss {loss}, " in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prox", "--model", "tiny"], "pst: bench prox: expected its own options, got --model. Leave it out."),
        (["prox", "--lambda2", "1"], "bench prox: expected its own options, got --lambda2."),
        (["step", "--tokens", "8"], "bench step: expected its own options, got --tokens."),
        (["prox", "--recipe", "auto"], "bench prox: expected its own options, got --recipe. Leave it out."),
        (["step", "--loss", "kl"], "bench step: expected its own options, got --loss."),
        (["learn", "--shape", "8x8"], "bench learn: expected its own options, got --shape."),
        (["learn", "--weight-bits", "16", "--lambda", "1"], "bench learn: expected its own options, got --lambda."),
        (["prox", "--lambda", "-1"], "bench prox: expected a finite --lambda > 0, got -1.0."),
        (["step", "--shape", "8x6"], "bench step: expected --shape OUTxIN with IN divisible by 4, got 8x6."),
        (["learn", "--model", "gpt"], "got 'gpt'"),
        (["learn", "--steps", "0"], "bench learn: expected --steps of at least 2, got 0."),
        (["learn", "--tokens", "8", "--tokens", "9"], "bench learn: expected --tokens once, got 8, 9. Choose one."),
        (["learn", "--save"], "bench learn: expected its own options, got --save."),
        (["linear", "--tokens", "0"], "bench linear: expected --tokens of at least 1, got 0. Choose another value."),
        (["linear", "--shape", "8x6"], "bench linear: expected --shape OUTxIN with IN divisible by 4, got 8x6. Choose another."),
        (["linear", "--model", "gpt"], "bench linear: expected --model of llama-2-7b,"),
        (["linear", "--save", "--quick"], "bench linear: expected a CUDA GPU for --save, got none."),
        (["linear", "--batch", "1"], "bench linear: expected its own options, got --batch."),
        (["decode", "--batch", "0"], "bench decode: expected --batch of at least 1, got 0."),
        (["decode", "--model", "no/such/folder"], "tiny, or a folder, got 'no/such/folder'. Choose one of these."),
        (["decode", "--shape", "8x8"], "bench decode: expected its own options, got --shape."),
        (["prox", "--plot", "a.png"], "bench prox: expected --plot with linear or decode only. Leave it out."),
        (["decode", "--plot", "a.txt"], "bench: expected --plot with a name in .png, .svg, .pdf, got a.txt. Choose another name."),
        (["--rounds", "0"], "bench: expected --rounds of at least 1, got 0."),
    ],
)
def test_bad_settings(arguments: list[str], message: str) -> None:
    assert message in failed(*arguments)


def test_another_file_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    monkeypatch.setattr(prox.ProxBench, "run", lambda *_: pytest.fail("measured"))
    assert f"bench: expected a CSV file of an earlier bench, got {path}." in failed("prox", "-o", path)
    assert path.read_text() == "mine"


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_no_gpu() -> None:
    result = CliRunner().invoke(main, ["bench", "prox", "--device", "cuda"])
    assert result.exit_code == 1
    assert "bench: expected a CUDA GPU for --device cuda, got none." in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [["nothing"], ["prox", "--shape", "8"], ["prox", "--shape", "8xx8"], ["prox", "--dtype", "float16"], ["learn", "--recipe", "own"]],
)
def test_usage_errors_exit_with_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    if "--shape" in arguments:
        assert "expected OUTxIN such as 4096x11008" in result.stderr
