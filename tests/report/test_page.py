"""The page: one file, whole HTML, nothing from elsewhere, every section where its figures are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from run_folders import NAMES, manifest, rows, write_comparison, write_run

from proxsparse_triton.errors import ConfigError, ModelError, OutputError
from proxsparse_triton.report import png, write_report
from proxsparse_triton.report.page import MARKER, pictures_folder

EVIL = '<script>alert(\'"&")</script>'
VOID = {"meta", "!doctype"}


class Parsed(HTMLParser):
    """Tags, attributes and text; fails on a tag that is not closed in its turn."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.texts.append(data)

    def ids(self) -> list[str]:
        return [value for name, value in self.attributes if name == "id"]


def written(output: Path, folders: Iterable[Path]) -> tuple[Parsed, str]:
    """The page, and its text with single spaces."""
    report = write_report(list(folders), output, pictures=False)
    assert report.page == output
    page = Parsed(output.read_text(encoding="utf-8"))
    return page, " ".join(" ".join(page.texts).split())


def one(tmp_path: Path, steps: list[dict[str, Any]] | None = None, **changes: Any) -> tuple[Parsed, str]:
    return written(tmp_path / "page.html", [write_run(tmp_path / "run", manifest(**changes), rows() if steps is None else steps)])


def test_a_run(tmp_path: Path) -> None:
    page, text = one(tmp_path)
    assert "demo pruned to 2:4 with proxsparse" in text
    assert "Perplexity 12.250 against 10.500 of the dense model, on 8 windows of 128 tokens of stdlib (heldout)." in text
    assert "Calibrated on 16 windows of 128 tokens of stdlib (calibration). The weights that are kept are the original ones." in text
    assert "proxsparse: steps 4, lambda1 1.356, lambda2 0.25." in text
    for tile in ("perplexity, pruned 12.250 +16.7 %", "time of the method 83.2 s cpu", "peak memory 1.64 GB of the process",
                 "layers pruned to 2:4 9 1 left dense", "2:4 blocks after the last step 87.5 % 4 steps"):  # fmt: skip
        assert tile in text
    assert "lambda1 1.356 (derived)" in text
    assert "lambda2 0.25" in text
    assert page.tags.count("svg") == 2
    assert {"curves", "commitment"} <= set(page.ids())
    assert "Left out: mask changes by layer: no row of metrics.jsonl has mask_changes." in text
    assert "Left out: agreement with other masks: not in manifest.json." in text
    assert "Left out: layers that lose most: not in manifest.json." in text


def test_optional_sections(tmp_path: Path) -> None:
    steps = rows()
    steps[1] |= {"mask_changes": dict.fromkeys(NAMES, 0.25), "warnings": ["slow"]}
    steps[2]["warnings"] = ["slow"]
    restore = [{"layer": NAMES[0], "perplexity": 12.0}, {"layer": NAMES[1], "perplexity": 11.25}, {"layer": "bad"}, 3]
    method = {"name": "proxsparse", "settings": {}, "agreement": {"wanda": 0.75, "magnitude": 0.875}, "restore": restore}
    page, text = one(tmp_path, steps, method=method, weights_updated=True, command="pst prune demo -o 'my run'")
    assert "Agreement with other masks masks of blocks decided alike magnitude 87.5 % wanda 75.0 %" in text
    losing = f"layer made dense again perplexity gain {NAMES[1]} 11.250 +1.000 {NAMES[0]} 12.000 +0.250"
    assert losing in text
    assert "warning steps slow 2 to 3 (2)" in text
    assert "Command pst prune demo -o 'my run'" in text
    assert "The method changed the weights that it kept." in text
    assert page.tags.count("svg") == 3
    assert "Left out" not in text


def test_a_repaired_run(tmp_path: Path) -> None:
    repair = {"kind": "both", "steps": 40}
    _, text = one(tmp_path, method={"name": "wanda", "settings": {}, "repair": repair}, weights_updated=True)
    assert "demo pruned to 2:4 with wanda + repair" in text
    assert "The weights that are kept were repaired (both)." in text
    assert "repair kind both, steps 40" in text


def test_many_warnings_and_layers_are_folded(tmp_path: Path) -> None:
    steps = rows()
    steps[0]["warnings"] = [f"warning {index:02d}" for index in range(25)]
    restore = [{"layer": f"layers.{index}", "perplexity": 12.0 - index / 100} for index in range(30)]
    page, text = one(tmp_path, steps, method={"name": "proxsparse", "restore": restore})
    assert "warning 19" in text
    assert "warning 20" not in text
    assert "and 5 more." in text
    assert "10 more layers" in text
    assert page.tags.count("details") == 3  # layers, settings, manifest


