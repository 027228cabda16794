"""Folders: what is read, what is named as left out, and in which order."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from proxsparse_triton.calibration import folders
from proxsparse_triton.calibration.folders import open_folder
from proxsparse_triton.calibration.rows import RowText
from proxsparse_triton.calibration.sources import open_source
from proxsparse_triton.errors import DataError


def rows(*texts: str) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def test_a_readme_beside_rows_is_not_the_text(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "c4-train.00000-of-01024.json.gz", "wt") as file:
        file.write(rows("one", "two"))
    (tmp_path / "README.md").write_text("Dataset card")
    (tmp_path / "LICENSE.txt").write_text("Free")
    source = open_source(str(tmp_path))
    assert sorted(map(str, source.documents())) == ["one", "two"]
    assert source.notes == (f"{tmp_path}: reads 1 file, not LICENSE.txt (about the data), README.md (about the data).",)


def test_a_readme_among_texts_is_one_of_them(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("Read")
    (tmp_path / "a.py").write_text("a = 1")
    source = open_source(str(tmp_path))
    assert sorted(map(str, source.documents())) == ["Read", "a = 1"]
    assert source.notes == ()


def test_only_whole_names_are_about_the_data(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(rows("one"))
    about = ["COPYING.txt", "Changelog.en.md", "license.txt.gz"]
    for name in ["notice_board.txt", "readme_first.txt", *about]:
        (tmp_path / name).write_text(name)
    folder = open_folder(tmp_path, RowText())
    assert [file.name for file in folder.files] == ["a.jsonl", "notice_board.txt", "readme_first.txt"]
    assert folder.left_out == tuple((name, "about the data") for name in about)
    assert folder.note().startswith(f"{tmp_path}: reads 3 files, not ")


def test_settings_in_json_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("a = 1")
    (tmp_path / "package.json").write_text('{"name": "x"}')
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "table.csv").write_text("id,label\n1,2\n")
    source = open_source(str(tmp_path))
    assert list(source.documents()) == ["a = 1"]
    assert source.notes[0].endswith("not broken.json (no rows with text), package.json (no rows with text), table.csv (no rows with text).")


def test_a_folder_of_a_saved_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}]).save_to_disk(str(tmp_path / "saved"))
    source = open_source(str(tmp_path / "saved"))
    assert sorted(map(str, source.documents())) == ["one", "two"]
    assert "dataset_info.json (no rows with text)" in source.notes[0]


def test_many_left_out_files_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    for i in range(9):
        (tmp_path / f"{i}.bin").write_bytes(b"x")
    assert open_folder(tmp_path, RowText()).note().endswith("4.bin (another kind) and 4 more.")


def test_pipes_and_devices_are_named_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    with pytest.raises(DataError) as caught:
        open_source(str(tmp_path))
    assert "got none below it but pipe.jsonl (no regular file), zero.txt (no regular file)" in str(caught.value)


def test_a_name_that_is_not_utf8_is_printed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with open(os.fsencode(tmp_path) + b"/\xff.bin", "wb"):
        pass
    open_folder(tmp_path, RowText()).note().encode()


def test_a_folder_too_large_to_be_ordered_is_read_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text(rows(*(f"{name} {i}" for i in range(4))))
    whole = list(open_source(str(tmp_path)).documents())
    monkeypatch.setattr(folders, "FOLDER_CHARACTERS", 20)
    found = list(open_source(str(tmp_path)).documents())
    assert sorted(map(str, found)) == sorted(map(str, whole))
    assert [str(document)[2:] for document in found] == [str(i) for i in range(4) for _ in range(3)], "a document of each file in turn"
    assert list(open_source(str(tmp_path)).documents()) == found
    monkeypatch.setattr(folders, "OPEN_FILES", 1)
    assert [str(document)[2:] for document in open_source(str(tmp_path)).documents()] == [str(i) for i in range(4)] * 3
