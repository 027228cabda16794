from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from proxsparse_triton.errors import ConfigError, OutputError
from proxsparse_triton.inference import choice
from proxsparse_triton.inference.choice import Entry, Key, Point, choose, default_points, load_table, pick, possible, save_table, table_path
from proxsparse_triton.inference.library import Library

GPU = "NVIDIA Some GPU 80GB"
CUDA0 = torch.device("cuda", 0)
KEY = Key("bfloat16", 4096, 4096, "graph")
POINTS = (Point(16, "kernel"), Point(512, "dense"), Point(4096, "library", (3, 2, 1)))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("PROXSPARSE_CACHE_DIR", str(tmp_path / "cache"))
    choice._forget()
    yield tmp_path / "cache"
    choice._forget()


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card with both backends, without one."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: GPU)
    monkeypatch.setattr(choice, "find_library", lambda device: Library("cusparselt", "there", "hopper"))
    monkeypatch.setattr(choice, "has_kernel", lambda device: True)
    monkeypatch.setattr(choice.sparse_linear, "on_hopper", lambda device, order, in_features=64: False)


def backend(tokens: int, *, captured: bool = True, out: int = 4096, dtype: torch.dtype = torch.bfloat16) -> str:
    return choose(CUDA0, dtype, out, 4096, tokens, captured=captured).backend


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(1, "kernel"), (16, "kernel"), (17, "dense"), (512, "dense"), (513, "library"), (4096, "library"), (10**6, "library")],
)
def test_the_next_measured_count_decides(tokens: int, expected: str) -> None:
    assert pick(POINTS, tokens).backend == expected


@pytest.mark.parametrize("mode", ["graph", "eager"])
@pytest.mark.parametrize("library", [None, "cutlass", "cusparselt"])
def test_defaults_start_with_the_kernel_and_end_with_what_there_is(library: str | None, mode: str) -> None:
    points = default_points(library, mode)
    assert Entry(Key("float16", 64, 64, mode), points)  # ascending
    assert pick(points, 1).backend == "kernel"
    assert pick(points, 10**9).backend == ("dense" if library is None else "library")


def test_cusparselt_pays_late_in_eager_code() -> None:
    """A call costs half a millisecond of the host."""
    assert pick(default_points("cusparselt", "graph"), 1024).backend == "library"
    assert pick(default_points("cusparselt", "eager"), 1024).backend == "dense"
    assert pick(default_points("cusparselt", "eager"), 4096).backend == "library"
    assert pick(default_points("cutlass", "eager"), 1024).backend == "library"


def test_the_kernel_for_hopper_serves_more_tokens() -> None:
    graph, eager = (default_points("cusparselt", mode, hopper=True) for mode in ("graph", "eager"))
    assert [pick(graph, tokens).backend for tokens in (512, 513)] == ["kernel", "library"]
    assert pick(eager, 10**9).backend == "kernel"
    assert pick(default_points(None, "graph", hopper=True), 10**5).backend == "dense"  # that kernel reads the library's order


def test_what_cannot_run_is_dense() -> None:
    assert [point.backend for point in possible(POINTS, kernel=False, library=True)] == ["dense", "dense", "library"]
    assert [point.backend for point in possible(POINTS, kernel=True, library=False)] == ["kernel", "dense", "dense"]


def test_the_cpu_is_dense() -> None:
    assert all(choose(torch.device("cpu"), torch.float32, 64, 64, n, captured=False).backend == "dense" for n in (1, 64, 10**5))


@pytest.mark.usefixtures("card")
def test_a_measured_layer_by_its_table_and_another_by_the_defaults() -> None:
    assert backend(300) == "library"
    save_table([Entry(KEY, POINTS)], GPU)
    assert backend(300) == "dense"
    assert choose(CUDA0, torch.bfloat16, 4096, 4096, 4096, captured=True).algorithm == (3, 2, 1)
    assert backend(300, captured=False) == "kernel"
    assert backend(600, captured=False) == "dense"
    assert backend(20, captured=False) == "kernel"
    assert backend(300, out=8192) == "library"
    assert backend(600, dtype=torch.float32) == "dense"  # no library takes it
    assert backend(600, out=4112) == "dense"
    assert backend(300, out=4112) == "kernel"
    assert backend(1, out=4112) == "kernel"
    assert backend(1, out=4100) == "dense"  # nor does the kernel


def test_a_table_comes_back_and_grows(folder: Path) -> None:
    other = Entry(Key("float16", 64, 128, "eager"), (Point(4096, "dense"),))
    path = save_table([Entry(KEY, POINTS)], GPU)
    assert save_table([other], GPU) == path == table_path(GPU)
    assert load_table(path) == {KEY: POINTS, other.key: other.points}
    save_table([Entry(KEY, other.points)], GPU)
    assert load_table(path)[KEY] == other.points
    assert [file.name for file in folder.iterdir()] == [path.name]  # nothing temporary is left
    assert json.loads(path.read_text())["torch"] == torch.__version__


