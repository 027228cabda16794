"""Where text comes from: named corpora, Hub datasets, local files and folders, the Python standard library.

A source is a name and a function that starts reading its documents. Each has a calibration side and a held-out side
that never share a document: the corpus's own splits where it has them, otherwise a split by the hash of the text. A source of
one document is split inside it: its last tenth is held out.
"""

from __future__ import annotations

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
from .documents import Document, Tail, document_digest, is_blank, is_heldout, side_of_one
from .files import ACCEPTED_FILES, BINARY, PLAIN, decode, require, suffix_of
from .folders import is_plain, open_folder, walk
from .hub import ACCEPTED, HubText, hub_documents
from .readers import read_documents
from .rows import Chat, RowText, Tally

Split = Literal["calibration", "heldout", "all"]
BUILT_IN = ("c4", "wikitext2", "stdlib")
STREAM_WINDOWS = 256  # to measure on of a corpus that has no natural end, c4 or a Hub dataset; every other source is read whole
HUB_ID = re.compile(r"(?P<dataset>[\w.-]+/[\w.-]+)(?::(?P<config>[^:]+))?")


@dataclass(frozen=True)
class TextSource:
    """A named text that can be read as often as needed: `documents()` starts from the beginning each time."""

    name: str
    documents: Callable[[], Iterator[Document]]
    joiner: str | None = None  # documents form one text joined by this; None: each is preceded by a separator token
    notes: tuple[str, ...] = ()  # what the user should know of it before it is read
    tally: Tally | None = None  # rows left out in the last reading


@dataclass(frozen=True)
class Column:
    """Which rows of a source are text, and where in a row it stands; the options that a user sets these with, for messages.

    split: of a Hub dataset; None: `train`. field: None: `text`, else messages (`rows` has the order).
    """

    field: str | None = None
    split: str | None = None
    field_option: str = "--text-field"
    split_option: str = "--split"


def is_local(spec: str) -> bool:
    """True for a file or folder, False for a built-in text or a Hub dataset."""
    return spec not in BUILT_IN and os.path.exists(os.path.expanduser(spec))


def has_rows(spec: str) -> bool:
    """Whether a field may be named: a Hub dataset, a file of rows, a folder with one. DataError: no such source."""
    kind = _kind_of(spec)
    if kind != "local":
        return kind == "hub"
    path = Path(os.path.expanduser(spec))
    return not (is_plain(path) if path.is_dir() else suffix_of(path.name) in PLAIN)


def open_source(
    spec: str,
    *,
    split: Split = "all",
    column: Column | None = None,
    chat: Chat | None = None,
    revision: str | None = None,
) -> TextSource:
    """Find the text that `spec` names. Files are opened and the Hub is asked only when the documents are read.

    Args:
        spec: `c4`, `wikitext2`, `stdlib`; a Hub dataset id with a `/`, optionally `owner/name:config`; or a local .txt, .md,
            .py (one document each), .jsonl, .json, .csv (all of these also .gz), .parquet, .arrow file (one a row) or a folder of
            such files. What begins with `./`, `../`, `/` or `~`, or names an existing path, is local.
        split: `calibration` and `heldout` never share a document; `all` is both. A source of a single document is split inside it.
        column: where a row has its text, and which split of a Hub dataset is read; c4 and wikitext2 have their own.
        chat: turns messages into text (`chat.chat_of`); None: rows of messages are refused.
        revision: commit, branch or tag of a Hub dataset.
    Returns: documents in the order of the file or the Hub. A folder and `stdlib` are ordered by document digest: in alphabetical
        order the first windows would all be of one topic.
    Raises: ConfigError: unknown split, or a revision, Hub split or field for text that has none. DataError: no such source, an unknown
        kind of file, a folder without text; while reading, what `readers` and `hub` say, and a side without any text.
        BackendError: `datasets` (with pyarrow) is missing and needed.
    """
    if split not in get_args(Split):
        raise ConfigError(f"open_source: expected split to be calibration, heldout or all, got {split!r}. Choose one of them.")
    column = column or Column()
    kind = _kind_of(spec)
    if revision is not None and kind in ("stdlib", "local"):
        raise ConfigError(f"open_source: expected no revision for {spec!r}, got {revision!r}. Only Hub datasets have revisions.")
    if column.split is not None and kind != "hub":
        raise ConfigError(
            f"{spec}: expected {column.split_option} with a Hub dataset (owner/name), got {column.split!r}. Leave the option out."
        )
    if column.field is not None and not has_rows(spec):
        raise ConfigError(
            f"{spec}: expected {column.field_option} with rows of JSON lines, a table or a Hub dataset, got {column.field!r}. Leave it out."
        )
    name = spec if split == "all" else f"{spec} ({split})"
    if kind in ("c4", "wikitext2"):
        return _named_corpus(kind, name, split, revision)

    rows = RowText(column.field, column.field_option, chat)
    read, notes = _reader(kind, spec, column, rows, revision)

    def documents() -> Iterator[Document]:
        rows.tally.clear()
        return _one_side(read(), spec, split)

    return TextSource(name, documents, notes=notes, tally=rows.tally)


