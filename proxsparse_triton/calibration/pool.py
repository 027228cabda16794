"""Pieces of token ids to windows, in the order of the text, and which document reaches into which of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..progress import Task
from .tokens import Piece


@dataclass
class Reach:
    """A document and the first and last window that it has a token in."""

    digest: str
    first: int
    last: int


@dataclass
class Pool:
    """The first `limit` windows (None: all) of a text, each led by `prefix`; windows of `seqlen` tokens with it."""

    seqlen: int
    limit: int | None
    prefix: tuple[int, ...] = ()
    windows: list[Tensor] = field(default_factory=list)
    reach: list[Reach] = field(default_factory=list)
    total: int = 0  # tokens seen, without those of the prefix

    def fill(self, pieces: Iterator[Piece], task: Task) -> None:
        """Lay the pieces end to end and cut windows out of them, until the limit or the end of the text.

        Where the text itself has the prefix at the start of a window (between two documents) it is not put there again.
        """
        rest = torch.empty(0, dtype=torch.int64)
        cut = skip = 0
        for piece in pieces:
            skip = piece.skip or skip
            ids, skip = piece.ids[skip:], max(skip - len(piece.ids), 0)
            if not ids:
                self._reaches(piece, cut, cut)
                continue
            self.total += len(ids)
            first = cut
            windows, rest = self._cut(torch.cat([rest, torch.tensor(ids, dtype=torch.int64)]))
            cut += len(windows)
            self._reaches(piece, first, cut if len(rest) else cut - 1)
            if windows and self._add(windows, task):
                return

    def fill_whole(self, pieces: Iterator[Piece], task: Task) -> None:
        """Every piece of at least two tokens is a window (a single token predicts nothing)."""
        for piece in pieces:
            if len(piece.ids) < 2:
                continue
            at = len(self.windows)
            self._reaches(piece, at, at)
            self.total += len(piece.ids)
            if self._add([torch.tensor(piece.ids, dtype=torch.int64)], task):
                return

    def digests_in(self, chosen: Sequence[int]) -> list[str]:
        """Digests of the documents that reach into the chosen windows, one entry a document."""
        wanted = set(chosen)
        return [reach.digest for reach in self.reach if any(at in wanted for at in range(reach.first, reach.last + 1))]

    def _cut(self, flat: Tensor) -> tuple[list[Tensor], Tensor]:
        """The whole windows at the start of `flat`, and the tokens behind them."""
        front = torch.tensor(self.prefix, dtype=torch.int64)
        windows: list[Tensor] = []
        at = 0
        while True:
            there = bool(self.prefix) and torch.equal(flat[at : at + len(front)], front)
            end = at + self.seqlen - (0 if there else len(front))
            if end > len(flat):
                return windows, flat[at:].clone()
            window = flat[at:end]
            windows.append(window if there or not self.prefix else torch.cat([front, window]))
            at = end

    def _reaches(self, piece: Piece, first: int, last: int) -> None:
        if piece.goes_on and self.reach:
            self.reach[-1].last = last
        self.reach += [Reach(digest, first, last) for digest in piece.digests]

    def _add(self, windows: Sequence[Tensor], task: Task) -> bool:
        """Append as many as the limit allows; True once it is reached."""
        room = len(windows) if self.limit is None else self.limit - len(self.windows)
        self.windows += windows[:room]
        task.advance(min(room, len(windows)))
        return len(self.windows) == self.limit
