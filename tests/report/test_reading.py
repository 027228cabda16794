"""Folders as records: what is read, what is missing, what is broken, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from run_folders import DENSE, NAMES, manifest, rows, write_comparison, write_run

from proxsparse_triton.errors import ModelError
from proxsparse_triton.report.reading import read_runs
from proxsparse_triton.report.steps import read_steps


def test_a_finished_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", manifest(command=["pst", "prune", "a b"]), rows())
    (folder / "model.safetensors").write_bytes(b"x" * 70)
    (folder / "masks.safetensors").write_bytes(b"x" * 5)
    (run,) = read_runs([folder])
    assert (run.method, run.model, run.label, run.group) == ("proxsparse", "demo", "proxsparse", "run")
    assert (run.dense, run.perplexity, run.seconds, run.peak_memory) == (DENSE, 12.25, 83.25, 1_636_264_448)
    assert (run.samples, run.layers, run.command) == (16, len(NAMES), "pst prune 'a b'")
    assert (run.weights_bytes, run.masks_bytes) == (70, 5)
    assert run.steps.loss == [(1, 2.75), (2, 2.5), (3, 2.25), (4, 2.0)]
    assert run.steps.lr[-1] == (4, 1e-3)
    assert run.steps.layers == rows()[-1]["layers"]
    assert run.notes == ()


def test_optional_keys_of_steps(tmp_path: Path) -> None:
    given = rows()
    given[1] |= {"mask_changes": {"a": 0.5, "b": 0.25}, "warnings": ["slow"]}
    given[3] |= {"mask_changes": {"a": 0.25, "b": 0.0}, "warnings": ["slow", "late"]}
    steps, problems = read_steps(write_run(tmp_path, None, given) / "metrics.jsonl")
    assert problems == []
    assert steps.changes == {"a": 0.75, "b": 0.25}
    assert steps.changed == [(2, 0.375), (4, 0.125)]
    assert steps.warnings == {"slow": [2, 4], "late": [4]}


@pytest.mark.parametrize("end", ['{"step": 5, "lo', '{"step": 5, "lo\n', "[1]", b"\xff\xfe"])
def test_a_half_written_last_line(tmp_path: Path, end: str | bytes) -> None:
    path = write_run(tmp_path, None, rows()) / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + (end if isinstance(end, bytes) else end.encode()))
    steps, problems = read_steps(path)
    assert steps.rows == 4
    assert problems == ["The last line of metrics.jsonl is half-written and was ignored."]


def test_broken_lines_inside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(row) for row in rows()]
    path.write_text("\n".join([lines[0], "?", "", lines[1], "null", lines[2]]))
    steps, problems = read_steps(path)
    assert [step for step, _ in steps.loss] == [1, 2, 3]
    assert problems == ["2 lines of metrics.jsonl are no JSON objects and were ignored: 2, 5."]


def test_values_that_are_no_numbers_leave_gaps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": NaN, "share_24": 0.5}\n{"loss": "x", "layers": 3, "lr": true, "warnings": "no list"}\n{"loss": 2}\n'
    )
    steps, _ = read_steps(path)
    assert (steps.rows, steps.loss, steps.share, steps.lr, steps.layers, steps.warnings) == (3, [(3, 2.0)], [(1, 0.5)], [], {}, {})


def test_a_run_without_metrics(tmp_path: Path) -> None:
    (write_run(tmp_path, manifest()) / "metrics.jsonl").unlink()
    (run,) = read_runs([tmp_path])
    assert run.steps.rows == 0
    assert run.notes == ()


def test_an_unfinished_run(tmp_path: Path) -> None:
    (run,) = read_runs([write_run(tmp_path / "run.partial", None, rows())])
    assert (run.method, run.dense, run.layers, run.command) == ("unfinished run", None, None, None)
    assert run.steps.rows == 4
    assert "did not finish" in run.notes[0]


def test_a_comparison(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "all", {"magnitude": 20.0, "wanda": 15.0, "proxsparse": 12.0})
    runs = read_runs([folder])
    assert [(run.label, run.perplexity, run.magnitude_agreement, run.samples) for run in runs] == [
        ("magnitude", 20.0, 1.0, None),  # reads no text, whatever the comparison's manifest says
        ("wanda", 15.0, 0.625, 16),
        ("proxsparse", 12.0, 0.625, 16),
    ]
    assert [run.steps.rows for run in runs] == [0, 0, 4]


def test_a_comparison_whose_folders_are_gone(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "all", {"wanda": 15.0, "proxsparse": 12.0})
    shutil.rmtree(folder / "wanda")
    wanda, other = read_runs([folder])
    assert (wanda.method, wanda.dense, wanda.perplexity, wanda.seconds, wanda.magnitude_agreement) == ("wanda", DENSE, 15.0, 2.5, 0.625)
    assert wanda.notes == ("The folder wanda is missing; these are the figures of the comparison's manifest.json.",)
    assert other.notes == ()


def test_a_comparison_names_no_folder_outside(tmp_path: Path) -> None:
    write_run(tmp_path / "secret", manifest("wanda", 1.0))
    entry = {"method": "wanda", "folder": "../secret", "perplexity": 15.0}
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "manifest.json").write_text(json.dumps({"tool": "proxsparse-triton", "comparison": [entry, "no entry"]}))
    (run,) = read_runs([tmp_path / "all"])
    assert run.perplexity == 15.0


def test_a_comparison_that_is_being_written_has_its_name_to_be(tmp_path: Path) -> None:
    write_comparison(tmp_path / "all.partial", {"wanda": 15.0})
    write_comparison(tmp_path / "other", {"wanda": 14.0})
    assert [run.label for run in read_runs([tmp_path / "all.partial", tmp_path / "other"])] == ["wanda (all)", "wanda (other)"]


def test_labels_are_unique_and_short(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, manifest(samples=samples)) for name, samples in (("a/x", 16), ("b/x", 16), ("c", 16), ("d", 64))]
    labels = [run.label for run in read_runs([*folders, write_run(tmp_path / "e", manifest("wanda"))])]
    assert labels == [
        f"proxsparse ({(tmp_path / 'a/x').resolve()})",
        f"proxsparse ({(tmp_path / 'b/x').resolve()})",
        "proxsparse (c)",
        "proxsparse, 64 windows",
        "wanda",
    ]


def test_a_folder_named_twice_is_read_once(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "all", {"wanda": 15.0, "proxsparse": 12.0})
    assert len(read_runs([folder, tmp_path / "all" / ".." / "all", folder / "wanda"])) == 2


def broken(folder: Path, kind: str) -> Path:
    if kind == "file":
        folder.write_text("x")
    elif kind not in ("absent", "file"):
        folder.mkdir()
    contents: dict[str, Any] = {
        "json": "{",
        "list": "[]",
        "tool": json.dumps({"tool": "other"}),
        "other": json.dumps({"tool": "proxsparse-triton", "x": 1}),
        "export": json.dumps({**manifest(), "export": {"format": "dense", "source": "runs/a"}}),
    }
    if kind in contents:
        (folder / "manifest.json").write_text(contents[kind])
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("absent", "which does not exist. Name the folder that -o of"),
        ("file", "which is a file."),
        ("empty", "which has neither manifest.json nor metrics.jsonl."),
        ("json", "whose manifest.json cannot be read (Expecting"),
        ("list", "whose manifest.json has the tool None, not 'proxsparse-triton'."),
        ("tool", "whose manifest.json has the tool 'other', not 'proxsparse-triton'."),
        ("other", "has neither a method nor a comparison."),
        ("export", "which is an export of runs/a. Name the run itself."),
    ],
)
def test_no_run_folder(tmp_path: Path, kind: str, message: str) -> None:
    folder = broken(tmp_path / "it", kind)
    with pytest.raises(ModelError, match="report: expected a run folder of pst, got ") as caught:
        read_runs([folder])
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)


def test_no_folder_at_all() -> None:
    with pytest.raises(ModelError, match="report: expected at least one run folder, got none"):
        read_runs([])


def test_a_manifest_with_other_types_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    content = manifest(model="demo", perplexity=[1], config=3, seconds="1", parameters=5, method=None, command=7, calibration="text")
    (run,) = read_runs([write_run(tmp_path, content)])
    assert (run.method, run.model, run.perplexity, run.seconds, run.layers, run.command, run.samples) == (
        *("unfinished run", "unknown model"),
        *(None,) * 5,
    )


def test_a_repaired_run_is_called_so(tmp_path: Path) -> None:
    method = {"name": "magnitude", "settings": {}, "repair": {"kind": "least-squares", "layers": 9}}
    folders = [write_run(tmp_path / "a", manifest("magnitude")), write_run(tmp_path / "b", manifest("magnitude", method=method))]
    plain, repaired = read_runs(folders)
    assert (plain.name, plain.repair, plain.samples) == ("magnitude", None, None)
    assert (repaired.name, repaired.repair, repaired.samples) == ("magnitude + repair", "least-squares", 16)  # it reads text
    assert [plain.label, repaired.label] == ["magnitude", "magnitude + repair"]