def _reader(
    kind: str, spec: str, column: Column, rows: RowText, revision: str | None
) -> tuple[Callable[[], Iterator[Document]], tuple[str, ...]]:
    """What reads every document, whatever its side, and notes; all that can be checked without reading is checked here."""
    if kind == "hub":
        found = HUB_ID.fullmatch(spec)
        if found is None:  # _kind_of has matched it
            raise DataError(_absent(spec))
        require("datasets", spec)
        text = HubText(
            spec, found["dataset"], column.split or "train", config=found["config"], revision=revision, split_option=column.split_option
        )
        return partial(hub_documents, text, rows), ()
    if kind == "stdlib":
        return _stdlib_documents, ()
    return _local_reader(spec, rows)


def _kind_of(spec: str) -> str:
    """One of c4, wikitext2, stdlib, local, hub."""
    try:
        spec.encode()
    except UnicodeEncodeError:  # it could not be recorded once the work is done
        raise DataError(f"{spec!a}: expected a name in UTF-8, got other bytes. Rename the file or folder.") from None
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


def _named_corpus(kind: str, name: str, split: Split, revision: str | None) -> TextSource:
    """C4 and WikiText-2 with their own splits and their own field, read as the pruning papers read them."""
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

    def documents() -> Iterator[Document]:
        texts = chain.from_iterable(hub_documents(side, RowText("text")) for side in chosen)
        return _one_side(texts, kind, "all", keep_blank=joiner is not None)

    return TextSource(name, documents, joiner)


def _local_reader(spec: str, rows: RowText) -> tuple[Callable[[], Iterator[Document]], tuple[str, ...]]:
    path = Path(os.path.expanduser(spec))
    if path.is_dir():
        folder = open_folder(path, rows)
        _require_pyarrow(folder.files, spec)
        return partial(folder.documents, rows), tuple(filter(None, [folder.note()]))
    if not path.exists():
        raise DataError(f"{spec}: expected a file or folder, got a path that does not exist. {ACCEPTED}")
    if not path.is_file():
        raise DataError(f"{spec}: expected a regular file or a folder, got something else. Copy the text into a file.")
    if suffix_of(path.name) is None:
        raise DataError(f"{spec}: expected a file ending in {ACCEPTED_FILES}, got {path.name!r}. Rename or convert it.")
    _require_pyarrow((path,), spec)
    return partial(read_documents, path, rows), ()


def _require_pyarrow(files: tuple[Path, ...], spec: str) -> None:
    if any(suffix_of(file.name) in BINARY for file in files):
        require("pyarrow.parquet", spec)


def _stdlib_documents() -> Iterator[Document]:
    """Every module of the running interpreter's library. Its tests hold files in other encodings on purpose: left out."""
    left_out = {"site-packages", "dist-packages", "__pycache__"}
    texts = []
    for path in walk(Path(sysconfig.get_path("stdlib")), left_out.__contains__):
        if path.suffix != ".py" or not path.is_file():
            continue
        try:
            texts.append(decode(path.read_bytes()))
        except UnicodeDecodeError:
            continue
        except OSError as error:
            raise DataError(f"stdlib: expected a readable file, got {error.strerror} for {path}. Check its permissions.") from error
    return _shuffled(iter(texts))


def _shuffled(documents: Iterator[str]) -> Iterator[Document]:
    """The order of the digests: fixed, the same on every file system, and without topics."""
    return iter(sorted(documents, key=document_digest))


def _one_side(documents: Iterator[Document], spec: str, split: Split, *, keep_blank: bool = False) -> Iterator[Document]:
    """The documents of one side of the split by content, without blank ones (joined texts keep them: they are line breaks).

    Raises: DataError: at the end, if there was no text at all or none on this side.
    """
    first = second = None
    if split != "all":  # a single document has both sides in it
        texts = (document for document in documents if not is_blank(document))
        first, second = next(texts, None), next(texts, None)
        if first is not None and second is None and not isinstance(first, Tail):
            yield side_of_one(first, heldout=split == "heldout")
            return
        documents = chain((document for document in (first, second) if document is not None), texts)
    seen = given = 0
    for document in documents:
        if is_blank(document):
            if keep_blank:
                yield document
            continue
        seen += 1
        if split == "all" or is_heldout(document) == (split == "heldout"):
            given += 1
            yield document
    if not seen:
        raise DataError(f"{spec}: expected text, got no document that is not blank. Give a source that has text.")
    if not given:
        raise ShortTextError(
            f"{spec}: expected documents on the {split} side, got none of {seen} (each falls on one side whole, by its content; one in ten "
            "is held out). Give more documents, or a second text for evaluation and use all of both."
        )
