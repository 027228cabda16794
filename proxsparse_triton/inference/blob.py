"""The one copy of a packed weight in memory: its values and then its metadata, in the order of the device's library, as bytes.

cuSPARSELt reads the whole, CUTLASS and our kernel read views. Bytes, because `module.half()` and the like cast only floats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.pack import unpack_24
from ..reference.metadata import reorder, restore, row_words
from ..sparsity import BLOCK, KEPT
from .library import order_for

ALIGNMENT = 16  # bytes: where the metadata begins
TILE_ROWS = 64  # of the hopper order, which stores tiles of this many rows one after the other


class Parts(NamedTuple):
    """values [rows, in / 2]; metadata: flat in `order`, or [rows, words] where that is linear."""

    values: Tensor
    metadata: Tensor
    order: str


@dataclass(frozen=True)
class Layout:
    """What the bytes of a blob are: a weight [out_features, in_features] of `dtype`, its metadata in `order`."""

    out_features: int
    in_features: int
    dtype: torch.dtype
    order: str

    @property
    def metadata_offset(self) -> int:
        used = self.out_features * (self.in_features // BLOCK * KEPT) * self.dtype.itemsize
        return -(-used // ALIGNMENT) * ALIGNMENT

    @property
    def nbytes(self) -> int:
        return self.metadata_offset + self.out_features * row_words(self.in_features) * torch.int16.itemsize

    def values(self, blob: Tensor) -> Tensor:
        """[out, in / 2]: a view."""
        kept = self.in_features // BLOCK * KEPT
        return blob[: self.out_features * kept * self.dtype.itemsize].view(self.dtype).view(self.out_features, kept)

    def metadata(self, blob: Tensor) -> Tensor:
        """Flat, in the blob's order: a view."""
        return blob[self.metadata_offset :].view(torch.int16)

    def linear_metadata(self, blob: Tensor) -> Tensor:
        """[out, words] as `pack_24` writes it; a view where the order is linear."""
        return restore(self.metadata(blob), self.order, (self.out_features, self.in_features))

    def parts(self, blob: Tensor, first: int, rows: int) -> Parts:
        """Rows of the weight for our kernel: views, wherever the order allows."""
        values = self.values(blob)[first : first + rows]
        if self.order == "linear":
            return Parts(values, self.metadata(blob).view(self.out_features, -1)[first : first + rows], "linear")
        if rows == self.out_features:
            return Parts(values, self.metadata(blob), self.order)
        if self.order == "hopper" and first % TILE_ROWS == 0 and rows % TILE_ROWS == 0:
            words = row_words(self.in_features)
            return Parts(values, self.metadata(blob)[first * words : (first + rows) * words], "hopper")
        return Parts(values, self.linear_metadata(blob)[first : first + rows], "linear")

    def addresses(self, blob: Tensor, first: int, rows: int) -> tuple[int, int] | None:
        """Where the values and the metadata of rows begin, at multiples of 16 bytes: views cost the host as much as a launch. None where
        they lie elsewhere, or are no part of the blob in its order.
        """
        if rows != self.out_features and self.order != "linear" and (self.order != "hopper" or first % TILE_ROWS or rows % TILE_ROWS):
            return None
        values = blob.data_ptr() + first * self.in_features * self.dtype.itemsize // 2
        metadata = blob.data_ptr() + self.metadata_offset + first * row_words(self.in_features) * torch.int16.itemsize
        return None if values % ALIGNMENT or metadata % ALIGNMENT else (values, metadata)

    def dense(self, blob: Tensor, first: int, rows: int) -> Tensor:
        """Rows of the weight, unpacked: [rows, in]."""
        values, metadata, order = self.parts(blob, first, rows)
        shape = (rows, self.in_features)
        return unpack_24(values, restore(metadata, order, shape), shape)

    def write(self, blob: Tensor, first: int, values: Tensor, metadata: Tensor) -> None:
        """Overwrite rows of the weight from `first` on, in place; metadata linear."""
        rows = values.shape[0]
        self.values(blob)[first : first + rows].copy_(values)
        own = self.parts(blob, first, rows)
        if own.order == self.order:  # views
            own.metadata.view(-1).copy_(reorder(metadata.to(blob.device), own.order))
        else:
            whole = self.linear_metadata(blob)
            whole[first : first + rows] = metadata.to(blob.device)
            self.metadata(blob).copy_(reorder(whole, self.order))

    def on(self, device: torch.device, dtype: torch.dtype) -> Layout:
        """The same weight on a device, in a dtype."""
        order = order_for(device, dtype, self.out_features, self.in_features)
        return Layout(self.out_features, self.in_features, dtype, order)

    def convert(self, blob: Tensor, dtype: torch.dtype) -> tuple[Layout, Tensor]:
        """The layout and the blob of this weight in a dtype, on the device where the blob now is; the blob itself if nothing changes."""
        layout = self.on(blob.device, dtype)
        return (layout, blob) if layout == self else (layout, layout.join(self.values(blob), self.linear_metadata(blob)))

    def join(self, values: Tensor, metadata: Tensor) -> Tensor:
        """A new blob of values (cast to the dtype) and linear metadata, on values' device."""
        blob = torch.zeros(self.nbytes, dtype=torch.uint8, device=values.device)  # zeros: the gap before the metadata is written to no file
        self.values(blob).copy_(values)
        self.metadata(blob).copy_(reorder(metadata, self.order))
        return blob
