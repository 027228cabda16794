"""Where text comes from: named corpora, Hub datasets, local files and folders, the Python standard library.

A source is a name and a function that starts reading its documents. Each has a calibration side and a held-out side
that never share a document: the corpus's own splits where it has them, otherwise a split by the hash of the text.
"""

from __future__ import annotations

import hashlib
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal, get_args

from ..errors import ConfigError, DataError, ShortTextError
from .files import ACCEPTED_FILES, SUFFIXES, decode, read_documents, require, suffix_of, text_files, walk
from .hub import ACCEPTED, HubText, hub_documents

Split = Literal["calibration", "heldout", "all"]
BUILT_IN = ("c4", "wikitext2", "stdlib")
HUB_ID = re.compile(r"(?P<dataset>[\w.-]+/[\w.-]+)(?::(?P<config>[^:]+))?")


@dataclass(frozen=True)
class TextSource:
    """A named text that can be read as often as needed: `documents()` starts from the beginning each time."""

    name: str
    documents: Callable[[], Iterator[str]]
    joiner: str | None = None  # documents form one text joined by this; None: each is preceded by a separator token


def document_digest(text: str) -> str:
    """The identity of a document: SHA-256 of its UTF-8 bytes, 64 hex digits."""
    # surrogatepass changes nothing for valid text and keeps a digest total for a caller's own strings.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def is_heldout(text: str) -> bool:
    """Whether a document belongs to the held-out tenth. Depends on its text alone, so identical documents stay together."""
    return int(document_digest(text)[:8], 16) % 10 == 0


def open_source(spec: str, *, split: Split = "all", text_field: str = "text", revision: str | None = None) -> TextSource:
    """Find the text that `spec` names. Files are opened and the Hub is asked only when the documents are read.

    Args:
        spec: `c4`, `wikitext2`, `stdlib`; a Hub dataset id with a `/`, optionally `owner/name:config`; or a local .txt, .md,
            .py (one document each), .jsonl, .jsonl.gz, .parquet file (one a line or row) or a folder of such files. What
            begins with `./`, `../`, `/` or `~`, or names an existing path, is local.
        split: `calibration` and `heldout` never share a document; `all` is both.
        text_field: the field or column that holds the text.
        revision: commit, branch or tag of a Hub dataset.
    Returns: documents in the order of the file or the Hub. A folder and `stdlib` are read whole into memory and ordered by
        document digest: in alphabetical order the first windows would all be of one topic.
    Raises: ConfigError: unknown split, or a revision for text that is not on the Hub. DataError: no such source, an unknown
        kind of file, a folder without text; while reading, what `files` and `hub` say, and a side without any text.
        BackendError: `datasets` (with pyarrow) is missing and needed.
    """
    if split not in get_args(Split):
        raise ConfigError(f"open_source: expected split to be calibration, heldout or all, got {split!r}. Choose one of them.")
    kind = _kind_of(spec)
    if revision is not None and kind in ("stdlib", "local"):
        raise ConfigError(f"open_source: expected no revision for {spec!r}, got {revision!r}. Only Hub datasets have revisions.")
    name = spec if split == "all" else f"{spec} ({split})"
    if kind in ("c4", "wikitext2"):
        return _named_corpus(kind, name, split, text_field, revision)

    read = _reader(kind, spec, text_field, revision)
    return TextSource(name, lambda: _one_side(read(), spec, split))


def _reader(kind: str, spec: str, text_field: str, revision: str | None) -> Callable[[], Iterator[str]]:
    """The function that reads every document, whatever its side; all that can be checked without reading is checked here."""
    if kind == "hub":
        found = HUB_ID.fullmatch(spec)
        if found is None:  # _kind_of has matched it
            raise DataError(_absent(spec))
        require("datasets", spec)
        text = HubText(spec, found["dataset"], "train", config=found["config"], revision=revision)
        return partial(hub_documents, text, text_field)
    if kind == "stdlib":
        return _stdlib_documents
    return _local_reader(spec, text_field)


def _kind_of(spec: str) -> str:
    """One of c4, wikitext2, stdlib, local, hub."""
    explicit = spec.startswith(("./", "../", "/", "~")) or spec in (".", "..")
    exists = bool(spec) and os.path.exists(os.path.expanduser(spec))
    if spec in BUILT_IN:
        if exists:
            raise DataError(
                f"{spec}: expected one meaning, got two: the built-in source and the path ./{spec}. "
                f"Write ./{spec} for the path, or run in another folder for the built-in source."
            )
        return spec
    if explicit or exists:
        return "local"
    # A missing file such as texts/a.jsonl looks like a Hub id; asking the Hub for it would hide the typing error.
    if HUB_ID.fullmatch(spec) and suffix_of(spec) is None:
        return "hub"
    raise DataError(_absent(spec))


