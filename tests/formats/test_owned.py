"""What is ours to delete, and what is not: by whole names, of regular files, in the records of the folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from proxsparse_triton.errors import OutputError
from proxsparse_triton.formats.folder import check_output, output_folder
from proxsparse_triton.formats.owned import MARKER, delete, is_run, is_whole, manifest_of, mark, strangers
from proxsparse_triton.formats.records import record_of
from proxsparse_triton.marks import PAGE_MARK, PICTURE_MARK


def write(path: Path, text: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def run_folder(path: Path, **manifest: object) -> Path:
    """A finished run: two files and their record."""
    write(path / "model.safetensors")
    write(path / "templates" / "chat.jinja")
    record = {"tool": "proxsparse-triton", "files": {"model.safetensors": {}, "templates/chat.jinja": {}}, **manifest}
    write(path / "manifest.json", json.dumps({key: value for key, value in record.items() if value is not None}))
    return path


def comparison(path: Path, *names: str) -> Path:
    for name in names:
        run_folder(path / name)
    write(path / "manifest.json", json.dumps({"tool": "proxsparse-triton", "comparison": [{"folder": name} for name in names]}))
    return path


# Each adds one thing to a run that pst did not write; the name that the refusal must tell.
FOREIGN: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a longer name": ("manifest.json.orig", lambda run: write(run / "manifest.json.orig")),
    "a page of the user": ("report.html.mine", lambda run: write(run / "report.html.mine")),
    "in a folder with a longer name": ("report.htmlx/page", lambda run: write(run / "report.htmlx" / "page")),
    "beside the pictures": ("report/notes.txt", lambda run: write(run / "report" / "notes.txt")),
    "a picture of the user": ("report/mine.png", lambda run: write(run / "report" / "mine.png", "not by pst")),
    "a page under our name": ("report.html", lambda run: write(run / "report.html", "<html>mine</html>")),
    "a link": ("shortcut", lambda run: (run / "shortcut").symlink_to("/tmp")),
    "a link under a recorded name": ("model.safetensors", lambda run: relink(run / "model.safetensors")),
    "a broken link": ("broken", lambda run: (run / "broken").symlink_to("nowhere")),
    "an empty folder": ("mine/", lambda run: (run / "mine").mkdir()),
    "a file beside recorded ones": ("templates/mine", lambda run: write(run / "templates" / "mine")),
    "a hidden file": (".git/HEAD", lambda run: write(run / ".git" / "HEAD")),
    "a run of the user": ("best/manifest.json", lambda run: run_folder(run / "best")),
    "a socket": ("pipe", lambda run: os.mkfifo(run / "pipe")),
}


def relink(path: Path) -> None:
    kept = path.rename(path.parent.parent / "kept")
    path.symlink_to(kept)


@pytest.mark.parametrize("case", FOREIGN)
def test_overwrite_refuses_a_run_with_anything_else_in_it(tmp_path: Path, case: str) -> None:
    name, add = FOREIGN[case]
    run = run_folder(tmp_path / "run")
    check_output(run, overwrite=True)
    add(run)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(OutputError, match=f"got {name}( and 2 more)?, which --overwrite would delete"):
        check_output(run, overwrite=True)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_what_pst_report_adds_and_what_its_kill_leaves_are_our_own(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    write(run / "report.html", f"<!doctype html>\n{PAGE_MARK}\n<html>")
    write(run / "report" / "curves.png", f"PNG {PICTURE_MARK}")
    for half in (".report.html.partial", "report/.curves.png.partial", ".manifest.json.partial", "report/empty.png"):
        write(run / half, "")
    assert strangers(run) == []
    with output_folder(run, overwrite=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert list(run.iterdir()) == []


def test_a_run_without_a_record_is_refused_by_the_name_of_its_first_file(tmp_path: Path) -> None:
    """As those of earlier versions: nothing says what in it is ours."""
    run = run_folder(tmp_path / "run", files=None)
    with pytest.raises(OutputError, match=r"got model\.safetensors and 1 more, .*lists no files, as those of earlier versions"):
        check_output(run, overwrite=True)


@pytest.mark.parametrize("listed", [[], [{"folder": ".."}], [{"folder": "."}], [{"folder": "a/b"}], [{"folder": 3}], [7], "x", None])
def test_records_that_list_nothing_of_use_let_nothing_be_deleted(tmp_path: Path, listed: object) -> None:
    table = comparison(tmp_path / "table", "wanda")
    write(table / "manifest.json", json.dumps({"tool": "proxsparse-triton", "comparison": listed, "files": listed}))
    with pytest.raises(OutputError, match="would delete"):
        check_output(table, overwrite=True)


def test_a_comparison_is_replaced_with_the_runs_that_it_lists_alone(tmp_path: Path) -> None:
    table = comparison(tmp_path / "table", "wanda", "magnitude")
    check_output(table, overwrite=True)
    run_folder(table / "best-run")
    with pytest.raises(OutputError, match=r"got best-run/manifest\.json and 2 more"):
        check_output(table, overwrite=True)
    delete(table / "best-run")
    write(table / "wanda" / "mine.txt")
    with pytest.raises(OutputError, match=r"got wanda/mine\.txt, which"):
        check_output(table, overwrite=True)
    assert (table / "wanda" / "mine.txt").exists()


def test_a_run_that_took_the_place_of_a_compared_one_is_kept(tmp_path: Path) -> None:
    table = comparison(tmp_path / "table", "wanda", "magnitude")
    record = {name: record_of(table / name) for name in ("wanda/manifest.json", "magnitude/manifest.json")}
    write(table / "manifest.json", json.dumps({**manifest_of(table), "files": record}))
    check_output(table, overwrite=True)
    assert is_whole(table)
    run_folder(table / "wanda", samples=400)
    with pytest.raises(OutputError, match=r"got wanda/model\.safetensors and 1 more"):
        check_output(table, overwrite=True)


@pytest.mark.parametrize("name", ["thesis.txt", "model.safetensors", "config.json", "manifest.json", "sub/thesis.txt", "metrics.jsonl.gz"])
def test_a_partial_folder_of_somebody_else_is_refused(tmp_path: Path, name: str) -> None:
    mine = write(tmp_path / "run.partial" / name, "mine")
    with pytest.raises(OutputError, match=rf"got .*run\.partial with {name}, which no run of this tool left there\. Move it away"):
        check_output(tmp_path / "run", overwrite=False)
    with pytest.raises(OutputError), output_folder(tmp_path / "run"):
        pass
    assert mine.read_text() == "mine"


def test_a_partial_link_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "disk" / "metrics.jsonl", "mine")
    (tmp_path / "run.partial").symlink_to(tmp_path / "disk")
    with pytest.raises(OutputError, match=r"got the link .*run\.partial\. Move it away"):
        check_output(tmp_path / "run", overwrite=False)
    assert (tmp_path / "disk" / "metrics.jsonl").exists()


@pytest.mark.parametrize("marked", [True, False])
def test_the_marker_makes_what_a_kill_left_ours(tmp_path: Path, marked: bool) -> None:
    """The names of the model's files, and of weights; a file that was added meanwhile is still a stranger."""
    write(tmp_path / "model" / "vocab.txt")
    write(tmp_path / "model" / "pytorch_model.bin")
    write(tmp_path / "model" / "additional_chat_templates" / "tool.jinja")
    partial = tmp_path / "run.partial"
    partial.mkdir()
    if marked:
        mark(partial, tmp_path / "model")
    names = [
        *("additional_chat_templates/tool.jinja", "config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"),
        *("packed-00001-of-00001.safetensors", "pytorch_model.safetensors", "vocab.txt"),
    ]
    for name in (*names, "metrics.jsonl", "masks.safetensors", ".masks.safetensors.partial", ".manifest.json.partial"):
        write(partial / name)
    unmarked = sorted([*names, "metrics.jsonl", "masks.safetensors"])
    assert strangers(partial, unfinished=True) == ([] if marked else unmarked)
    write(partial / "thesis.txt")
    assert "thesis.txt" in strangers(partial, unfinished=True)


