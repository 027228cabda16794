"""Text from the Hugging Face Hub through `datasets`, which is imported on first use."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..errors import DataError
from .files import ACCEPTED_FILES, first_line, require
from .rows import RowText

ACCEPTED = (
    "Accepted are c4, wikitext2, stdlib, a Hub dataset id (owner/name or owner/name:config), "
    f"a local {ACCEPTED_FILES} file, and a folder of such files."
)


@dataclass(frozen=True)
class HubText:
    """One split of one Hub dataset."""

    spec: str  # what the user typed, for messages
    dataset: str
    split: str
    config: str | None = None
    data_file: str | None = None  # read only this file of the repository as the split
    revision: str | None = None
    streaming: bool = True
    split_option: str = "--split"  # what the user names the split with


def hub_documents(text: HubText, rows: RowText) -> Iterator[str]:
    """The texts of one split in the order of the Hub. Nothing is fetched before the first one is asked for.

    Raises: BackendError: `datasets` is missing. DataError: no network, no such dataset, config, split (with those there are) or field.
    """
    library = require("datasets", text.spec)
    optional = {"data_files": {text.split: text.data_file}} if text.data_file else {}
    with _explained(text), _quiet():
        dataset = library.load_dataset(
            text.dataset, text.config, split=text.split, streaming=text.streaming, revision=text.revision, **optional
        )
        found = iter(dataset)
    number = 0
    while True:
        with _explained(text):
            row = next(found, None)
        if row is None:
            return
        number += 1
        yield rows.of(row, f"{text.spec}, {text.split} row {number}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Holds back the Hub client's report of each retry: the one line that counts is the error raised in the end."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _explained(text: HubText) -> Iterator[None]:
    """Turns whatever the Hub's libraries raise into a DataError; they promise no common base class."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise _explain(error, text) from error


def _explain(error: Exception, text: HubText) -> DataError:
    names = {kind.__name__ for kind in type(error).__mro__}
    splits = _splits(text) if "split" in str(error).lower() else []
    if splits and text.split not in splits:
        return DataError(
            f"{text.spec}: expected the split {text.split!r}, got a dataset with the splits {', '.join(map(repr, splits))}. "
            f"Name one with {text.split_option}."
        )
    if "DatasetNotFoundError" in names:
        return DataError(
            f"{text.spec}: expected a source of text, got a name that is no path here and no open dataset on the Hub "
            f"({first_line(error)}). {ACCEPTED}"
        )
    if _is_connection(error):
        return DataError(
            f"{text.spec}: expected an answer of the Hub, got none: it could not be reached ({first_line(error)}), and no local path "
            f"has this name. Check the network; local text (a {ACCEPTED_FILES} file, a folder, or stdlib) works offline."
        )
    return DataError(
        f"{text.spec}: expected a readable dataset on the Hub, got {type(error).__name__}: {first_line(error)}. "
        "Check the id, the config (owner/name:config) and the revision."
    )


def _splits(text: HubText) -> list[str]:
    """The splits that a dataset has; none where the Hub does not say."""
    library = require("datasets", text.spec)
    try:
        with _quiet():
            return sorted(library.load_dataset(text.dataset, text.config, streaming=True, revision=text.revision))
    except Exception:  # the first error is the one that is told
        return []


def _is_connection(error: BaseException | None) -> bool:
    """Whether the network failed, told by the chain of causes: HTTP clients differ between versions, their names hardly."""
    for _ in range(10):
        if error is None:
            return False
        names = {kind.__name__ for kind in type(error).__mro__}
        if isinstance(error, ConnectionError | TimeoutError) or names & {
            "TransportError",
            "ClientConnectionError",
            "LocalEntryNotFoundError",
        }:
            return True
        error = error.__cause__ or error.__context__
    return False
