"""Numbers, texts and sizes that no run has: a page without that curve, never a traceback, and the other runs are shown."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from run_folders import manifest, rows, write_comparison, write_run

from proxsparse_triton.errors import ModelError, OutputError
from proxsparse_triton.report import write_report
from proxsparse_triton.report.charts import Bar, Bars, Line, Panel, bar_range, nice_ticks, panel_ticks
from proxsparse_triton.report.reading import read_runs
from proxsparse_triton.report.steps import MAX_LINE, drawable, number, printable, read_steps

NUMBERS = [-2.0, 0, 5e-324, 1e308, -1e308, 1e30, 10**400, 1e100, 1e-100, True, "1", None]


def page_of(folder: Path, output: Path) -> str:
    text = write_report([folder], output, pictures=False).page.read_text(encoding="utf-8")
    for drawing in text.split("<svg")[1:]:
        assert "nan" not in drawing.partition("<title")[0] + drawing.partition("points=")[2].partition("/>")[0]
    return text


@pytest.mark.parametrize("value", NUMBERS, ids=str)
@pytest.mark.parametrize("key", ["step", "loss", "lr", "share_24"])
def test_numbers_of_steps(tmp_path: Path, key: str, value: Any) -> None:
    folder = write_run(tmp_path / "run", manifest(), [{**row, key: value} for row in rows(30)])
    assert "Settings" in page_of(folder, tmp_path / "page.html")


@pytest.mark.parametrize("value", NUMBERS, ids=str)
@pytest.mark.parametrize("key", ["perplexity", "seconds", "samples", "share_24", "settings", "restore"])
def test_numbers_of_manifests(tmp_path: Path, key: str, value: Any) -> None:
    for index in (1, 2):
        content = manifest(samples=16 * index)
        if key == "perplexity":
            content["perplexity"] = {"dense": value, "pruned": value}
        elif key == "seconds":
            content |= {"seconds": value, "peak_memory_bytes": value}
        elif key == "samples":
            content["config"]["samples"] = value if index == 1 else 8
        elif key == "share_24":
            content["method"]["share_24"] = value
        elif key == "settings":
            content["method"]["settings"] = {"lambda1": [[value] * 3], "lr": value}
        else:
            content["method"]["restore"] = [{"layer": "a", "perplexity": value}]
        write_run(tmp_path / str(index), content, rows())
    text = write_report([tmp_path / "1", tmp_path / "2"], tmp_path / "page.html", pictures=False).page.read_text(encoding="utf-8")
    assert text.count("<section") == 2


def test_pictures_of_hostile_texts_and_numbers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    name = "model.layers.0.$\\frac$.\ud800\0.weight"
    steps = [{**row, "lr": -2.0, "loss": 1e100, "layers": {name: 0.5, "a.1.b.weight": 1e100}} for row in rows(30)]
    folder = write_run(tmp_path / "run", manifest("$x^$ \ud800"), steps)
    assert write_report([folder], tmp_path / "page.html").pictures


def test_numbers_and_texts() -> None:
    assert number(10**400) is None
    assert number(1e308) == 1e308
    assert drawable(1e308) is None
    assert drawable(5e-324) == 0
    assert printable({"a\0": ["\ud800", "ü\n", 1]}) == {"a\ufffd": ["?", "ü\n", 1]}


def test_axes() -> None:
    assert panel_ticks(Panel("", (Line("", ((0, -2.0),)),), low=0.0))[0] <= -2
    assert bar_range(Bars("", "", "", "", (Bar("", 0.0, ""),))) == (0.0, 1.0)
    assert nice_ticks(1e99, 1e100)[0] <= 1e99
    assert nice_ticks(0, 5e-324) == [-1, -0.5, 0, 0.5, 1]


def test_damage_does_not_hide_the_others(tmp_path: Path) -> None:
    good = write_run(tmp_path / "good", manifest(), rows())
    bad = write_run(tmp_path / "bad", manifest())
    (bad / "manifest.json").write_text("{")
    (bad / "model.safetensors").symlink_to(tmp_path / "gone")
    report = write_report([bad, good], tmp_path / "page.html", pictures=False)
    assert [note for note in report.notes if note.startswith("Left out: ") and str(bad) in note]
    with pytest.raises(ModelError, match="cannot be read"):
        write_report([bad], tmp_path / "page.html", pictures=False)
    with pytest.raises(ModelError, match="does not exist"):
        write_report([good, tmp_path / "typo"], tmp_path / "page.html", pictures=False)


def test_a_damaged_run_of_a_comparison(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "all", {"magnitude": 20.0, "wanda": 15.0})
    (folder / "wanda" / "manifest.json").write_text("[")
    first, second = read_runs([folder])
    assert first.notes == ()
    assert "cannot be read" in second.notes[0]
    assert second.perplexity == 15


@pytest.mark.parametrize("sub", ["..", ".", "", "../other", "/etc", "magnitude/..", "a\0b", "x" * 300, "link"])
def test_only_direct_sub_folders(tmp_path: Path, sub: str) -> None:
    other = write_run(tmp_path / "other", manifest("secret"), rows())
    write_run(tmp_path, manifest("secret"))
    folder = write_comparison(tmp_path / "all", {"magnitude": 20.0})
    (folder / "link").symlink_to(other)
    content = {"tool": "proxsparse-triton", "comparison": [{"method": "wanda", "folder": sub, "perplexity": 3.0}]}
    (folder / "manifest.json").write_text(json.dumps(content))
    (run,) = read_runs([folder])
    assert (run.method, run.perplexity, run.steps.rows) == ("wanda", 3.0, 0)
    assert "is missing" in run.notes[0]


def test_pipes_and_long_lines(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", manifest(), rows())
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b"[" * (2 * MAX_LINE + 5) + b"\n" + json.dumps(rows()[-1]).encode() + b"\n")
    steps, problems = read_steps(folder / "metrics.jsonl")
    assert steps.rows == 5
    assert "1 lines of metrics.jsonl are no JSON objects and were ignored: 5." in problems[0]
    (folder / "metrics.jsonl").unlink()
    os.mkfifo(folder / "metrics.jsonl")
    assert read_steps(folder / "metrics.jsonl")[1] == ["metrics.jsonl is not read: it is a pipe (FIFO)."]
    os.mkfifo(tmp_path / "page.html")
    with pytest.raises(OutputError, match="got a pipe"):
        write_report([folder], tmp_path / "page.html")


def test_many_layers_and_many_runs_take_seconds(tmp_path: Path) -> None:
    start = time.monotonic()
    layers = {f"model.layers.{index}.mlp.{index}_proj.weight": 0.5 for index in range(20_000)}
    folder = write_run(tmp_path / "run", manifest(), [{**rows()[0], "layers": layers, "mask_changes": layers}])
    assert "20,000 layers are more than can be shown" in page_of(folder, tmp_path / "page.html")
    entries = [{"method": f"m{index}", "folder": f"m{index}", "perplexity": 2.0 + index} for index in range(10_000)]
    folder = tmp_path / "all"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"tool": "proxsparse-triton", "comparison": entries}))
    report = write_report([folder], tmp_path / "page.html", pictures=False)
    assert "Only the first 1,000 of 10,000 runs are shown." in report.notes
    assert time.monotonic() - start < 60
