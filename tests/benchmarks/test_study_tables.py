"""The study's tables: what a cell says, and that the pages say what the committed figures do."""

from __future__ import annotations

import csv
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "bench" / "results" / "nvidia-h200-study.csv"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    """bench/ is a folder of scripts, not a package."""
    spec = importlib.util.spec_from_file_location("study_tables", ROOT / "bench" / "study_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(path: Path, *rows: tuple[str, str, int, int, float, float]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "case", "samples", "seed", "perplexity", "dense"])
        writer.writerows(rows)
    return path


def test_the_guide_has_the_tables_of_the_committed_study(study: ModuleType) -> None:
    guide = (ROOT / "docs" / "recipe.md").read_text().splitlines()
    missing = [line for line in study.tables(study.read(STUDY)) if line not in guide]
    assert not missing


def test_the_readme_has_the_rounded_figures(study: ModuleType) -> None:
    """Its table of three models at 400 windows."""
    figures = study.read(STUDY)
    shown = {
        model: [float(cell.strip(" *")) for cell in re.search(rf"^\| {title}[^|]*\|(.*)\|$", text, re.MULTILINE)[1].split("|")]  # type: ignore[index]
        for text in [(ROOT / "README.md").read_text()]
        for model, title in (("pylm-28m", "a 27.8 M"), ("pylm-2m", "a 2.4 M"), ("starcoder2-14m", "a 13.7 M"))
    }
    for model, cells in shown.items():
        cases = ["dense", "magnitude", "wanda", "sparsegpt", "paper", "auto", "auto, repair: both"]
        means = [sum(values) / len(values) for values in (figures[model, case, 400] for case in cases)]
        assert cells == pytest.approx(means, rel=6e-3), model  # 24.65 may be rounded to 24.6


def test_every_case_of_the_study_has_three_seeds(study: ModuleType) -> None:
    figures = study.read(STUDY)
    alone = {place for place, values in figures.items() if len(values) != 3 and not place[1].startswith("dense")}
    assert alone == {("starcoder2-14m", "magnitude", 400)}  # which is the same for every seed
    for model in ("pylm-28m", "pylm-2m"):
        for windows in (100, 400, 1600):
            assert all((model, case, windows) in figures for case in {**study.METHODS, **study.PARTS})


def test_cells(study: ModuleType) -> None:
    assert study.cell([4.0, 4.5, 5.0]) == "4.500 +- 0.500"
    assert study.cell([20.0, 24.0]) == "22.00 +- 2.83"
    assert study.cell([8.5834, 8.5834, 8.5834]) == "8.583"
    assert study.cell([7.0]) == "7.000"
    assert study.cell(None) == ""


def test_windows_of_another_length_have_a_dense_figure_of_their_own(study: ModuleType, tmp_path: Path) -> None:
    figures = study.read(
        rows(
            tmp_path / "s.csv",
            ("pylm-28m", "auto", 100, 0, 4.0, 3.0),
            ("pylm-28m", "auto", 100, 1, 4.2, 3.0),
            ("pylm-28m", "auto, windows half as long", 100, 0, 4.6, 3.5),
        )
    )
    assert figures["pylm-28m", "auto", 100] == [4.0, 4.2]
    assert (figures["pylm-28m", "dense", 100], figures["pylm-28m", "dense, half", 100]) == ([3.0], [3.5])
    lines = study.tables(figures)
    assert lines[0] == "| perplexity of | 27.8 M, 100 |"  # no column for what was not run
    assert "| **`--recipe auto`**, the default | 4.100 +- 0.141 |" in lines
    assert "| dense, half as long | 3.500 |" in lines


def test_the_chart_has_every_seed_and_the_mean(study: ModuleType) -> None:
    figures = study.read(STUDY)
    drawn = study.chart(figures)
    assert [panel.label for panel in drawn.panels] == ["27.8 M parameters", "2.4 M parameters"]
    for panel in drawn.panels:
        dots, lines = panel.lines[::2], panel.lines[1::2]
        assert [line.label for line in lines] == list(study.DRAWN.values())
        assert all(len(line.points) == 9 for line in dots)
        for points, means in zip(dots, lines, strict=True):
            for windows, mean in means.points:
                assert mean == pytest.approx(sum(y for x, y in points.points if x == windows) / 3)


def test_the_command(study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = rows(tmp_path / "s.csv", *[("pylm-28m", "auto", n, 0, 4.0, 3.0) for n in (100, 400, 1600)])
    result = CliRunner().invoke(study.main, [str(source)])
    assert result.exit_code == 0
    assert "| **all of it** | 4.000 | 4.000 | 4.000 |" in result.stdout.splitlines()
    monkeypatch.setattr("proxsparse_triton.report.png.installed", lambda: False)
    refused = CliRunner().invoke(study.main, [str(source), "--chart", str(tmp_path / "out")])
    assert refused.exit_code == 2
    assert "expected matplotlib for --chart, got none" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_the_picture(study: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = CliRunner().invoke(study.main, [str(STUDY), "--chart", str(tmp_path)])
    assert result.exit_code == 0
    assert (tmp_path / "perplexity-over-windows.png").read_bytes()[:4] == b"\x89PNG"
