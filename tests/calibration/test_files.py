"""Local files: what is read, in which order, and what is said about a file that is wrong."""

from __future__ import annotations

import csv
import gzip
import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from proxsparse_triton.calibration.files import ACCEPTED_FILES, decode, suffix_of
from proxsparse_triton.calibration.folders import open_folder
from proxsparse_triton.calibration.readers import read_documents
from proxsparse_triton.calibration.rows import RowText
from proxsparse_triton.errors import BackendError, DataError

DATA = Path(__file__).parents[1] / "data"
ROWS = [{"text": "first\r\nline", "id": 1}, {"text": "zweite Zeile ä 雪", "id": 2}, {"text": "", "id": 3}, {"text": " x ", "id": 4}]


def read(path: Path, field: str | None = None) -> list[str]:
    return list(map(str, read_documents(path, RowText(field))))


def message(path: Path, field: str | None = None) -> str:
    with pytest.raises(DataError) as caught:
        read(path, field)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def json_lines(rows: list[dict[str, object]], newline: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + newline for row in rows).encode()


def write_jsonl(path: Path) -> None:
    path.write_bytes(json_lines(ROWS))


def write_windows_jsonl(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + json_lines(ROWS[:2], "\r\n") + b"\r\n   \r\n" + json_lines(ROWS[2:], "\r\n").removesuffix(b"\r\n"))


def write_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(json_lines(ROWS)))


def write_parquet(path: Path) -> None:
    parquet.write_table(pa.Table.from_pylist(ROWS), path)


def write_array(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS, indent=2).encode())


def write_csv(path: Path) -> None:
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, ["id", "text"])
        table.writeheader()
        table.writerows(ROWS)


def write_arrow_stream(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def write_arrow_file(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", write_jsonl),
        ("windows.jsonl", write_windows_jsonl),
        ("a.jsonl.gz", write_gzip),
        ("A.JSONL.GZ", write_gzip),
        ("a.parquet", write_parquet),
        ("a.json", write_jsonl),
        ("c4-train.00000-of-01024.json.gz", write_gzip),
        ("array.json", write_array),
        ("a.csv", write_csv),
        ("stream.arrow", write_arrow_stream),
        ("file.arrow", write_arrow_file),
    ],
)
def test_row_formats_give_the_same_documents(tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
    write(tmp_path / name)
    assert read(tmp_path / name) == [row["text"] for row in ROWS]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "A.TXT"])
def test_plain_text_is_one_document(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"one\n\ntwo\n")
    assert read(tmp_path / name) == ["one\n\ntwo\n"]


def test_byte_order_mark_and_windows_line_ends_do_not_reach_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\r\n")
    assert read(tmp_path / "a.txt") == ["one\ntwo\rthree\n"]


def test_a_byte_order_mark_is_stripped_once_and_only_at_the_start() -> None:
    assert decode("\ufeff\ufeffa\ufeff".encode()) == "\ufeffa\ufeff"


def test_parquet_of_other_string_types_and_many_batches(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(2500)]
    column = pa.array(texts, pa.large_string()).dictionary_encode()
    parquet.write_table(pa.table({"other": range(2500), "body": column}), tmp_path / "a.parquet", row_group_size=700)
    assert read(tmp_path / "a.parquet", "body") == texts


def test_another_text_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "yes", "text": "no"}\n')
    assert read(tmp_path / "a.jsonl", "body") == ["yes"]


def test_rows_are_read_lazily(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\nnot json\n')
    assert next(read_documents(tmp_path / "a.jsonl", RowText())) == "good"


def test_the_shipped_text_is_readable() -> None:
    assert len(read(DATA / "heldout.jsonl.gz")) == 466


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_json_lines_round_trip(tmp_path: Path, texts: list[str]) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(json_lines([{"text": text} for text in texts])))
    assert read(path) == texts


