"""DTensors: the local part of a parameter, where it lies in the whole, and sums over the ranks that share it.

A DTensor can only exist once torch.distributed.tensor is imported, so nothing here imports it: torch builds without it work too.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..errors import ShapeError
from ..sparsity import BLOCK


def is_dtensor(x: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local(x: Tensor) -> Tensor:
    """The part of `x` on this rank, sharing its memory; `x` itself for a plain tensor."""
    part: Tensor = x.detach().to_local() if is_dtensor(x) else x.detach()  # type: ignore[attr-defined]
    return part


@dataclass(frozen=True)
class Part:
    """Where a rank's part of a parameter lies: counter of its first block's random bits, and its columns."""

    offset: int
    columns: slice


WHOLE = Part(0, slice(None))


def part_of(p: Tensor) -> Part:
    return _part(tuple(p.shape), p.device_mesh, tuple(p.placements)) if is_dtensor(p) else WHOLE  # type: ignore[attr-defined]


@lru_cache(maxsize=4096)
def _part(shape: tuple[int, ...], mesh: Any, placements: tuple[Any, ...]) -> Part:
    """Row shards are consecutive blocks of the tensor and draw the bits the whole would; other shards get counters of their own."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    local_shape, start = compute_local_shape_and_global_offset(shape, mesh, placements)
    columns = slice(start[-1], start[-1] + local_shape[-1])
    if all(placement.is_replicate() or placement.is_shard(0) for placement in placements) and len(shape) > 1:
        return Part(start[0] * math.prod(shape[1:]) // BLOCK, columns)
    coordinate, sizes = mesh.get_coordinate(), mesh.shape
    place = 0
    for dim, placement in enumerate(placements):
        if not placement.is_replicate():
            place = place * sizes[dim] + coordinate[dim]
    return Part(place * math.prod(shape) // BLOCK, columns)


def check_columns(function: str, name: str, p: Tensor) -> None:
    """ShapeError where a rank's columns are not whole blocks; raised by every rank alike."""
    if not is_dtensor(p):
        return
    last = p.dim() - 1
    ranks = math.prod(
        size
        for size, placement in zip(p.device_mesh.shape, p.placements, strict=True)  # type: ignore[attr-defined]
        if placement.is_shard(last)
    )
    columns = -(-p.shape[-1] // ranks)
    if columns % BLOCK:
        raise ShapeError(
            f"{function}: expected columns per rank divisible by {BLOCK} in {name}, got {columns} of {p.shape[-1]} on {ranks} ranks. "
            "Shard it by rows: Shard(0)."
        )


def zeros_like(p: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros of p's shape, sharded like it; contiguous."""
    return torch.zeros_like(p.detach(), dtype=dtype, memory_format=torch.contiguous_format)


def all_sum(rows: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """rows [parameters, ...]: each summed over the ranks that hold different parts of its parameter. No communication for plain tensors."""
    shared: dict[tuple[Any, tuple[int, ...]], list[int]] = {}
    for index, p in enumerate(parameters):
        if is_dtensor(p):
            dims = tuple(dim for dim, placement in enumerate(p.placements) if not placement.is_replicate())  # type: ignore[attr-defined]
            shared.setdefault((p.device_mesh, dims), []).append(index)  # type: ignore[attr-defined]
    if not shared:
        return rows
    separate = list(rows.unbind())  # not by indices, which would have to be sent to the device
    for (mesh, dims), indices in shared.items():
        part = torch.stack([separate[index] for index in indices])
        for dim in dims:
            torch.distributed.all_reduce(part, group=mesh.get_group(dim))
        for index, total in zip(indices, part.unbind(), strict=True):
            separate[index] = total
    return torch.stack(separate)
