"""Pictures: which rows become which lines and bars, and what is refused before the work."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from proxsparse_triton.benchmarks.plot import bars, check_plot, curves, plot
from proxsparse_triton.errors import BackendError, ConfigError


def linear(backend: str, tokens: int, speed_up: float | None, *, mode: str = "graph", out: int = 64) -> dict[str, Any]:
    return {"bench": "linear", "backend": backend, "tokens": tokens, "speed_up": speed_up, "mode": mode, "out": out, "in": 128}


def decode(variant: str, batch: int, rate: float | None, model: str = "tiny") -> dict[str, Any]:
    return {"bench": "decode", "variant": variant, "batch": batch, "tokens_per_s": rate, "model": model}


ROWS = [
    linear("dense", 1, 1.0),
    linear("kernel", 4, 1.2),
    linear("kernel", 1, 1.5),
    linear("SparseLinear", 1, 1.5, mode="eager"),
    linear("kernel", 1, 1.1, out=32),
    {"bench": "linear", "backend": "library", "note": "failed"},
    {"bench": "prox", "us": 3.0},
    decode("dense", 1, 100.0),
    decode("sparse", 1, 150.0),
    decode("sparse", 8, 900.0, "/models/small"),
    {"bench": "decode", "variant": "dense", "batch": 8, "model": "tiny", "note": "failed"},
]


def test_a_panel_for_each_mode_and_shape_a_line_for_each_backend() -> None:
    assert curves(ROWS) == {
        ("graph", "64x128"): {"kernel": [(1, 1.5), (4, 1.2)]},
        ("eager", "64x128"): {"SparseLinear": [(1, 1.5)]},
        ("graph", "32x128"): {"kernel": [(1, 1.1)]},
    }


def test_a_panel_for_each_model_bars_for_each_variant() -> None:
    assert bars(ROWS) == {"tiny": {"dense": {1: 100.0}, "sparse": {1: 150.0}}, "small": {"sparse": {8: 900.0}}}


@pytest.mark.parametrize("suffix", [".png", ".svg", ".PDF"])
@pytest.mark.parametrize("rows", [ROWS, ROWS[:5], ROWS[7:]], ids=["both", "linear", "decode"])
def test_a_picture(tmp_path: Path, rows: list[dict[str, Any]], suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "new" / f"figure{suffix}"
    check_plot(path)
    plot(rows, path)
    assert path.stat().st_size > 1000
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="bench: expected figures of linear or decode for --plot, got none"):
        plot([{"bench": "prox"}, *ROWS[5:6]], tmp_path / "a.png")


def test_a_name_that_is_no_picture() -> None:
    with pytest.raises(ConfigError, match=r"bench: expected --plot with a name in .png, .svg, .pdf, got rows.csv. Choose another name."):
        check_plot(Path("rows.csv"))


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        BackendError, match=r"bench: expected matplotlib for --plot, found none. Install it with pip install '.*\[report\]'"
    ):
        check_plot(Path("a.png"))
