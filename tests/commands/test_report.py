"""`pst report`: where the page goes, what is said, and errors of one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from run_folders import manifest, rows, write_comparison, write_run

from proxsparse_triton.cli import main
from proxsparse_triton.report import png


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(png, "installed", lambda: False)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


def test_the_page_is_written_into_the_first_run(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", manifest(), rows())
    second = write_comparison(tmp_path / "b", {"wanda": 15.0})
    result = run(first, second)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{first / 'report.html'}: written\n"
    assert result.stderr.startswith("No PNG pictures: matplotlib cannot be imported.")
    assert "demo pruned to 2:4: 2 runs" in (first / "report.html").read_text(encoding="utf-8")
    assert not (second / "report.html").exists()
    assert run(first).exit_code == 0  # replaced
    assert "demo pruned to 2:4 with proxsparse" in (first / "report.html").read_text(encoding="utf-8")


def test_output_json_and_notes(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", manifest(), rows())
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"st', encoding="utf-8")
    result = run(folder, "-o", tmp_path / "pages" / "one.html", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["page"] == str(tmp_path / "pages" / "one.html")
    assert report["pictures"] == []
    assert report["notes"][0] == "proxsparse: The last line of metrics.jsonl is half-written and was ignored."
    assert report["notes"][0] in result.stderr
    assert not (folder / "report.html").exists()


def test_pictures_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.undo()
    folder = write_run(tmp_path / "a", manifest(), rows())
    result = run(folder)
    assert result.stdout == f"{folder / 'report.html'}: written, 2 PNG pictures in {folder / 'report'}\n"
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "which does not exist"),
        (lambda folder: folder.write_text("x"), "which is a file"),
        (lambda folder: folder.mkdir(), "which has neither manifest.json nor metrics.jsonl"),
    ],
    ids=["absent", "file", "empty"],
)
def test_no_run_is_one_line(tmp_path: Path, make: object, message: str) -> None:
    make(tmp_path / "it")  # type: ignore[operator]
    result = run(tmp_path / "it", "-o", tmp_path / "page.html")
    assert (result.exit_code, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 1
    assert f"pst: report: expected a run folder of pst, got {tmp_path / 'it'}, {message}." in result.stderr
    assert not (tmp_path / "page.html").exists()


def test_a_page_of_others_is_kept(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", manifest(), rows())
    (folder / "report.html").write_text("mine")
    result = run(folder)
    assert result.exit_code == 1
    assert "which is kept" in result.stderr
    assert (folder / "report.html").read_text() == "mine"


def test_a_default_page_in_a_folder_that_is_not_there_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name in ("absent", "file"):
        result = run(tmp_path / name)
        assert result.exit_code == 1
        assert "expected a run folder of pst" in result.stderr
    assert not (tmp_path / "absent").exists()


def test_usage_errors_exit_with_2() -> None:
    assert run().exit_code == 2
    assert run("x", "--nope").exit_code == 2


def test_no_torch_is_imported(tmp_path: Path) -> None:
    """The page of a finished run takes no seconds."""
    folder = write_run(tmp_path / "a", manifest(), rows())
    code = f"""
import sys
from proxsparse_triton.report import write_report
from pathlib import Path
write_report([Path({str(folder)!r})], Path({str(tmp_path / "p.html")!r}), pictures=False)
assert not {{"torch", "numpy", "matplotlib", "transformers"}} & set(sys.modules), sorted(sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
