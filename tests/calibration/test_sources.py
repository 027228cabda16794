"""What a name opens, on which side of the split a document falls, and in which order documents come."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxsparse_triton.calibration.documents import Tail, document_digest, is_heldout
from proxsparse_triton.calibration.files import ACCEPTED_FILES
from proxsparse_triton.calibration.sources import Column, open_source
from proxsparse_triton.errors import BackendError, ConfigError, DataError

DATA = Path(__file__).parents[1] / "data"
SIDES = ("calibration", "heldout")


def documents(spec: object, **options: Any) -> list[Any]:
    return list(open_source(str(spec), **options).documents())


def refused(spec: object, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        documents(spec, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of every kind of file, 60 documents and a few blank ones."""
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for i in range(20):
        (tmp_path / "deep" / "er" / f"{i}.txt").write_text(f"text {i}\n")
    (tmp_path / "empty.md").write_text("")
    (tmp_path / "blank.py").write_text(" \n\t\n")
    rows = [{"text": f"row {i}"} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:20]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows[20:]).encode()))
    return tmp_path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Real `datasets` objects from a fake Hub whose rows name their split; gives the calls made."""
    library = pytest.importorskip("datasets")
    calls: list[dict[str, Any]] = []

    def load(path: str, name: str | None = None, **options: Any) -> Any:
        calls.append({"path": path, "name": name, **{key: value for key, value in options.items() if value is not None}})
        rows = [{"text": text} for text in ("", *(f" {options['split']} {i} \n" for i in range(30)), "")]
        whole = library.Dataset.from_list(rows)
        return whole.to_iterable_dataset() if options["streaming"] else whole

    monkeypatch.setattr(library, "load_dataset", load)
    return calls


# ---- the split


def test_a_digest_is_the_hash_of_the_text() -> None:
    assert document_digest("Grüße") == hashlib.sha256("Grüße".encode()).hexdigest()
    assert len(document_digest("\ud800")) == 64


def test_a_tenth_is_held_out() -> None:
    share = sum(is_heldout(f"document {i}") for i in range(5000)) / 5000
    assert 0.085 < share < 0.115


@settings(deadline=None)
@given(text=st.text())
def test_the_side_is_what_the_rule_says(text: str) -> None:
    assert is_heldout(text) == (int(document_digest(text)[:8], 16) % 10 == 0)


@pytest.mark.parametrize("spec", [DATA / "calibration.jsonl.gz", "stdlib"])
def test_the_sides_are_disjoint_and_complete(spec: object) -> None:
    calibration, heldout = (documents(spec, split=side) for side in SIDES)
    assert not set(calibration) & set(heldout)
    assert sorted(calibration + heldout) == sorted(documents(spec))
    assert 0.04 < len(heldout) / (len(heldout) + len(calibration)) < 0.16


def test_identical_documents_stay_on_one_side(tmp_path: Path) -> None:
    rows = [f"document {i % 30}" for i in range(120)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    calibration, heldout = (documents(tmp_path / "a.jsonl", split=side) for side in SIDES)
    assert not set(calibration) & set(heldout)
    assert len(calibration) + len(heldout) == 120


def test_a_side_without_documents_says_why(tmp_path: Path) -> None:
    kept = [text for text in (f"document {i}" for i in range(99)) if not is_heldout(text)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in kept[:2]))
    assert documents(path, split="calibration") == kept[:2]
    said = refused(path, split="heldout")
    assert said.startswith(f"{path}: expected documents on the heldout side, got none of 2 (each falls on one side whole, by its content;")


@pytest.mark.parametrize("name", ["book.txt", "book.jsonl"])
def test_of_a_single_document_the_last_tenth_is_held_out(tmp_path: Path, name: str) -> None:
    text = "".join(f"line {i}\n" for i in range(1000))
    path = tmp_path / name
    path.write_text(text if name == "book.txt" else "\n" + json.dumps({"text": text}) + "\n" + json.dumps({"text": None}))
    (first,), (rest,) = (documents(path, split=side) for side in SIDES)
    assert isinstance(rest, Tail)
    assert first + rest.text == text
    assert first.endswith("\n")
    assert 0.89 < len(first) / len(text) < 0.92
    assert documents(path) == [text]


def test_an_unknown_split() -> None:
    with pytest.raises(ConfigError, match="open_source: expected split to be calibration, heldout or all, got 'test'"):
        open_source("stdlib", split="test")  # type: ignore[arg-type]


# ---- local text


def test_a_file_keeps_its_order_and_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    texts = [f"document {i}" for i in range(50)]
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    assert documents(path, column=Column("body")) == texts
    assert open_source(str(path)).name == str(path)
    assert open_source(str(path), split="heldout").name == f"{path} (heldout)"
    assert open_source(str(path)).joiner is None


def test_a_source_can_be_read_twice(corpus: Path) -> None:
    source = open_source(str(corpus))
    assert list(source.documents()) == list(source.documents())


def test_a_folder_is_ordered_by_digest_whatever_its_file_names(corpus: Path) -> None:
    before = documents(corpus)
    assert sorted(before) == sorted([f"text {i}\n" for i in range(20)] + [f"row {i}" for i in range(40)])
    assert before == sorted(before, key=document_digest)
    (corpus / "a.jsonl").rename(corpus / "deep" / "zzz.jsonl")
    (corpus / "deep" / "er").rename(corpus / "first")
    assert documents(corpus) == before


def test_relative_home_and_existing_paths_are_local(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(corpus)
    monkeypatch.setenv("HOME", str(corpus))
    for spec in ("./a.jsonl", "a.jsonl", "~/a.jsonl", str(corpus / "a.jsonl"), "deep/../a.jsonl"):
        assert len(documents(spec)) == 20
    assert len(documents("deep/er")) == 20, "an existing path wins over a Hub id"
    assert len(documents(".")) == 60


def test_missing_paths_are_refused_without_asking_the_hub(corpus: Path, hub: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(corpus)
    for spec in ("./no", "/no/such/place", "~/no/such/place"):
        assert refused(spec).startswith(f"{spec}: expected a file or folder, got a path that does not exist. Accepted are c4,")
    for spec in ("deep/no.jsonl", "no.txt", "wikitext3", "", "a/b/c", "a/b:", "\0", "x" * 10_000):
        said = refused(spec)
        assert said.startswith(
            f"{spec!r}: expected a source of text, got a name that is no existing path and no built-in source or Hub id."
        )
        assert said.endswith(f"a local {ACCEPTED_FILES} file, and a folder of such files.")
    assert hub == []


def test_a_name_with_two_meanings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stdlib").mkdir()
    (tmp_path / "stdlib" / "a.txt").write_text("mine")
    said = refused("stdlib")
    assert said.startswith("stdlib: expected one meaning, got two: the built-in source and the path ./stdlib. Write ./stdlib")
    assert documents("./stdlib") == ["mine"]


def test_what_is_neither_file_nor_folder_nor_text(tmp_path: Path) -> None:
    assert refused("/dev/null").startswith("/dev/null: expected a regular file or a folder, got something else.")
    path = tmp_path / "a.docx"
    path.write_bytes(b"PK")
    assert f"{path}: expected a file ending in {ACCEPTED_FILES}, got 'a.docx'" in refused(path)
    assert refused(tmp_path).startswith(
        f"{tmp_path}: expected a folder with {ACCEPTED_FILES} files, got none below it but a.docx (another kind)."
    )


def test_text_that_is_empty_or_blank(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for text in ("", " \n\n", "\ufeff"):
        path.write_text(text)
        for spec in (path, tmp_path):
            for split in ("all", "calibration"):
                assert (
                    refused(spec, split=split) == f"{spec}: expected text, got no document that is not blank. Give a source that has text."
                )


def test_one_bad_file_of_a_folder_is_named(corpus: Path) -> None:
    (corpus / "deep" / "bad.txt").write_bytes(b"ab\xff")
    assert f"{corpus / 'deep' / 'bad.txt'}: expected UTF-8 text, got the byte 0xff at byte offset 2" in refused(corpus)


def test_parquet_without_its_library_fails_before_reading(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (corpus / "x.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for spec in (corpus, corpus / "x.parquet"):
        with pytest.raises(BackendError, match=r"expected the library pyarrow, .*pip install 'proxsparse-triton\[data\]'"):
            open_source(str(spec))


# ---- the standard library


def test_stdlib_is_the_running_interpreters_own_text() -> None:
    texts = documents("stdlib")
    assert len(texts) > 500
    assert texts == sorted(texts, key=document_digest) == documents("stdlib")
    assert Path(json.__file__).read_text() in texts
    assert Path(pytest.__file__).read_text() not in texts, "site-packages are other people's text"


def test_stdlib_skips_what_is_not_utf8_or_not_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, raw in {
        "a.py": b"a = 1\n",
        "test/latin.py": b"# -*- coding: latin-1 -*- \xe9\n",
        "b/__pycache__/c.py": b"cached",
        "site-packages/d.py": b"other",
        "e.txt": b"no module",
        "lib/f.py": b"\xef\xbb\xbff = 2\r\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(raw)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: {"stdlib": str(tmp_path)}[name])
    assert sorted(documents("stdlib")) == ["a = 1\n", "f = 2\n"]


def test_an_interpreter_without_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert "stdlib: expected text, got no document that is not blank" in refused("stdlib")


# ---- the Hub


def test_c4_reads_one_training_and_one_validation_file(hub: list[dict[str, Any]]) -> None:
    calibration, heldout = (documents("c4", split=side) for side in SIDES)
    assert hub == [
        {
            "path": "allenai/c4",
            "name": None,
            "split": "train",
            "streaming": True,
            "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"},
        },
        {
            "path": "allenai/c4",
            "name": None,
            "split": "validation",
            "streaming": True,
            "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
        },
    ]
    assert calibration == [f" train {i} \n" for i in range(30)], "no split by hash where there is a natural one; blank ones skipped"
    assert documents("c4") == calibration + heldout
    assert open_source("c4").joiner is None


def test_wikitext2_keeps_its_blank_rows_because_they_are_joined(hub: list[dict[str, Any]]) -> None:
    source = open_source("wikitext2", split="heldout", revision="abc")
    assert source.joiner == "\n\n"
    assert source.name == "wikitext2 (heldout)"
    assert list(source.documents()) == ["", *(f" test {i} \n" for i in range(30)), ""]
    call = {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test", "streaming": False, "revision": "abc"}
    assert hub == [call]
    assert documents("wikitext2", split="calibration")[1] == " train 0 \n"
    assert [call["split"] for call in hub] == ["test", "train"]


@pytest.mark.parametrize(("spec", "config"), [("owner/some.name-1", None), ("owner/some.name-1:20231101.en", "20231101.en")])
def test_a_hub_id_is_split_by_content(hub: list[dict[str, Any]], spec: str, config: str | None) -> None:
    calibration, heldout = (documents(spec, split=side, revision="main") for side in SIDES)
    assert hub == [{"path": "owner/some.name-1", "name": config, "split": "train", "streaming": True, "revision": "main"}] * 2
    assert sorted(calibration + heldout) == sorted(f" train {i} \n" for i in range(30))
    assert heldout
    assert all(map(is_heldout, heldout))
    assert not any(map(is_heldout, calibration))


@pytest.mark.parametrize("spec", ["c4", "wikitext2", "owner/name"])
def test_without_datasets_opening_fails_at_once(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BackendError, match=rf"^{spec}: expected the library datasets, got .*pip install 'proxsparse-triton\[data\]'"):
        open_source(spec)


@pytest.mark.parametrize("spec", ["c4", "wikitext2", "owner/name"])
def test_offline_each_says_so_in_one_line(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("datasets")

    def load(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError(f"Couldn't reach '{args[0]}' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr(library, "load_dataset", load)
    said = refused(spec)
    assert said.startswith(f"{spec}: expected an answer of the Hub, got none: it could not be reached (")
    assert said.endswith("works offline.")


@pytest.mark.parametrize("spec", ["stdlib", str(DATA)])
def test_local_text_has_no_revision(spec: str) -> None:
    with pytest.raises(ConfigError, match=r"open_source: expected no revision for .*, got 'v1'\. Only Hub datasets have revisions\."):
        open_source(spec, revision="v1")


def test_local_text_needs_no_heavy_library() -> None:
    """`datasets`, `transformers` and pyarrow are imported by those sources only that need them."""
    code = (
        "import sys; from proxsparse_triton.calibration import sources, windows; next(sources.open_source(sys.argv[1]).documents()); "
        "print(sorted({'datasets', 'transformers', 'pyarrow', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(DATA / "heldout.jsonl.gz")],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.strip() == "[]"


def test_a_field_is_refused_where_there_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "a.py").write_text("a = 1")
    for spec in ("stdlib", "c4", "wikitext2", str(tmp_path / "plain" / "a.py"), str(tmp_path / "plain")):
        with pytest.raises(ConfigError) as caught:
            open_source(spec, column=Column("foo", field_option="--eval-text-field"))
        assert str(caught.value) == (
            f"{spec}: expected --eval-text-field with rows of JSON lines, a table or a Hub dataset, got 'foo'. Leave it out."
        )
    (tmp_path / "plain" / "b.jsonl").write_text('{"foo": "x"}\n')
    assert sorted(documents(tmp_path / "plain", column=Column("foo"))) == ["a = 1", "x"]