def test_the_whole_manifest_is_on_the_page(tmp_path: Path) -> None:
    page, _ = one(tmp_path)
    assert (tmp_path / "run" / "manifest.json").read_text(encoding="utf-8") in page.texts


def test_a_run_without_steps(tmp_path: Path) -> None:
    page, text = one(tmp_path, [], method={"name": "wanda", "settings": {}})
    assert "svg" not in page.tags
    assert "Left out: what is drawn over steps and layers, as metrics.jsonl has no steps." in text


def test_an_unfinished_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run.partial", None, rows())
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5')
    page, text = written(tmp_path / "page.html", [folder])
    assert "unfinished run in run.partial" in text
    assert "This run did not finish" in text
    assert "half-written and was ignored" in text
    assert page.tags.count("svg") == 2
    assert "details" not in page.tags


def test_a_comparison(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "all", {"magnitude": 20.0, "proxsparse": 12.0})
    page, text = written(tmp_path / "page.html", [folder])
    assert "demo pruned to 2:4: 2 runs" in text
    assert "dense demo 10.500" in text
    assert "magnitude - 20.000 +90.5 % 83.2 s 1.64 GB - - 100.0 %" in text
    assert "proxsparse 16 12.000 +14.3 % 83.2 s 1.64 GB - - 62.5 %" in text
    assert {"perplexity", "proxsparse-curves", "proxsparse-commitment", "run-1", "run-2"} <= set(page.ids())
    assert "Left out: perplexity against calibration windows: needs two runs of one method with different --samples." in text
    links = [value for name, value in page.attributes if name == "href"]
    assert links == ["#run-1", "#run-2"]


def test_several_folders_and_windows(tmp_path: Path) -> None:
    folders = [
        write_comparison(tmp_path / f"of-{samples}", {"wanda": 15.0, "proxsparse": 14.0 - samples / 10}, samples) for samples in (8, 32)
    ]
    page, text = written(tmp_path / "page.html", [*folders, write_run(tmp_path / "single", manifest(samples=64), rows())])
    assert "5 runs" in text
    assert {"perplexity", "windows", "proxsparse-8-windows-curves", "proxsparse-64-windows-curves"} <= set(page.ids())
    assert "wanda from 15.000 to 15.000; proxsparse from 13.200 to 12.250; 8 to 64 windows." in text
    assert len(page.ids()) == len(set(page.ids()))


def test_runs_on_other_texts_are_not_compared(tmp_path: Path) -> None:
    other = {"windows": 4, "seqlen": 64, "source": "book.txt", "fingerprint": "f"}
    contents = [manifest("wanda", 15.0), manifest("sparsegpt", 13.0)]
    contents += [manifest("wanda", 9.0, evaluation=other), manifest("magnitude", 9.5, evaluation=other)]
    page, text = written(tmp_path / "page.html", [write_run(tmp_path / str(index), content) for index, content in enumerate(contents)])
    assert {"perplexity-1", "perplexity-2"} <= set(page.ids())
    assert "Perplexities are compared only between runs on the same model, text and dtype." in text


def test_the_page_stands_alone(tmp_path: Path) -> None:
    page, _ = one(tmp_path, model={"spec": "https://example.org/model", "files": {}})
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    assert not any(name in ("src", "xlink:href", "style") or name.startswith("on") for name, _ in page.attributes)
    assert all(value.startswith("#") for name, value in page.attributes if name == "href")
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text
    assert "prefers-color-scheme:dark" in text
    assert re.search(r'<html lang="en">', text)


