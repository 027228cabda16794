"""Documents to token ids, a piece at a time; and what stands in front of a window."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ..errors import ConfigError
from .documents import PIECE, Clean, Document, Tail, blocks_of, context_of, document_digest, is_blank, pieces_of
from .sources import TextSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Bos = Literal["auto", "always", "never"]
CHUNK_DOCUMENTS = 64
T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """Token ids of one stretch of text."""

    ids: Sequence[int]
    digests: Sequence[str]  # of the documents that begin in it
    goes_on: bool = False  # it continues the document of the piece before
    skip: int = 0  # leave out so many tokens from here on


def window_prefix(tokenizer: PreTrainedTokenizerBase, bos: Bos) -> tuple[int, ...]:
    """The special tokens in front of every window: with `auto` those that the tokenizer puts before any text, most often a BOS or none.

    A model that has seen nothing without a BOS is broken on a window without one. `always`: the BOS where the tokenizer has one and
    puts none. `never`: none.

    Raises: ConfigError: `always` and a tokenizer without a BOS.
    """
    own = () if bos == "never" else _own_prefix(tokenizer)
    if own or bos != "always":
        return own
    if tokenizer.bos_token_id is None:
        raise ConfigError(
            f"window_prefix: expected a tokenizer with a BOS token for --bos always, got a {type(tokenizer).__name__} without one. "
            "Use --bos auto or never."
        )
    return (int(tokenizer.bos_token_id),)


def _own_prefix(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The special tokens that `tokenizer` puts before a text."""
    with_special, plain = tokenise(tokenizer, "a"), tokenise(tokenizer, "a", add_special_tokens=False)
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            return tuple(with_special[:start])
    return ()


def tokenise(tokenizer: PreTrainedTokenizerBase, text: str | list[str], **options: Any) -> Any:
    """Token ids only. verbose=False: text longer than the model's context is the point here, not a mistake."""
    return tokenizer(text, return_attention_mask=False, return_token_type_ids=False, verbose=False, **options)["input_ids"]


@dataclass
class Texts:
    """The documents of a source with their digests, without the excluded ones, which it counts."""

    source: TextSource
    exclude: Set[str] = frozenset()
    excluded: int = 0

    def __iter__(self) -> Iterator[tuple[Document, str]]:
        """(document, digest); the digest of a blank text is empty: it is no document and never excluded."""
        for document in self.source.documents():
            digest = "" if is_blank(document) else document_digest(document)
            if digest and digest in self.exclude:
                self.excluded += 1
            elif digest or self.source.joiner is not None:
                yield document, digest

    def stretches(self, clean: Clean) -> Iterator[_Stretch]:
        """Every document that is not blank, in pieces."""
        for document, digest in self:
            context = ""
            for text in pieces_of(blocks_of(document), clean) if digest else ():
                yield _Stretch(text, digest, context, isinstance(document, Tail))
                context = context_of(text)

    def joined(self, seen: list[str]) -> Iterator[str]:
        """The documents as one text, in blocks. `seen` gets their digests."""
        between = ""
        for document, digest in self:
            if digest:
                seen.append(digest)
            yield between
            yield from blocks_of(document)
            between = self.source.joiner or ""


@dataclass(frozen=True)
class _Stretch:
    """A piece of a document, behind the text before it; none in front of the document's first."""

    text: str
    digest: str
    context: str
    tail: bool  # of a document of which the beginning calibrates


def packed_pieces(texts: Texts, tokenizer: PreTrainedTokenizerBase, prefix: tuple[int, ...], seqlen: int) -> Iterator[Piece]:
    """Documents one after the other, each led by the separator; or one text where the source joins its documents.

    Tokens are those of each document as a whole, though a long one is tokenised in pieces.
    """
    if texts.source.joiner is not None:
        yield from _joined_pieces(texts, tokenizer, prefix)
        return
    separator = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    lead = [] if separator is None else [separator]
    for chunk in _chunks(texts.stretches(_clean(tokenizer)), lambda stretch: len(stretch.text)):
        for stretch, ids in zip(chunk, _ids(tokenizer, chunk), strict=True):
            if stretch.context:
                yield Piece(ids, (), goes_on=True)
            elif stretch.tail:  # from the middle of a document, so nothing is put before it; and a window of it is left out
                yield Piece(ids, (stretch.digest,), skip=seqlen)
            else:  # a chat template may have put the separator there
                yield Piece(ids if lead and ids[:1] == lead else lead + ids, (stretch.digest,))


