"""The metadata of packed weights, and the orders in which the device libraries read it. Plain torch.

A nibble i0 | i1 << 2 a block, i0 < i1 the positions of its two kept weights. In linear order nibble j (bits 4 j to 4 j + 3) of the int16
word [row, c] is block 4 c + j of the row; a row ends on a whole word, filled up with positions 0 and 1.

The other orders permute the words of tiles of 64 x 32 (hopper) or 32 x 32 weights (ampere), and hopper also the nibbles of four words.
They are flat: a library's matrix has other rows than the weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ConfigError, ShapeError

WORD_BLOCKS = 4
WORD_WEIGHTS = 16
FIRST_TWO = 0b0100  # positions 0 and 1

# linear: as `pack_24` writes it. hopper: cuSPARSELt's on sm_90 (its compressed weight is the values and then this; read off 0.8.0).
# ampere: CUTLASS's for 16-bit weights on sm_80, that of torch's semi-structured tensors.
ORDERS = ("linear", "hopper", "ampere")

# An order splits the row into (tile, ...) and the word into (pair, 0 or 1), and stores the parts in another order, the slowest first.
_ROW_PARTS = {"hopper": (2, 2, 2, 8), "ampere": (2, 2, 8)}
_STORED = {"hopper": (0, 5, 1, 2, 4, 6, 3), "ampere": (4, 0, 3, 1, 5, 2)}


def row_words(in_features: int) -> int:
    """Words of metadata of a row."""
    return (in_features + WORD_WEIGHTS - 1) // WORD_WEIGHTS


def join_nibbles(nibbles: Tensor) -> Tensor:
    """int16 [rows, ceil(blocks / 4)] words of nibbles [rows, blocks]."""
    padded = torch.nn.functional.pad(nibbles, (0, -nibbles.shape[1] % WORD_BLOCKS), value=FIRST_TWO)
    shifts = torch.arange(0, 16, 4, dtype=torch.int16, device=nibbles.device)
    words: Tensor = (padded.to(torch.int16).unflatten(1, (-1, WORD_BLOCKS)) << shifts).sum(-1, dtype=torch.int16)
    return words


def split_words(metadata: Tensor, blocks: int) -> Tensor:
    """The nibbles of a row's blocks, int16 [rows, blocks], of words in linear order."""
    shifts = torch.arange(0, 16, 4, dtype=torch.int16, device=metadata.device)
    return (metadata[..., None] >> shifts & 15).flatten(1)[:, :blocks]


def descending(metadata: Tensor) -> tuple[int, int] | None:
    """(row, block) of the first nibble, in int16 [rows, words] of linear order, whose positions do not ascend; None where all do.

    Nibbles behind the end of a row are looked at too. A few operations on 16 blocks at once.
    """
    flat = metadata.flatten()
    wide = flat.view(torch.int64) if flat.numel() % 4 == 0 and flat.storage_offset() % 4 == 0 else flat
    ones = 0x1111_1111_1111_1111 if wide.dtype == torch.int64 else 0x1111
    low0, high0, low1, high1 = wide, wide >> 1, wide >> 2, wide >> 3  # the two bits of i0, and of i1, at the lowest of each nibble
    ascend = (high1 & ~high0) | (low1 & ~low0 & ~(high0 ^ high1))
    if bool((ascend & ones == ones).all()):
        return None
    nibbles = split_words(metadata, metadata.shape[-1] * WORD_BLOCKS)
    row, block = ((nibbles & 3) >= (nibbles >> 2)).nonzero()[0].tolist()
    return row, block


def reorder(metadata: Tensor, order: str) -> Tensor:
    """Linear metadata [out, in_features / 16] in the order of a library: int16 [out * in_features / 16]. No sync.

    Raises: TypeError: not int16. ConfigError: unknown order. ShapeError: not a matrix, or not of whole tiles.
    """
    _check("reorder", metadata, order)
    if metadata.dim() != 2:
        raise ShapeError(f"reorder: expected metadata [out, words], got shape {tuple(metadata.shape)}. Pass it as pack_24 returns it.")
    rows, words = metadata.shape
    if order == "linear":
        return metadata.flatten()
    parts = _parts("reorder", order, rows, words * WORD_WEIGHTS)
    stored = metadata.reshape(parts).permute(_STORED[order]).flatten()
    return _transpose_nibbles(stored) if order == "hopper" else stored


def restore(metadata: Tensor, order: str, shape: Sequence[int]) -> Tensor:
    """The inverse of `reorder`: linear metadata of a weight of `shape` = (out, in_features), of the words in `order`, whatever their shape.

    Raises: as `reorder`; ShapeError also for another number of words.
    """
    _check("restore", metadata, order)
    rows, in_features = shape
    words = row_words(in_features)
    if metadata.numel() != rows * words:
        raise ShapeError(
            f"restore: expected {rows * words} words for a weight of shape {(rows, in_features)}, got {metadata.numel()}. "
            "Pass the metadata of this weight alone."
        )
    if order == "linear":
        return metadata.reshape(rows, words)
    parts = _parts("restore", order, rows, in_features)
    stored = _transpose_nibbles(metadata.flatten()) if order == "hopper" else metadata
    slowest_first = _STORED[order]
    back = sorted(range(len(parts)), key=slowest_first.__getitem__)
    return stored.reshape([parts[i] for i in slowest_first]).permute(back).reshape(rows, words)


def _parts(function: str, order: str, rows: int, in_features: int) -> tuple[int, ...]:
    """The sizes of the parts of row and word."""
    row_parts = _ROW_PARTS[order]
    tile = math.prod(row_parts)
    if rows % tile or in_features % (2 * WORD_WEIGHTS):
        raise ShapeError(
            f"{function}: expected out divisible by {tile} and in_features by {2 * WORD_WEIGHTS} for the order {order!r}, "
            f"got shape {(rows, in_features)}. Keep this layer's metadata in linear order."
        )
    return (rows // tile, *row_parts, in_features // (2 * WORD_WEIGHTS), 2)


def _transpose_nibbles(words: Tensor) -> Tensor:
    """Every four words as a 4 x 4 matrix of nibbles, transposed; its own inverse."""
    x = words.clone().view(torch.int64)  # nibble n of word m from bit 16 m + 4 n on; a fresh tensor, since a view may start at any word
    # Swap what stands across the diagonal in every 2 x 2 nibbles, then the 2 x 2 across the diagonal of the whole.
    for distance, lower in ((12, 0x0000F0F00000F0F0), (24, 0x00000000FF00FF00)):
        swapped = (x ^ (x >> distance)) & lower
        x = x ^ swapped ^ (swapped << distance)
    return x.view(torch.int16)


def _check(function: str, metadata: Tensor, order: str) -> None:
    if order not in ORDERS:
        raise ConfigError(f"{function}: expected an order of {', '.join(ORDERS)}, got {order!r}. Choose by the library that reads it.")
    if metadata.dtype != torch.int16:
        raise TypeError(f"{function}: expected int16 metadata, got {metadata.dtype}. View the library's bytes as int16.")