def test_a_marker_that_was_half_written_is_a_marker(tmp_path: Path) -> None:
    for text in ("", '{"tool": "proxsp', "[]", '{"names": 3}'):
        write(tmp_path / "run.partial" / MARKER, text)
        check_output(tmp_path / "run", overwrite=False)


def test_finished_runs_of_an_unfinished_comparison_are_ours(tmp_path: Path) -> None:
    partial = tmp_path / "table.partial"
    run_folder(partial / "wanda")
    write(partial / "proxsparse.partial" / "metrics.jsonl")
    write(partial / "proxsparse.partial" / MARKER, "{}")
    assert strangers(partial, unfinished=True) == []
    write(partial / "wanda" / "mine")
    assert strangers(partial, unfinished=True) == ["wanda/mine"]


@pytest.mark.parametrize("left", range(4))
def test_what_a_killed_deletion_leaves_is_still_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int) -> None:
    """The record goes last, at every depth."""
    table = comparison(tmp_path / "run.partial", "wanda")
    mark(table, None)
    unlink, count = os.unlink, [0]

    def limited(path: str) -> None:
        count[0] += 1
        if count[0] > left:
            raise KeyboardInterrupt
        unlink(path)

    monkeypatch.setattr(os, "unlink", limited)
    with pytest.raises(KeyboardInterrupt):
        delete(table)
    monkeypatch.undo()
    check_output(tmp_path / "run", overwrite=False)


@pytest.mark.parametrize("name", ["run.partial", "run.replaced-20240101"])
def test_a_finished_run_of_such_a_name_is_not_ours_to_delete(tmp_path: Path, name: str) -> None:
    """A user's, or one whose last renaming failed: nothing marks it."""
    run = run_folder(tmp_path / name)
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    if name.endswith("partial"):
        with pytest.raises(OutputError, match=r"which is a finished run\. Give it another name"):
            check_output(tmp_path / "run", overwrite=True)
    else:
        check_output(tmp_path / "run", overwrite=True)
        assert not (tmp_path / "run").exists()
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == before


@pytest.mark.parametrize("file", ["metrics.jsonl", "masks.safetensors", "logs/metrics.jsonl"])
def test_common_names_do_not_make_a_folder_ours(tmp_path: Path, file: str) -> None:
    write(tmp_path / "run.partial" / file, "mine")
    with pytest.raises(OutputError, match="which no run of this tool left there"):
        check_output(tmp_path / "run", overwrite=True)
    assert (tmp_path / "run.partial" / file).read_text() == "mine"


def test_whole_runs(tmp_path: Path) -> None:
    run, table = run_folder(tmp_path / "run"), comparison(tmp_path / "table", "wanda")
    assert is_whole(run)
    assert is_whole(table)
    (run / "model.safetensors").unlink()
    (table / "wanda" / "templates" / "chat.jinja").unlink()
    assert not is_whole(run)
    assert not is_whole(table)
    assert not is_whole(tmp_path)


def test_a_manifest_that_is_no_regular_file_is_none(tmp_path: Path) -> None:
    """Reading a FIFO would wait for ever."""
    os.mkfifo(tmp_path / "manifest.json")
    assert not is_run(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").symlink_to("/dev/zero")
    assert not is_run(tmp_path)
