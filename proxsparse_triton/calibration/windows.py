"""Documents to token windows: tokenise, pack, draw with a seed, and record a fingerprint of what was drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import ConfigError, ShortTextError
from ..progress import SILENT, Progress, Task
from .sources import TextSource, document_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Mode = Literal["packed", "documents"]
POOL_FACTOR = 5  # windows read for each one drawn: a draw over a longer stretch of text than the first few documents
CHUNK_DOCUMENTS = 64
CHUNK_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Windows:
    """Token windows and where they came from; everything but the tokens goes into a run's record."""

    # Compared by fingerprint: tensors have no single truth value.
    tokens: tuple[Tensor, ...] = field(compare=False, repr=False)  # int64 on the CPU, [seqlen] each; in documents mode 2 to seqlen
    source: str
    seqlen: int
    mode: str
    seed: int  # of the draw; 0 for evaluation, where nothing is drawn
    documents: int  # how many documents have a token in these windows; for joined text, how many were joined
    fingerprint: str  # SHA-256 over the ids as little-endian int64, each window closed by -1


def calibration_windows(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    seqlen: int,
    seed: int = 42,
    mode: Mode = "packed",
    exclude: Set[str] = frozenset(),
    progress: Progress = SILENT,
) -> Windows:
    """Draw `samples` windows at random from the first `5 * samples` of the text.

    Args:
        samples: how many windows, at least 1.
        seqlen: tokens of a window, at least 2.
        seed: of the draw, 0 to 2^63 - 1. The same seed, text and tokenizer give the same windows on every machine.
        mode: `packed`: documents one after the other, each preceded by the BOS (else EOS) token and cut into windows of
            exactly `seqlen`; a source with a joiner is one joined text. `documents`: one document a window with the
            tokenizer's own special tokens, cut at `seqlen`, as the authors of ProxSparse do.
        exclude: digests of documents to leave out: those that are evaluated on.
    Returns: Windows, `samples` tensors.
    Raises: ConfigError: samples, seqlen, seed or mode out of range. ShortTextError: the text is too short. DataError: unreadable.
    """
    _check_count("calibration_windows", "samples", samples, 1)
    _check_count("calibration_windows", "seqlen", seqlen, 2)
    _check_count("calibration_windows", "seed", seed, 0)
    if seed >= 2**63:
        raise ConfigError(f"calibration_windows: expected seed below 2^63, got {seed}. Choose a smaller one.")
    if mode not in get_args(Mode):
        raise ConfigError(f"calibration_windows: expected mode to be packed or documents, got {mode!r}. Choose one of them.")
    pool = _Pool(seqlen=seqlen, limit=POOL_FACTOR * samples)
    texts = _Texts(source, exclude)
    with progress.task("tokenising", total=pool.limit) as task:
        if mode == "packed":
            pool.fill(_packed_pieces(texts, tokenizer), task)
        else:
            pool.fill_whole(_document_pieces(texts, tokenizer, seqlen), task)
    if texts.excluded:
        progress.note(f"Left {texts.excluded} documents of {source.name} out of calibration: they are evaluated on.")
    if len(pool.windows) < samples:
        kind = f"windows of {seqlen} tokens" if mode == "packed" else "documents of two tokens or more"
        left_out = f" ({texts.excluded} documents are left out because they are evaluated on)" if texts.excluded else ""
        raise ShortTextError(
            f"calibration_windows: expected {samples} {kind} from {source.name}, got {len(pool.windows)}{left_out}. "
            f"Lower --samples{' or --seqlen' if mode == 'packed' else ''}, or give more text."
        )
    order = torch.randperm(len(pool.windows), generator=torch.Generator().manual_seed(seed))[:samples].tolist()
    return pool.windows_at(order, source=source.name, mode=mode, seed=seed)


def evaluation_windows(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    windows: int | None,
    seqlen: int,
    progress: Progress = SILENT,
) -> tuple[Windows, frozenset[str]]:
    """The first `windows` packed windows in the order of the source (None: all), and the digests of the documents in them.

    Packing is that of `calibration_windows`; a last incomplete window is dropped. Give the digests to `exclude` there.

    Raises: ConfigError: windows or seqlen out of range. ShortTextError: fewer windows than asked, or not one. DataError: unreadable.
    """
    if windows is not None:
        _check_count("evaluation_windows", "windows", windows, 1)
    _check_count("evaluation_windows", "seqlen", seqlen, 2)
    pool = _Pool(seqlen=seqlen, limit=windows)
    with progress.task("tokenising", total=windows) as task:
        pool.fill(_packed_pieces(_Texts(source), tokenizer), task)
    if len(pool.windows) < (windows or 1):
        asked = "at least one window" if windows is None else f"{windows} windows"
        lower = "--seqlen" if windows is None else "--windows or --seqlen"
        raise ShortTextError(
            f"evaluation_windows: expected {asked} of {seqlen} tokens from {source.name}, got {len(pool.windows)} from "
            f"{pool.total} tokens. Lower {lower}, or give more text."
        )
    every = range(len(pool.windows))
    return pool.windows_at(every, source=source.name, mode="packed", seed=0), frozenset(pool.digests_in(every))