@settings(max_examples=100, deadline=None)
@given(raw=st.binary())
def test_any_bytes_are_text_or_explained(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    """No input, however odd, ends in a library's own error."""
    for name in ("a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet", "a.json", "a.json.gz", "a.csv", "a.arrow", "a.txt.gz"):
        path = tmp_path_factory.getbasetemp() / name
        path.write_bytes(raw)
        with suppress(DataError):
            read(path)


# ---- what is wrong with a file


def test_not_utf8_names_file_and_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfabc\xe9def")
    assert message(path) == f"{path}: expected UTF-8 text, got the byte 0xe9 at byte offset 6. Convert the file to UTF-8."


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_not_utf8_in_a_line_counts_from_the_start_of_the_text(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    raw = b'{"text": "x"}\n{"text": "\xff"}\n'
    path.write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    where = raw.index(b"\xff")
    assert message(path) == f"{path}, line 2: expected UTF-8 text, got the byte 0xff at byte offset {where}. Convert the file to UTF-8."


@pytest.mark.parametrize("line", ['{"text": "x"', "plain words", "[" * 100_000, '{"text": "x"} {"text": "y"}'])
def test_malformed_json_names_the_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n\n' + line + "\n")
    assert message(path).startswith(f"{path}, line 3: expected one JSON object a line, got malformed JSON (")


def test_one_indented_object_is_told_what_a_json_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "pretty.json"
    path.write_text(json.dumps({"text": "x"}, indent=2))
    said = message(path)
    assert said.startswith(f"{path}, line 1: expected an array of objects or one object a line, got malformed JSON (")
    assert said.endswith("). Mend it, or write each object on a line of its own.")


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_values_with_something_else_between_them_are_no_csv(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"id{mark}text\n1{mark}x, y\n")
    said = f"{path}, line 1: expected comma-separated values, got {f'id{mark}text'!r}. Put commas between the values."
    assert message(path) == said
    path.write_text(f"id{mark}text\nx\n")
    assert read(path, f"id{mark}text") == ["x"], "a name that was asked for"


def test_utf16_json_is_not_guessed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"text": "x"}\n'.encode("utf-16"))
    assert "line 1: expected UTF-8 text, got the byte 0xff at byte offset 0" in message(tmp_path / "a.jsonl")


@pytest.mark.parametrize(("line", "kind"), [("[1]", "a list"), ("null", "null"), ('"text"', "a str")])
def test_a_line_that_is_no_object(tmp_path: Path, line: str, kind: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(line)
    assert message(path) == f"{path}, line 1: expected an object with a field 'text', got {kind}. Write one object a row."


def test_a_missing_field_lists_those_that_were_there(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n{"body": "y", "id": 3}\n{}\n')
    expected = "expected a field 'text', got the fields 'body', 'id'. Name the one with the text with --text-field."
    assert message(path) == f"{path}, line 2: {expected}"
    path.write_text("{}")
    assert "got the fields none" in message(path)


@pytest.mark.parametrize(("value", "kind"), [("3", "a int"), ('["a"]', "a list"), ("{}", "a dict")])
def test_text_that_is_no_string(tmp_path: Path, value: str, kind: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ' + value + "}")
    advice = "Mend or remove it, or name another field with --text-field."
    assert message(path) == f"{path}, line 1: expected a string or messages in the field 'text', got {kind}. {advice}"


def test_a_lone_surrogate(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ab\\ud800"}')
    assert message(path) == f"{path}, line 1: expected valid Unicode, got a lone surrogate at character 2. Mend or remove it."
    assert RowText().of({"text": "\U0001f600"}, "here") == "\U0001f600"


def test_a_cut_gzip_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    whole = (DATA / "heldout.jsonl.gz").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    said = message(path)
    assert ": expected a whole gzip file, got a damaged or cut one (" in said
    assert int(said.split("after byte ")[1].split(":")[0]) > 100_000


@pytest.mark.parametrize("spoil", [lambda raw: b"not gzip at all", lambda raw: raw[:2000] + b"\x00" * 500 + raw[2500:]])
def test_a_damaged_gzip_file(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(spoil((DATA / "heldout.jsonl.gz").read_bytes()))
    assert "expected a whole gzip file, got a damaged or cut one" in message(path)


def test_parquet_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path)
    expected = "expected a field 'body', got the fields 'text', 'id'. Name the one with the text with --text-field."
    assert message(path, "body") == f"{path}: {expected}"
    assert message(path, "id").startswith(f"{path}, row 1: expected a string or messages in the field 'id', got a int.")
    parquet.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
    assert message(path) == f"{path}: expected a field 'text', got 2 of this name. Rename one of them."
    for raw in (b"", b"PAR1 and nothing more"):
        path.write_bytes(raw)
        assert message(path).startswith(f"{path}: expected a whole Parquet file, got ")


def test_parquet_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(BackendError, match=r"a\.parquet: expected the library pyarrow, got .*pip install 'proxsparse-triton\[data\]'"):
        read(tmp_path / "a.parquet")


def test_an_unknown_kind_of_file(tmp_path: Path) -> None:
    path = tmp_path / "a.docx"
    expected = f"expected a file ending in {ACCEPTED_FILES}, got 'a.docx'. Rename or convert it."
    assert message(path) == f"{path}: {expected}"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_a_file_that_is_gone(tmp_path: Path, name: str) -> None:
    assert message(tmp_path / name).startswith(f"{tmp_path / name}: expected a ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x")
    path.chmod(0)
    assert message(path) == f"{path}: expected a readable file, got Permission denied. Check the path and its permissions."


# ---- folders


def test_text_files_are_found_at_every_depth_and_hidden_ones_left_out(tmp_path: Path) -> None:
    wanted = ["a.txt", "b/c/d.jsonl.gz", "b/e.md", "z.PY"]
    for name in [*wanted, ".hidden.txt", ".git/config.txt", "b/__pycache__/x.py", "image.png", "archive.gz"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path)
    folder = open_folder(tmp_path, RowText())
    assert sorted(str(path.relative_to(tmp_path)) for path in folder.files) == wanted
    assert folder.left_out == (("archive.gz", "another kind"), ("image.png", "another kind"), ("loop", "no regular file"))


@pytest.mark.parametrize(
    ("name", "suffix"), [("a.jsonl.gz", ".jsonl"), ("a.jsonl", ".jsonl"), ("a.gz", None), ("txt", None), ("", None), ("a.parquet.gz", None)]
)
def test_suffixes(name: str, suffix: str | None) -> None:
    assert suffix_of(name) == suffix
