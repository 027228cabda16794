"""A parameter with its place in the optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ..ops.sharded import local

OPTIMIZER = "ProxAdamW"


@dataclass(frozen=True)
class Parameter:
    """A parameter, its index over all groups, its name for messages and figures, and its group."""

    index: int
    name: str
    p: Tensor
    group: dict[str, Any]

    @property
    def gradient(self) -> Tensor:
        """This rank's part; only asked for where there is one."""
        return local(self.p.grad)  # type: ignore[arg-type]


def parameters_of(groups: Sequence[dict[str, Any]]) -> Iterator[Parameter]:
    index = 0
    for number in range(len(groups)):
        for position in range(len(groups[number]["params"])):
            yield parameter_at(groups, number, position, index)
            index += 1


def parameter_at(groups: Sequence[dict[str, Any]], number: int, position: int, index: int) -> Parameter:
    group: Mapping[str, Any] = groups[number]
    names = group.get("param_names")
    name = names[position] if names else f"parameter {position} of group {number}"
    return Parameter(index, name, group["params"][position], groups[number])


def is_vector(p: Tensor) -> bool:
    """Whether `p` is a norm or a bias, which has no blocks. FSDP1 hands out flat parts of matrices too, and marks them."""
    return p.dim() < 2 and not getattr(p, "_fsdp_flattened", False)


class Removable(Protocol):
    def remove(self) -> None: ...


class Handles:
    """Several hooks, removed together."""

    def __init__(self, handles: Sequence[Removable]) -> None:
        self._handles = handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
