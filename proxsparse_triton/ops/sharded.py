"""DTensors: a rank's part of a tensor, where it lies in the whole, and sums over the ranks that share it.

Operations work on the parts: blocks of 4 never cross ranks as long as every rank holds whole blocks of columns. A DTensor can only
exist once torch.distributed.tensor is imported, so nothing here imports it first: torch builds without it work too.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, ShapeError
from ..sparsity import BLOCK


def is_dtensor(x: object) -> bool:
    if type(x) in (Tensor, nn.Parameter):  # most are, and torch.compile can trace this much
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local(x: Tensor) -> Tensor:
    """The part of `x` on this rank, sharing its memory; `x` itself for a plain tensor."""
    part: Tensor = x.detach().to_local() if is_dtensor(x) else x.detach()  # type: ignore[attr-defined]
    return part


def whole(x: Tensor) -> Tensor:
    """All of a DTensor, on every rank; `x` itself for a plain tensor."""
    return x.full_tensor() if is_dtensor(x) else x  # type: ignore[attr-defined]


def part_like(x: Tensor, p: Any) -> Tensor:
    """This rank's part of a plain tensor that all ranks have, cut as `p` is; `x` itself where `p` is plain."""
    if not is_dtensor(p):
        return x
    from torch.distributed.tensor import distribute_tensor

    return local(distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None))


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
    """ShapeError where some rank's columns are not whole blocks; raised by every rank alike."""
    if not is_dtensor(p):
        return
    widths, ranks = _widths(p.shape[-1], p.dim() - 1, p.device_mesh.shape, p.placements)  # type: ignore[attr-defined]
    broken = sorted(width for width in widths if width % BLOCK)
    if broken:
        raise ShapeError(
            f"{function}: expected columns per rank divisible by {BLOCK} in {name}, got {broken[-1]} of {p.shape[-1]} on {ranks} ranks. "
            "Shard it by rows: Shard(0)."
        )


def _widths(columns: int, last: int, mesh: Sequence[int], placements: Sequence[Any]) -> tuple[set[int], int]:
    """Columns of every rank, as each dimension of the mesh cuts by torch.chunk what the one before has left; into how many parts."""
    widths, parts = {columns}, 1
    for ranks, placement in zip(mesh, placements, strict=True):
        # A strided shard, which is no Shard, has a dim too; so have some partial sums.
        if not placement.is_partial() and getattr(placement, "dim", None) == last:
            widths = {part for width in widths for part in _parts(width, ranks, getattr(placement, "split_factor", 1))}
            parts *= ranks
    return widths, parts


def _parts(width: int, ranks: int, factor: int) -> set[int]:
    """Widths of the parts of `width` columns. A strided shard gets `factor` pieces from all over them: theirs, where they are uneven."""
    if factor > 1 and width % (ranks * factor * BLOCK) == 0:
        return {width // ranks}
    chunk = -(-width // (ranks * factor))
    return {max(0, min(chunk, width - chunk * rank)) for rank in range(ranks * factor)}


def check_shards(function: str, name: str, x: Any) -> None:
    """ConfigError or ShapeError unless an operation on blocks may work on each rank's part of a DTensor."""
    if any(placement.is_partial() for placement in x.placements):
        raise ConfigError(f"{function}: expected {name} sharded or replicated, got partial sums. Call .redistribute(...) on it first.")
    check_columns(function, name, x)


def check_sharded_alike(function: str, name: str, value: Any, x: Any) -> None:
    """ConfigError or ShapeError unless `value` is a DTensor cut as `x` is."""
    if not is_dtensor(value) or (value.device_mesh, value.placements) != (x.device_mesh, x.placements):
        actual = f"one with {value.placements}" if is_dtensor(value) else type(value).__name__
        raise ConfigError(
            f"{function}: expected {name} as a DTensor with the placements {x.placements}, got {actual}. "
            "Distribute it alike, or pass each rank's part, .to_local(), of all."
        )
    if value.shape != x.shape:
        raise ShapeError(f"{function}: expected {name} of shape {tuple(x.shape)}, got {tuple(value.shape)}. Pass matching tensors.")


def columns_of(function: str, scale: Any, x: Tensor) -> Tensor | None:
    """The entries of a column scale, [in_features], for this rank's columns of `x`."""
    if scale is None:
        return None
    if not isinstance(scale, Tensor):
        raise TypeError(f"{function}: expected a tensor for column_scale, got {type(scale).__name__}. Pass a torch.Tensor.")
    if tuple(scale.shape) != (x.shape[-1],):
        raise ShapeError(
            f"{function}: expected column_scale of shape {(x.shape[-1],)}, got {tuple(scale.shape)}. Pass one factor a column."
        )
    return whole(scale)[part_of(x).columns]


def sharded_like(part: Tensor, x: Any) -> Tensor:
    """The DTensor of x's shape and placements whose part on this rank is `part`."""
    from torch.distributed.tensor import DTensor

    strides = torch.empty(x.shape, device="meta").stride()
    result: Tensor = DTensor.from_local(part, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=strides)
    return result


def align_gradient(function: str, name: str, p: Any) -> None:
    """Brings `p.grad` to the placements of `p`: a backward pass may leave partial sums of the ranks to the one who reads it."""
    grad = p.grad
    if not is_dtensor(p) or (is_dtensor(grad) and grad.placements == p.placements):
        return
    if not is_dtensor(grad):
        raise TypeError(f"{function}: expected the gradient of {name} as a DTensor like it, got a plain tensor. Distribute it alike.")
    p.grad = grad.redistribute(placements=p.placements)


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
