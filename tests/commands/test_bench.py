"""`pst bench`: on a machine without a GPU it says what it cannot measure and measures the reference."""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from proxsparse_triton.benchmarks import learn, prox, step
from proxsparse_triton.cli import main
from proxsparse_triton.commands.bench import BENCHES

SMALL = ["--shape", "16x64", "--lambda", "0.1", "--rounds", "1"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "SHAPES", ((16, 256),))
    monkeypatch.setattr(step, "CHECKED_ROWS", 16)
    monkeypatch.setattr(learn, "matmul_rate", lambda place: 1e12)


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
        assert hasattr(getattr(module, settings), "run")


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
    assert [row["bench"] for row in report["rows"]] == ["prox"] * 2 + ["step"] * 12 + ["learn"]
    assert report["environment"]["commit"] == "abc1234"
    for row in report["rows"]:
        assert {key: row[key] for key in report["environment"]} == report["environment"]
    with path.open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [(row["bench"], row["what"]) for row in written] == [(row["bench"], row["what"]) for row in report["rows"]]
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


def test_options_of_learn() -> None:
    options = ["--model", "tiny", "--steps", 2, "--tokens", 32, "--lambda2", 0, "--weight-bits", 16, "--moments", "int8", "--checkpointing"]
    result = run("learn", *options, "--json")
    assert result.exit_code == 0, result.output
    ours, plain = json.loads(result.stdout)["rows"]
    assert (ours["tokens"], ours["lambda2"], ours["weight_bits"], ours["moments"], ours["checkpointing"]) == (32, 0, 16, "int8", "on")
    assert plain["checkpointing"] == "on"
    assert "tiny: 16-bit weights, int8 moments, lambda2 0, checkpointing on, predicted peak" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prox", "--model", "tiny"], "pst: bench prox: expected its own options, got --model. Leave it out."),
        (["prox", "--lambda2", "1"], "bench prox: expected its own options, got --lambda2."),
        (["step", "--tokens", "8"], "bench step: expected its own options, got --tokens."),
        (["learn", "--shape", "8x8"], "bench learn: expected its own options, got --shape."),
        (["learn", "--weight-bits", "16", "--lambda", "1"], "bench learn: expected its own options, got --lambda."),
        (["prox", "--lambda", "-1"], "bench prox: expected a finite --lambda > 0, got -1.0."),
        (["step", "--shape", "8x6"], "bench step: expected --shape OUTxIN with IN divisible by 4, got 8x6."),
        (["learn", "--model", "gpt"], "got 'gpt'"),
        (["learn", "--steps", "0"], "bench learn: expected --steps of at least 2, got 0."),
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


@pytest.mark.parametrize("arguments", [["nothing"], ["prox", "--shape", "8"], ["prox", "--shape", "8xx8"], ["prox", "--dtype", "float16"]])
def test_usage_errors_exit_with_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    if "--shape" in arguments:
        assert "expected OUTxIN such as 4096x11008" in result.stderr