def test_where_the_table_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = f"NVIDIA-Some-GPU-80GB_torch-{torch.__version__}.json"
    assert table_path(GPU) == tmp_path / "cache" / name
    monkeypatch.delenv("PROXSPARSE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert table_path(GPU) == tmp_path / "xdg" / "proxsparse-triton" / name
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert table_path(GPU) == tmp_path / ".cache" / "proxsparse-triton" / name


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"version": 1, "entries": []}',
        '{"version": 2, "entries": [{"dtype": "float16"}]}',
        '{"version": 2, "entries": [{"dtype": "float16", "out": 4, "in": 4, "mode": "graph", "points": []}]}',
        '{"version": 2, "entries": [{"dtype": "float16", "out": 4, "in": 4, "mode": "graph", "points": [[1, "magic", null]]}]}',
        '{"version": 2, "entries": [{"dtype": "float16", "out": 4, "in": 4, "mode": "graph", "points": [["1", "dense", null]]}]}',
        '{"version": 2, "entries": [{"dtype": "float16", "out": 4, "in": 4, "mode": "graph", "points": [[1, "library", [1, 2]]]}]}',
        '{"version": 2, "entries": [{"dtype": "float16", "out": "4", "in": 4, "mode": "graph", "points": [[1, "dense", null]]}]}',
    ],
)
@pytest.mark.usefixtures("card")
def test_an_unreadable_table_is_ignored_with_one_warning(folder: Path, content: str) -> None:
    folder.mkdir()
    table_path(GPU).write_text(content)
    with pytest.warns(UserWarning, match="ignored the measured table") as caught:
        used = [backend(300), backend(300, out=8192)]
    assert used == ["library", "library"]
    assert len(caught) == 1
    assert str(table_path(GPU)) in str(caught[0].message)


@pytest.mark.usefixtures("card")
def test_the_table_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    monkeypatch.setattr(choice, "load_table", lambda path: reads.append(path) or {})
    for tokens in range(1, 200):
        backend(tokens)
        backend(tokens, out=8192)
    assert len(reads) == 1


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PROXSPARSE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="ignored"), pytest.raises(OutputError, match="save_table: expected a cache folder to write"):
        save_table([Entry(KEY, POINTS)], GPU)


def test_values_that_make_no_sense() -> None:
    with pytest.raises(ConfigError, match="Point: expected a backend of kernel, library, dense, got 'magic'"):
        Point(1, "magic")
    with pytest.raises(ConfigError, match="Point: expected at least one token, got 0"):
        Point(0, "dense")
    with pytest.raises(ConfigError, match="Key: expected a mode of graph, eager, got 'lazy'"):
        Key("float16", 4, 4, "lazy")
    for points in ((), (Point(2, "dense"), Point(1, "dense")), (Point(2, "dense"), Point(2, "kernel"))):
        with pytest.raises(ConfigError, match="Entry: expected points by ascending tokens"):
            Entry(KEY, points)


@pytest.mark.usefixtures("card")
def test_description(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choice.describe(torch.device("cpu"))["packed layers, measured"] == "none: not a CUDA GPU"
    monkeypatch.setattr(choice, "measured_table", lambda device: {KEY: POINTS})
    described = choice.describe(CUDA0)
    assert described["packed layers, few tokens"] == "own kernel, up to 128"
    assert described["packed layers, many tokens"] == "there"
    monkeypatch.setattr(choice.sparse_linear, "on_hopper", lambda device, order, in_features=64: True)
    assert choice.describe(CUDA0)["packed layers, few tokens"] == "own kernel, up to 512"
    assert backend(300, out=8192) == "kernel"
    assert described["packed layers, measured"].endswith("1 entries")


@pytest.mark.usefixtures("card")
def test_warm_up_chooses_as_a_graph_will() -> None:
    assert backend(300, captured=False) == "kernel"
    with choice.warm_up():
        assert backend(300, captured=False) == "library"
        with pytest.raises(ZeroDivisionError), choice.warm_up():
            raise ZeroDivisionError
        assert backend(300, captured=False) == "library"
    assert backend(300, captured=False) == "kernel"


@pytest.mark.usefixtures("card")
def test_fp16_goes_by_what_bf16_measured() -> None:
    save_table([Entry(KEY, POINTS)], GPU)
    assert KEY.dtype == "bfloat16"
    assert backend(300, dtype=torch.float16) == backend(300) == "dense"
    assert backend(600, dtype=torch.float32) == "dense"
