"""Long documents: read in pieces whose tokens are those of the whole, split with a gap, and never held whole."""

from __future__ import annotations

import gzip
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from bos import loaded

from proxsparse_triton.calibration import files
from proxsparse_triton.calibration.documents import DOCUMENT_BYTES, PIECE, document_digest, pieces_of
from proxsparse_triton.calibration.files import FileText
from proxsparse_triton.calibration.sources import TextSource, open_source
from proxsparse_triton.calibration.windows import calibration_windows, evaluation_windows
from proxsparse_triton.errors import DataError

ASSET = Path(__file__).parents[2] / "proxsparse_triton" / "assets" / "pylm-2m"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return loaded(ASSET)


def long_text(characters: int, seed: int = 0) -> str:
    """Words, indentation, blank lines and some signs of two and four bytes."""
    r = random.Random(seed)
    words = ("def", "x", "return", "näive", "12345", "self.value", "if", "🙂", "  ", "\n\n\n", "\n        ", ",", "(", ")", "\n")
    parts = [r.choice(words) for _ in range(characters // 4)]
    return " ".join(parts)[:characters]


@pytest.mark.parametrize("joiner", [None, "\n\n"])
def test_a_long_document_has_the_tokens_of_the_whole(tokenizer: Any, joiner: str | None) -> None:
    text = long_text(3 * PIECE)
    windows, _ = evaluation_windows(TextSource("long", lambda: iter([text]), joiner), tokenizer, windows=None, seqlen=64)
    whole = ([] if joiner else [0]) + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert torch.cat(windows.tokens).tolist() == whole[: len(windows.tokens) * 64]
    assert len(whole) - len(windows.tokens) * 64 < 64
    assert windows.documents == 1


@pytest.mark.parametrize(
    "text", [long_text(4 * PIECE), "x" * 3 * PIECE, "\n" * 3 * PIECE, "a b " * PIECE], ids=["code", "line", "blank", "words"]
)
def test_pieces_are_the_text_and_do_not_depend_on_its_blocks(text: str) -> None:
    pieces = list(pieces_of([text]))
    assert "".join(pieces) == text
    assert all(PIECE // 2 <= len(piece) <= PIECE for piece in pieces[:-1])
    assert list(pieces_of(text[i : i + 1000] for i in range(0, len(text), 1000))) == pieces


def test_a_digest_is_that_of_the_text_or_of_its_first_16_mib(tmp_path: Path) -> None:
    text = "ä line\n" * (DOCUMENT_BYTES // 7)
    (tmp_path / "a.txt").write_bytes(text.encode().replace(b"\n", b"\r\n"))
    assert document_digest(FileText(tmp_path / "a.txt")) == document_digest(text) == document_digest(text + "more")


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_long_file_is_read_in_blocks(tmp_path: Path, name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = long_text(300_000)
    raw = b"\xef\xbb\xbf" + text.encode().replace(b"\n", b"\r\n")
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    held = [str(document) for document in open_source(str(tmp_path / name)).documents()]
    assert held == [text]
    one = calibration_windows(open_source(str(tmp_path / name)), tokenizer, samples=4, seqlen=64)
    monkeypatch.setattr(files, "DOCUMENT_BYTES", 1000)
    (document,) = open_source(str(tmp_path / name)).documents()
    assert isinstance(document, FileText)
    for block in (1, 7, 1000):
        monkeypatch.setattr(files, "BLOCK", block if len(raw) < 10**5 or block > 1 else 3)
        assert "".join(document.blocks()) == text
    other = calibration_windows(open_source(str(tmp_path / name)), tokenizer, samples=4, seqlen=64)
    assert one.fingerprint == other.fingerprint


def test_not_utf8_far_inside_names_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_bytes("ä".encode() * 5000 + b"\xff" + b"x" * 100)
    monkeypatch.setattr(files, "DOCUMENT_BYTES", 1000)
    monkeypatch.setattr(files, "BLOCK", 333)
    (document,) = open_source(str(tmp_path / "a.txt")).documents()
    with pytest.raises(DataError, match="got the byte 0xff at byte offset 10000"):
        list(document.blocks())  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["book.txt", "book.txt.gz"])
@pytest.mark.parametrize("long", [False, True])
def test_the_two_sides_of_one_document_lie_a_window_apart(
    tmp_path: Path, name: str, long: bool, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"{i:06d}\n" for i in range(4000)]
    raw = "".join(lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    if long:
        monkeypatch.setattr(files, "DOCUMENT_BYTES", 1000)
    heldout, used = evaluation_windows(open_source(str(tmp_path / name), split="heldout"), tokenizer, windows=None, seqlen=64)
    every = len(evaluation_windows(open_source(str(tmp_path / name), split="calibration"), tokenizer, windows=None, seqlen=64)[0].tokens)
    source = open_source(str(tmp_path / name), split="calibration")
    drawn = calibration_windows(source, tokenizer, samples=every, seqlen=64, exclude=used)

    def numbers(windows: Any) -> set[int]:
        found = (tokenizer.decode(window).replace("<|endoftext|>", "").split("\n")[1:-1] for window in windows.tokens)
        return {int(number) for window in found for number in window if len(number) == 6}

    gap = len(tokenizer("".join(lines[3000:3010]), add_special_tokens=False)["input_ids"]) / 10  # tokens of a line
    assert min(numbers(heldout)) - max(numbers(drawn)) >= 64 / gap - 1
    assert max(numbers(heldout)) > 3980
    assert min(numbers(drawn)) < 20


def test_little_text_of_a_large_file_takes_little_memory(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "big.txt"
    with path.open("w") as file:
        for i in range(60):
            file.write(long_text(500_000, seed=i % 3))
    tracemalloc.start()
    windows = calibration_windows(open_source(str(path), split="calibration"), tokenizer, samples=4, seqlen=64)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(windows.tokens) == 4
    assert peak < 60e6, "the file has 30 MB, and its tokens would take ten times that"


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz"])
def test_a_line_without_end_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    with gzip.open(tmp_path / name, "wb", compresslevel=1) as file:
        file.write(b'{"text": "')
        for _ in range(20):
            file.write(b"a" * 10**6)
    with pytest.raises(DataError, match="line 1: expected documents of at most 16 MiB, got a longer one"):
        list(open_source(str(tmp_path / name)).documents())


def test_an_array_without_end_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'[{"text": "a"}, {"text": "' + b"a" * (DOCUMENT_BYTES + 10**6))
    with pytest.raises(DataError, match="element 2: expected documents of at most 16 MiB, got a longer one"):
        list(open_source(str(tmp_path / "a.json")).documents())


def test_what_unpacks_to_too_much_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": ["a" * 500_000] * 1024}), tmp_path / "a.parquet", compression="zstd")
    with gzip.open(tmp_path / "a.txt.gz", "wb") as file:
        for _ in range(90):
            file.write(b"a" * 10**6)
    for name in ("a.parquet", "a.txt.gz"):
        with pytest.raises(DataError, match="expected text, which unpacks to less than 200 times its size, got"):
            evaluation_windows(open_source(str(tmp_path / name), split="heldout"), tokenizer, windows=2, seqlen=64)