def _joined_pieces(texts: Texts, tokenizer: PreTrainedTokenizerBase, prefix: tuple[int, ...]) -> Iterator[Piece]:
    """One text with the tokenizer's special tokens at its start only, as the papers do; where every window has them, there too."""
    lead = list(prefix or _own_prefix(tokenizer))
    seen: list[str] = []
    context = ""
    for text in pieces_of(texts.joined(seen), _clean(tokenizer)):
        (ids,) = _ids(tokenizer, [_Stretch(text, "", context, False)])
        yield Piece([*lead, *ids], tuple(seen))
        seen.clear()
        lead, context = [], context_of(text)


def _chunks(items: Iterator[T], length: Callable[[T], int]) -> Iterator[list[T]]:
    """Lists worth one call of the tokenizer, small enough that stopping early wastes little."""
    chunk: list[T] = []
    characters = 0
    for item in items:
        if chunk and (len(chunk) == CHUNK_DOCUMENTS or characters + length(item) > PIECE):
            yield chunk
            chunk, characters = [], 0
        chunk.append(item)
        characters += length(item)
    if chunk:
        yield chunk


def _clean(tokenizer: PreTrainedTokenizerBase) -> Clean:
    """Whether no token of a text would go through a cut, nor depend on what is behind it."""

    def clean(before: str, after: str) -> bool:
        ids = tokenise(tokenizer, before, add_special_tokens=False)
        return bool(tokenise(tokenizer, before + after, add_special_tokens=False)[: len(ids)] == ids)

    return clean


def _ids(tokenizer: PreTrainedTokenizerBase, chunk: Sequence[_Stretch]) -> list[list[int]]:
    """The ids of each stretch without special tokens, as they are in the middle of its document."""
    found: list[list[int]] = tokenise(tokenizer, [stretch.context + stretch.text for stretch in chunk], add_special_tokens=False)
    for index, stretch in enumerate(chunk):
        if stretch.context:
            before = tokenise(tokenizer, stretch.context, add_special_tokens=False)
            if found[index][: len(before)] == before:
                found[index] = found[index][len(before) :]
            else:  # no place was clean: the text goes on with a token of its own
                found[index] = tokenise(tokenizer, stretch.text, add_special_tokens=False)
    return found


def document_pieces(texts: Texts, tokenizer: PreTrainedTokenizerBase, prefix: tuple[int, ...], seqlen: int, bos: Bos) -> Iterator[Piece]:
    """One piece a document, cut at `seqlen`: with the tokenizer's own special tokens, but for those in front, which `bos` decides."""
    own = _own_prefix(tokenizer)
    more = list(prefix) if prefix != own else []  # of --bos always
    starts = (_Start.of(document, digest, max(PIECE // 2, seqlen)) for document, digest in texts if digest)
    for chunk in _chunks(starts, lambda start: len(start.text)):
        limit = seqlen - len(more) + (len(own) if bos == "never" else 0)
        batch = tokenise(tokenizer, [start.text for start in chunk], truncation=True, max_length=limit)
        for start, ids in zip(chunk, batch, strict=True):
            while len(ids) < limit and start.goes_on:
                start = _Start.of(start.document, start.digest, 4 * len(start.text))  # noqa: PLW2901
                ids = tokenise(tokenizer, start.text, truncation=True, max_length=limit)  # noqa: PLW2901
            front = list(own)
            if front and ids[: 2 * len(own)] == 2 * front:  # a chat template has put it there too
                ids = tokenise(tokenizer, start.text, add_special_tokens=False, truncation=True, max_length=limit)  # noqa: PLW2901
            if bos == "never" and front and ids[: len(own)] == front:
                ids = ids[len(own) :]  # noqa: PLW2901
            if more and ids[: len(more)] != more:
                ids = [*more, *ids]  # noqa: PLW2901
            yield Piece(ids[:seqlen], (start.digest,))


@dataclass(frozen=True)
class _Start:
    """The first characters of a document, at least as many as asked for where it has them."""

    document: Document
    digest: str
    text: str
    goes_on: bool

    @classmethod
    def of(cls, document: Document, digest: str, least: int) -> _Start:
        pieces, parts, length = pieces_of(blocks_of(document)), [], 0
        for piece in pieces:
            parts.append(piece)
            length += len(piece)
            if length >= least:
                break
        return cls(document, digest, "".join(parts), next(pieces, None) is not None)
