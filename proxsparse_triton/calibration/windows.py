"""Token windows for calibration and for measuring: packed, drawn with a seed, and recorded with a fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence, Set
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from ..errors import ConfigError, DataError, ShortTextError
from ..progress import SILENT, Progress
from .pool import Pool
from .sources import TextSource
from .tokens import Bos, Texts, document_pieces, packed_pieces, window_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Mode = Literal["packed", "documents"]
PAPERS = "joined by blank lines and cut into windows, as in the pruning papers"
PAPERS_BUT_BOS = (
    "joined by blank lines and cut into windows as in the pruning papers, but with a BOS in front of every window; "
    "the papers have at most one, before the first (--bos never)"
)
POOL_FACTOR = 5  # windows read for each one drawn: a draw over a longer stretch of text than the first few documents


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
    bos: tuple[
        int, ...
    ] = ()  # the tokens put in front of every window, which are counted in its length; none where the text is cut as it is
    protocol: str = ""  # how the windows of a corpus with a published protocol relate to it

    def described(self) -> str:
        """What was measured or learned from, for a table: text, count, length, and what stands in front."""
        in_front = ", each behind a BOS" if self.bos else ""
        return f"{len(self.tokens)} windows of {self.seqlen} tokens of {self.source}{in_front}"

    def record(self) -> dict[str, object]:
        """Everything but the tokens, for a run's record."""
        entry = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "tokens"}
        return {**entry, "windows": len(self.tokens)}


def calibration_windows(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    seqlen: int,
    seed: int = 42,
    mode: Mode = "packed",
    bos: Bos = "auto",
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
        bos: what stands in front of every window, counted in `seqlen`; `auto`: what the tokenizer puts before a text (`window_prefix`).
        exclude: digests of documents to leave out: those that are evaluated on.
    Returns: Windows, `samples` tensors.
    Raises: ConfigError: samples, seqlen, seed, mode or bos out of range. ShortTextError: the text is too short. DataError: unreadable.
    """
    _check_count("calibration_windows", "samples", samples, 1)
    _check_count("calibration_windows", "seqlen", seqlen, 2)
    _check_count("calibration_windows", "seed", seed, 0)
    if seed >= 2**63:
        raise ConfigError(f"calibration_windows: expected seed below 2^63, got {seed}. Choose a smaller one.")
    if mode not in get_args(Mode):
        raise ConfigError(f"calibration_windows: expected mode to be packed or documents, got {mode!r}. Choose one of them.")
    prefix = _checked_prefix("calibration_windows", tokenizer, bos, seqlen)
    pool = Pool(seqlen, POOL_FACTOR * samples, prefix)
    texts = Texts(source, exclude)
    with progress.task("tokenising", total=pool.limit) as task:
        if mode == "packed":
            pool.fill(packed_pieces(texts, tokenizer, prefix, seqlen), task)
        else:
            pool.fill_whole(document_pieces(texts, tokenizer, prefix, seqlen, bos), task)
    _tell(source, progress)
    excluded = "1 document" if texts.excluded == 1 else f"{texts.excluded} documents"
    they_are = "it is" if texts.excluded == 1 else "they are"
    if texts.excluded:
        progress.note(f"Left {excluded} of {source.name} out of calibration: {they_are} evaluated on.")
    if len(pool.windows) < samples:
        kind = f"windows of {seqlen} tokens" if mode == "packed" else "documents of two tokens or more"
        left_out = f" ({excluded} left out because {they_are} evaluated on)" if texts.excluded else ""
        raise ShortTextError(
            f"calibration_windows: expected {samples} {kind} from {source.name}, got {len(pool.windows)}{left_out}. "
            f"Lower --samples{' or --seqlen' if mode == 'packed' else ''}, or give more text."
        )
    order = torch.randperm(len(pool.windows), generator=torch.Generator().manual_seed(seed))[:samples].tolist()
    return _windows_at(pool, order, source, mode, seed)


def evaluation_windows(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    windows: int | None,
    seqlen: int,
    bos: Bos = "auto",
    progress: Progress = SILENT,
) -> tuple[Windows, frozenset[str]]:
    """The first `windows` packed windows in the order of the source (None: all), and the digests of the documents in them.

    Packing and `bos` are those of `calibration_windows`; a last incomplete window is dropped. Give the digests to `exclude` there.

    Raises: ConfigError: windows, seqlen or bos out of range. ShortTextError: fewer windows than asked, or not one. DataError: unreadable.
    """
    if windows is not None:
        _check_count("evaluation_windows", "windows", windows, 1)
    _check_count("evaluation_windows", "seqlen", seqlen, 2)
    prefix = _checked_prefix("evaluation_windows", tokenizer, bos, seqlen)
    pool = Pool(seqlen, windows, prefix)
    with progress.task("tokenising", total=windows) as task:
        pool.fill(packed_pieces(Texts(source), tokenizer, prefix, seqlen), task)
    _tell(source, progress)
    if len(pool.windows) < (windows or 1):
        asked = "at least one window" if windows is None else f"{windows} windows"
        lower = "--seqlen" if windows is None else "--windows or --seqlen"
        raise ShortTextError(
            f"evaluation_windows: expected {asked} of {seqlen} tokens from {source.name}, got {len(pool.windows)} from "
            f"{pool.total} tokens. Lower {lower}, or give more text."
        )
    every = range(len(pool.windows))
    return _windows_at(pool, every, source, "packed", 0), frozenset(pool.digests_in(every))


def check_ids(windows: Windows, rows: int | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise DataError where a window has a token that the model's embedding, of `rows` rows (None: not known), has no row for."""
    if rows is None:
        return
    for index, window in enumerate(windows.tokens, start=1):
        largest = int(window.max())
        if largest >= rows:
            token = tokenizer.convert_ids_to_tokens(largest)
            raise DataError(
                f"{windows.source}: expected token ids below {rows}, the rows of the model's embedding, got {largest} ({token!r}) "
                f"in window {index}. Use the tokenizer that the model came with, or other text."
            )


def _checked_prefix(function: str, tokenizer: PreTrainedTokenizerBase, bos: Bos, seqlen: int) -> tuple[int, ...]:
    if bos not in get_args(Bos):
        raise ConfigError(f"{function}: expected bos to be auto, always or never, got {bos!r}. Choose one of them.")
    prefix = window_prefix(tokenizer, bos)
    if seqlen <= len(prefix):
        raise ConfigError(f"{function}: expected seqlen above the {len(prefix)} tokens in front of a window, got {seqlen}. Raise --seqlen.")
    return prefix


def _tell(source: TextSource, progress: Progress) -> None:
    """What was left out of a text that was read."""
    for note in (*source.notes, f"{source.name}: {source.tally.note()}" if source.tally and source.tally.note() else ""):
        if note:
            progress.note(note)


def _windows_at(pool: Pool, chosen: Sequence[int], source: TextSource, mode: str, seed: int) -> Windows:
    # Cloned, because the windows of the pool are views into whole documents.
    tokens = tuple(pool.windows[at].clone() for at in chosen)
    protocol = ""
    if source.joiner is not None and mode == "packed":
        protocol = PAPERS if not pool.prefix else PAPERS_BUT_BOS
    return Windows(
        tokens=tokens,
        source=source.name,
        seqlen=pool.seqlen,
        mode=mode,
        seed=seed,
        documents=len(pool.digests_in(chosen)),
        fingerprint=_fingerprint(tokens),
        bos=pool.prefix,
        protocol=protocol,
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