def test_everything_is_escaped(tmp_path: Path) -> None:
    """Whatever stands in the folder, and in its name, is text on the page."""
    layer = f"model.layers.0.{EVIL}.weight"
    steps = [{"step": 1, "loss": 2.0, "share_24": 0.5, "layers": {layer: 0.5}, "mask_changes": {layer: 0.5}, "warnings": [EVIL]}]
    changes: dict[str, Any] = {
        "method": {"name": EVIL, "settings": {EVIL: EVIL}, "loss": EVIL, "agreement": {EVIL: 0.5},
                   "restore": [{"layer": EVIL, "perplexity": 1}]},
        "model": {"spec": EVIL},
        "evaluation": {"windows": EVIL, "seqlen": EVIL, "source": EVIL},
        "calibration": {"windows": EVIL, "seqlen": EVIL, "source": EVIL},
        "config": {"samples": 16, "dtype": EVIL, "skip": [EVIL]},
        **dict.fromkeys(("gpu", "device", "platform", "created", "command", EVIL), EVIL),
        "versions": {EVIL: EVIL},
        "parameters": [layer],
    }  # fmt: skip
    folder = write_run(tmp_path / "<i>run", manifest(**changes), steps)
    (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text() + "{", encoding="utf-8")
    other = write_run(tmp_path / "other", manifest(**{**changes, "perplexity": {"dense": 10.0, "pruned": 20.0}}), steps)
    for folders in ([folder], [folder, other]):
        page, text = written(tmp_path / "page.html", folders)
        raw = (tmp_path / "page.html").read_text(encoding="utf-8")
        assert "script" not in page.tags
        assert "i" not in page.tags
        assert "<script" not in raw
        assert EVIL in text
        assert "<script" in unescape(raw)


def test_names_of_missing_folders_are_escaped(tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    entry = {"method": "wanda", "folder": "<script>", "perplexity": 15.0}
    (tmp_path / "all" / "manifest.json").write_text(json.dumps({"tool": "proxsparse-triton", "comparison": [entry]}), encoding="utf-8")
    page, text = written(tmp_path / "page.html", [tmp_path / "all"])
    assert "script" not in page.tags
    assert "The folder <script> is missing" in text


def test_text_that_cannot_be_written_as_utf8(tmp_path: Path) -> None:
    _, text = one(tmp_path, model={"spec": "a\ud800b"})
    assert "a?b pruned" in text


def test_an_earlier_page_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", manifest(), rows())
    page = tmp_path / "new" / "page.html"
    write_report([run], page, pictures=False)
    first = page.read_bytes()
    assert MARKER.encode() in first
    write_run(run, manifest(pruned=11.0), rows())
    write_report([run], page, pictures=False)
    assert page.read_bytes() != first
    assert [path.name for path in page.parent.iterdir()] == ["page.html"]
    page.write_text("<html>my own page</html>" + " " * 2000 + MARKER)
    with pytest.raises(
        OutputError, match=r"report: expected a page that pst wrote, got the file .*page.html, which is kept. Choose another"
    ):
        write_report([run], page)
    assert page.read_text().startswith("<html>my own page")


def test_the_same_runs_give_the_same_page(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "all", {"magnitude": 20.0, "proxsparse": 12.0})
    for name in ("a.html", "b.html"):
        write_report([folder], tmp_path / name, pictures=False)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


@pytest.mark.parametrize("name", ["page", "page.pdf", "page.html.gz"])
def test_a_name_that_is_no_page(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"report: expected a page with a name in .html, .htm, got"):
        write_report([tmp_path], tmp_path / name)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", manifest(), rows())
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(OutputError, match="report: expected the name of a page, got the folder"):
        write_report([run], tmp_path / "folder.html")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"report: expected a place to write .*, got "):
        write_report([run], tmp_path / "file" / "page.html")


def test_nothing_is_written_where_a_folder_is_no_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", manifest(), rows())
    with pytest.raises(ModelError):
        write_report([run, tmp_path / "absent"], tmp_path / "new" / "page.html")
    assert not (tmp_path / "new").exists()


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = write_run(tmp_path / "run", manifest(), rows())
    report = write_report([run], run / "report.html")
    assert report.notes == ()
    assert report.pictures == (run / "report" / "curves.png", run / "report" / "commitment.png")
    assert sorted(path.name for path in (run / "report").iterdir()) == ["commitment.png", "curves.png"]


def test_pictures_never_land_in_the_run(tmp_path: Path) -> None:
    """`pst report run -o run.html` is what one types first; and run.partial will be called run one day."""
    run, other = tmp_path / "run", tmp_path / "other.partial"
    assert pictures_folder(tmp_path / "run.html", [run]) == tmp_path / "run-report"
    assert pictures_folder(tmp_path / "other.html", [run, other]) == tmp_path / "other-report"
    assert pictures_folder(run / "report.html", [run]) == run / "report"


def test_without_matplotlib_there_is_the_page_and_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(png, "installed", lambda: False)
    run = write_run(tmp_path / "run", manifest(), rows())
    report = write_report([run], run / "report.html")
    assert report.pictures == ()
    assert report.notes == ("No PNG pictures: matplotlib cannot be imported. Install it with pip install 'proxsparse-triton[report]'.",)
    assert report.page.exists()
    assert not (run / "report").exists()
