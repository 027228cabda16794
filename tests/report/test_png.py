"""Pictures by matplotlib, where it is installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from proxsparse_triton.errors import OutputError
from proxsparse_triton.report import png
from proxsparse_triton.report.charts import Bar, Bars, Chart, Curves, HeatMap, Line, Panel
from proxsparse_triton.report.grid import grid

CHARTS: list[Chart] = [
    Curves("curves", "Title", "", "step", (Panel("y", (Line("end", ((1, 1), (9, 2))), Line("", ((1, 1),), 1, "dots")),
                                                 level=("dense", 1)),),
           (1, 9), log=True),
    Bars("bars", "Title", "", "perplexity", (Bar("a", 20.0, "20"), Bar("b", 900.0, "900")), ("dense", 10.0), log=True),
    HeatMap("heat", "Title", "", "block", "2:4 blocks", grid({"layers.0.q": 0.5, "layers.1.k": 0.75})),
]  # fmt: skip


def test_one_picture_a_chart_and_again(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "new" / "report"
    for _ in range(2):  # its own pictures are replaced
        png.check_folder(folder, CHARTS)
        paths = png.write(folder, CHARTS)
        assert [path.name for path in paths] == ["curves.png", "bars.png", "heat.png"]
        assert sorted(folder.iterdir()) == sorted(paths)
        for path in paths:
            data = path.read_bytes()
            assert data.startswith(b"\x89PNG")
            assert len(data) > 5000


def test_a_foreign_picture_is_kept(tmp_path: Path) -> None:
    (tmp_path / "bars.png").write_bytes(b"\x89PNG of a holiday")
    png.check_folder(tmp_path, [CHARTS[0], CHARTS[2]])
    with pytest.raises(OutputError, match=r"report: expected a picture that pst wrote, got the file .*bars.png, which is kept"):
        png.check_folder(tmp_path, CHARTS)


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "report").write_text("x")
    with pytest.raises(OutputError, match="report: expected a folder for pictures, got the file"):
        png.check_folder(tmp_path / "report", [])


def test_installed_and_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an update of numpy: it is found, and its import fails."""
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib" / "__init__.py").write_text("raise ImportError('built against another numpy')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    assert not png.installed()


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not png.installed()