@dataclass
class _Texts:
    """The documents of a source with their digests, without the excluded ones, which it counts."""

    source: TextSource
    exclude: Set[str] = frozenset()
    excluded: int = 0

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """(text, digest); the digest of a blank text is empty: it is no document and never excluded."""
        for text in self.source.documents():
            digest = document_digest(text) if text.strip() else ""
            if digest and digest in self.exclude:
                self.excluded += 1
            elif digest or self.source.joiner is not None:
                yield text, digest

    def chunks(self) -> Iterator[list[tuple[str, str]]]:
        """Lists of documents worth one call of the tokenizer, small enough that stopping early wastes little."""
        chunk: list[tuple[str, str]] = []
        characters = 0
        for text, digest in self:
            if digest:
                chunk.append((text, digest))
                characters += len(text)
            if len(chunk) == CHUNK_DOCUMENTS or characters > CHUNK_CHARACTERS:
                yield chunk
                chunk, characters = [], 0
        if chunk:
            yield chunk


# The token ids of one stretch of text, and the digests of the documents in it.
_Piece = tuple[Sequence[str], Sequence[int]]


def _packed_pieces(texts: _Texts, tokenizer: PreTrainedTokenizerBase) -> Iterator[_Piece]:
    """One piece a document, led by the separator; or a single piece where the source joins its documents."""
    joiner = texts.source.joiner
    if joiner is not None:
        # At once, because tokens may cross the joints; with special tokens at the start only, as the papers do.
        kept = list(texts)
        if kept:
            yield [digest for _, digest in kept if digest], _tokenise(tokenizer, joiner.join(text for text, _ in kept))
        return
    separator = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    lead = [] if separator is None else [separator]
    for chunk in texts.chunks():
        batch = _tokenise(tokenizer, [text for text, _ in chunk], add_special_tokens=False)
        for (_, digest), ids in zip(chunk, batch, strict=True):
            yield [digest], lead + ids


def _document_pieces(texts: _Texts, tokenizer: PreTrainedTokenizerBase, seqlen: int) -> Iterator[_Piece]:
    for chunk in texts.chunks():
        batch = _tokenise(tokenizer, [text for text, _ in chunk], truncation=True, max_length=seqlen)
        for (_, digest), ids in zip(chunk, batch, strict=True):
            yield [digest], ids


def _tokenise(tokenizer: PreTrainedTokenizerBase, text: str | list[str], **options: Any) -> Any:
    """Token ids only. verbose=False: text longer than the model's context is the point here, not a mistake."""
    return tokenizer(text, return_attention_mask=False, return_token_type_ids=False, verbose=False, **options)["input_ids"]


@dataclass
class _Pool:
    """Windows in the order of the text, and which document reaches into which of them."""

    seqlen: int
    limit: int | None  # None: all
    windows: list[Tensor] = field(default_factory=list)
    reach: list[tuple[str, int, int]] = field(default_factory=list)  # digest, first and last window
    total: int = 0  # tokens seen

    def fill(self, pieces: Iterator[_Piece], task: Task) -> None:
        """Lay the pieces end to end and cut every `seqlen` tokens, until the limit or the end of the text."""
        rest = torch.empty(0, dtype=torch.int64)
        for digests, ids in pieces:
            if not ids:
                continue
            first, self.total = self.total // self.seqlen, self.total + len(ids)
            self.reach += [(digest, first, (self.total - 1) // self.seqlen) for digest in digests]
            flat = torch.cat([rest, torch.tensor(ids, dtype=torch.int64)])
            cut = len(flat) // self.seqlen * self.seqlen
            rest = flat[cut:].clone()
            if cut and self._add(flat[:cut].view(-1, self.seqlen).unbind(), task):
                return

    def fill_whole(self, pieces: Iterator[_Piece], task: Task) -> None:
        """Every piece of at least two tokens is a window (a single token predicts nothing)."""
        for digests, ids in pieces:
            if len(ids) < 2:
                continue
            at = len(self.windows)
            self.reach += [(digest, at, at) for digest in digests]
            self.total += len(ids)
            if self._add([torch.tensor(ids, dtype=torch.int64)], task):
                return

    def _add(self, windows: Sequence[Tensor], task: Task) -> bool:
        """Append as many as the limit allows; True once it is reached."""
        room = len(windows) if self.limit is None else self.limit - len(self.windows)
        self.windows += windows[:room]
        task.advance(min(room, len(windows)))
        return len(self.windows) == self.limit

    def digests_in(self, chosen: Sequence[int]) -> list[str]:
        """Digests of the documents that reach into the chosen windows, one entry a document."""
        wanted = set(chosen)
        return [digest for digest, first, last in self.reach if any(at in wanted for at in range(first, last + 1))]

    def windows_at(self, chosen: Sequence[int], *, source: str, mode: str, seed: int) -> Windows:
        # Cloned, because the windows of the pool are views into whole documents.
        tokens = tuple(self.windows[at].clone() for at in chosen)
        return Windows(
            tokens=tokens,
            source=source,
            seqlen=self.seqlen,
            mode=mode,
            seed=seed,
            documents=len(self.digests_in(chosen)),
            fingerprint=_fingerprint(tokens),
        )


def _fingerprint(tokens: Sequence[Tensor]) -> str:
    hashed = hashlib.sha256()
    closing = torch.tensor([-1])
    for window in tokens:
        hashed.update(torch.cat([window, closing]).numpy().astype("<i8").tobytes())
    return hashed.hexdigest()


def _check_count(function: str, name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{function}: expected {name} to be an integer, got {type(value).__name__}. Pass a whole number.")
    if value < least:
        raise ConfigError(f"{function}: expected {name} of at least {least}, got {value}. Raise --{name}.")
