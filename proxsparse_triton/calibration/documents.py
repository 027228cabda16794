"""A document: a string, or a text too long to hold, which is read a piece at a time. Its identity, its pieces, its two sides."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

DOCUMENT_BYTES = 2**24  # of UTF-8: the longest text that is held in memory, and the longest row that is taken
PIECE = 2**18  # characters given to a tokenizer at once: it needs some hundred bytes for each
HELDOUT_SHARE = 0.1
# Where a text is cut, best first: at line breaks, then between words. Each is searched in the second half of a piece.
_CUTS = tuple(map(re.compile, (r"\S\n(?=\S)", r"\n(?=\S)", r"\n", r"\S(?= )", r"\s(?= \S)")))
_TRIES = 8  # of each kind
_CONTEXT = 200  # characters on either side of a cut that decide how the text is tokenised there

Clean = Callable[[str, str], bool]  # whether a text may be cut between two strings without changing its tokens


class LongText(Protocol):
    """A text that is read anew from its start each time its blocks are asked for."""

    def blocks(self) -> Iterator[str]:
        """The text in order, in strings of any length."""

    def halves(self, share: float) -> tuple[LongText, LongText]:
        """The text up to a line break near `share` of it, and the rest."""


@dataclass(frozen=True)
class Tail:
    """The held-out end of a document whose beginning calibrates: one window of it is left out, as a gap between the two."""

    text: str | LongText


Document = str | LongText | Tail


def text_of_document(document: Document) -> str | LongText:
    return document.text if isinstance(document, Tail) else document


def blocks_of(document: Document) -> Iterator[str]:
    text = text_of_document(document)
    return iter((text,)) if isinstance(text, str) else text.blocks()


def document_digest(document: Document) -> str:
    """The identity of a document: SHA-256 of its UTF-8 bytes, of the first 2^24 where there are more; 64 hex digits."""
    hashed, room = hashlib.sha256(), DOCUMENT_BYTES
    for block in blocks_of(document):
        # surrogatepass changes nothing for valid text and keeps a digest total for a caller's own strings.
        raw = block[:room].encode("utf-8", "surrogatepass")[:room]
        hashed.update(raw)
        room -= len(raw)
        if not room:
            break
    return hashed.hexdigest()


def is_heldout(document: Document) -> bool:
    """Whether a document belongs to the held-out tenth. Depends on its text alone, so identical documents stay together."""
    return int(document_digest(document)[:8], 16) % 10 == 0


def is_blank(document: Document) -> bool:
    return all(not block or block.isspace() for block in blocks_of(document))


def side_of_one(document: str | LongText, *, heldout: bool) -> Document:
    """One side of a text that is a single document: its last tenth is held out."""
    first, rest = _halves(document) if isinstance(document, str) else document.halves(1 - HELDOUT_SHARE)
    return Tail(rest) if heldout else first


def _halves(text: str) -> tuple[str, str]:
    at = int(len(text) * (1 - HELDOUT_SHARE))
    line = text.find("\n", at, at + len(text) // 20) + 1  # a line break near by, else in the middle of a line
    at = line or at
    return text[:at], text[at:]


def pieces_of(blocks: Iterable[str], clean: Clean = lambda before, after: True) -> Iterator[str]:
    """The same text in strings of about PIECE characters, cut where `clean` holds if there is such a place.

    Where it is cut depends on the text alone, not on its blocks.
    """
    rest = ""
    for block in blocks:
        rest += block
        at = 0
        while len(rest) - at > PIECE + _CONTEXT:
            end = _cut(rest, at, clean)
            yield rest[at:end]
            at = end
        rest = rest[at:]
    if rest:
        yield rest


def _cut(text: str, start: int, clean: Clean) -> int:
    """Where the piece that begins at `start` ends; the text goes on for more than a piece."""
    fallback = 0
    for pattern in _CUTS:
        ends = [match.end() for match in pattern.finditer(text, start + PIECE // 2, start + PIECE)]
        fallback = fallback or max(ends, default=0)
        for end in reversed(ends[-_TRIES:]):
            if clean(context_of(text[start:end]), text[end : end + _CONTEXT]):
                return end
    return fallback or start + PIECE


def context_of(piece: str) -> str:
    """The end of a piece, from the start of a line or word where there is one: what the next piece is tokenised behind."""
    tail = piece[-_CONTEXT:]
    for mark in ("\n", " "):
        at = tail.find(mark, 0, len(tail) - 1)
        if at >= 0:
            return tail[at + 1 :] if mark == "\n" else tail[at:]
    return tail