def _absent(spec: str) -> str:
    return f"{spec!r}: expected a source of text, got a name that is no existing path and no built-in source or Hub id. {ACCEPTED}"


def _named_corpus(kind: str, name: str, split: Split, text_field: str, revision: str | None) -> TextSource:
    """C4 and WikiText-2 with their own splits, read as the pruning papers read them."""
    require("datasets", kind)
    if kind == "c4":
        files = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}
        sides = [HubText(kind, "allenai/c4", side, data_file=file, revision=revision) for side, file in files.items()]
    else:
        # Not streamed: 5 MB, and once in the cache it needs no network.
        sides = [
            HubText(kind, "Salesforce/wikitext", side, config="wikitext-2-raw-v1", revision=revision, streaming=False)
            for side in ("train", "test")
        ]
    chosen = {"calibration": sides[:1], "heldout": sides[1:], "all": sides}[split]
    joiner = "\n\n" if kind == "wikitext2" else None

    def documents() -> Iterator[str]:
        rows = chain.from_iterable(hub_documents(side, text_field) for side in chosen)
        return _one_side(rows, kind, "all", keep_blank=joiner is not None)

    return TextSource(name, documents, joiner)


def _local_reader(spec: str, text_field: str) -> Callable[[], Iterator[str]]:
    path = Path(os.path.expanduser(spec))
    if path.is_dir():
        files = text_files(path)
        if not files:
            raise DataError(f"{spec}: expected a folder with {ACCEPTED_FILES} files, got none below it. Convert its text to one of these.")
        _require_parquet(files, spec)
        return lambda: _shuffled(chain.from_iterable(read_documents(file, text_field) for file in files))
    if not path.exists():
        raise DataError(f"{spec}: expected a file or folder, got a path that does not exist. {ACCEPTED}")
    if not path.is_file():
        raise DataError(f"{spec}: expected a regular file or a folder, got something else. Copy the text into a file.")
    if suffix_of(path.name) is None:
        raise DataError(f"{spec}: expected a file ending in {ACCEPTED_FILES}, got {path.name!r}. Rename or convert it.")
    _require_parquet([path], spec)
    return partial(read_documents, path, text_field)


def _require_parquet(files: list[Path], spec: str) -> None:
    if any(suffix_of(file.name) == SUFFIXES[-1] for file in files):
        require("pyarrow.parquet", spec)


def _stdlib_documents() -> Iterator[str]:
    """Every module of the running interpreter's library. Its tests hold files in other encodings on purpose: left out."""
    left_out = {"site-packages", "dist-packages", "__pycache__"}
    texts = []
    for path in walk(Path(sysconfig.get_path("stdlib")), left_out.__contains__):
        if path.suffix != ".py":
            continue
        try:
            texts.append(decode(path.read_bytes()))
        except UnicodeDecodeError:
            continue
        except OSError as error:
            raise DataError(f"stdlib: expected a readable file, got {error.strerror} for {path}. Check its permissions.") from error
    return _shuffled(iter(texts))


def _shuffled(documents: Iterator[str]) -> Iterator[str]:
    """The order of the digests: fixed, the same on every file system, and without topics."""
    return iter(sorted(documents, key=document_digest))


def _one_side(documents: Iterator[str], spec: str, split: Split, *, keep_blank: bool = False) -> Iterator[str]:
    """The documents of one side of the split by content, without blank ones (joined texts keep them: they are line breaks).

    Raises: DataError: at the end, if there was no text at all or none on this side.
    """
    seen = given = 0
    for text in documents:
        if not text.strip():
            if keep_blank:
                yield text
            continue
        seen += 1
        if split == "all" or is_heldout(text) == (split == "heldout"):
            given += 1
            yield text
    if not seen:
        raise DataError(f"{spec}: expected text, got no document that is not blank. Give a source that has text.")
    if not given:
        raise ShortTextError(
            f"{spec}: expected documents on the {split} side, got none of {seen} (each falls on one side whole, by its content; one in ten "
            "is held out). Give more documents, or a second text for evaluation and use all of both."
        )
