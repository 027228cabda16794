"""Rows: the environment they carry, the table, the CSV that grows."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from proxsparse_triton.benchmarks import table
from proxsparse_triton.benchmarks.table import append_csv, cells, cusparselt_version, described, environment, git_commit, read_csv
from proxsparse_triton.errors import OutputError

CPU = torch.device("cpu")


def test_environment() -> None:
    facts = environment(CPU, "abc1234")
    assert facts["commit"] == "abc1234"
    assert all(facts[package] for package in ("torch", "triton", "transformers"))
    assert str(facts["gpu"]).startswith("none (")
    assert len(str(facts["date"])) == len("2026-01-31")
    assert facts["cusparselt"] == cusparselt_version()
    line = described(facts)
    assert all(str(facts[key]) in line for key in ("gpu", "torch", "triton", "cusparselt", "commit", "date"))


@pytest.mark.parametrize(("number", "text"), [(800, "0.8.0"), (801, "0.8.1"), (602, "0.6.2"), (1203, "1.2.3"), (None, "none")])
def test_cusparselt_version(number: int | None, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: number is not None)
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: number)
    assert cusparselt_version() == text


def test_commit_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert git_commit() == "unknown"


def test_csv_grows_and_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.csv"
    append_csv(path, [{"bench": "prox", "us": 12.3456789, "scratch_bytes": None}])
    append_csv(path, [{"bench": "step", "us": 1e-7, "to_adamw": 1.0}])
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"bench": "prox", "us": "12.3457", "scratch_bytes": "", "to_adamw": ""},
        {"bench": "step", "us": "1e-07", "scratch_bytes": "", "to_adamw": "1"},
    ]
    assert [p.name for p in path.parent.iterdir()] == ["results.csv"]


@pytest.mark.parametrize("content", [b"", b"name,value\na,1\n", b"\xff\xfe\x00", b"bench,us\nprox,1,2\n", b'bench,us\nprox,"1\n'])
def test_other_files_are_left_alone(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "notes.csv"
    path.write_bytes(content)
    with pytest.raises(OutputError, match=r"bench: expected a CSV file .* got .*notes.csv.* Choose another name with -o."):
        append_csv(path, [{"bench": "prox"}])
    assert path.read_bytes() == content


def test_no_file_yet_and_a_folder(tmp_path: Path) -> None:
    assert read_csv(tmp_path / "absent.csv") == []
    with pytest.raises(OutputError, match="bench: expected a CSV file"):
        read_csv(tmp_path)


def test_cells_for_people() -> None:
    rows: list[table.Row] = [
        {"bench": "prox", "what": "ours", "us": 42.04, "of_roof": 0.9123, "scratch_bytes": 0, "times_ours": 1.0, "gpu": "X", "note": None},
        {"bench": "prox", "what": "theirs", "us": 125_000.0, "of_roof": 3e-4, "scratch_bytes": 3.2e9, "times_ours": 2973.2},
    ]
    titles, texts = cells(rows)
    assert titles == ["what", "us", "of copy", "scratch", "time / ours"]
    assert texts == [["ours", "42.0", "91.2 %", "0", "1x"], ["theirs", "125,000.0", "0.0 %", "3.20 GB", "2,973x"]]


def test_a_column_that_some_rows_have_is_shown() -> None:
    titles, texts = cells([{"what": "a"}, {"what": "b", "note": "out of memory", "peak_bytes": 5e6}])
    assert titles == ["what", "note", "peak"]
    assert texts == [["a", "", ""], ["b", "out of memory", "5.0 MB"]]
