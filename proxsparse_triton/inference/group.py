"""Layers that read the same input, multiplied in one launch: query, key and value; gate and up.

A `SparseGroup` holds their rows in one blob. Its members stand under the layers' names: the first one called with an input computes the
rows of all, the others take theirs from that result. It hangs on the input tensor itself, so that it lives no longer than that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from .linear import METADATA, VALUES, SparseLinear, autocast_on, load_problem

# Siblings under these names get the same input.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)

Stamp = tuple[int, int, int, bool] | None


# (group, stamp, y of all members for one input as it was at `stamp`, names of the members that have theirs). A plain tuple, and names
# instead of numbers: torch.compile has to write it to an input, and may make variables of numbers.
_Result = tuple["SparseGroup", Stamp, Tensor, tuple[str, ...]]


class SparseGroup(SparseLinear):
    """The rows of several layers as one. It is a child of the layers' parent, so that it moves with it, and has no state of its own."""

    slot: str
    counts: tuple[int, ...]
    generation: int  # of the weights

    @classmethod
    def of(cls, layers: Sequence[SparseLinear], slot: str) -> SparseGroup:
        """A group of the layers' rows, in this order; slot: the attribute of inputs that results hang on.

        The layers agree in in_features, dtype, device and whether they have a bias.
        """
        values = torch.cat([layer.layout.values(layer.packed) for layer in layers])
        metadata = torch.cat([layer.layout.linear_metadata(layer.packed) for layer in layers])
        biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        group = cls.from_packed(values, metadata, torch.cat(biases) if biases else None)
        group.slot, group.generation = slot, 0
        group.counts = tuple(layer.out_features for layer in layers)
        return group

    def members(self) -> list[GroupMember]:
        """The modules to put in the layers' places."""
        return [GroupMember(self, f"member {i}", sum(self.counts[:i]), count) for i, count in enumerate(self.counts)]

    def member_rows(self, x: Tensor, member: str, first: int, count: int) -> Tensor:
        """y [..., count] of one member."""
        if not self._shares(x):
            return self.rows(x, first, count, None if self.bias is None else self.bias[first : first + count])
        _, stamp, y, taken = self._result(x, member)
        taken = (*taken, member)
        setattr(x, self.slot, None if len(taken) == len(self.counts) else (self, stamp, y, taken))
        # An nn.Linear's output is contiguous, and models count on it. Of a single token the slice is already.
        return y[..., first : first + count].contiguous()

    def _shares(self, x: Tensor) -> bool:
        """Whether one result may serve all members: nobody differentiates it, and a change of x would be seen."""
        if torch.is_grad_enabled() and (x.requires_grad or (self.bias is not None and self.bias.requires_grad)):
            return False
        if autocast_on(x):
            return False
        return torch.compiler.is_dynamo_compiling() or not (torch.compiler.is_compiling() or x.is_inference())

    def _result(self, x: Tensor, member: str) -> _Result:
        """The result that x carries, if it is this group's, still right and new to this member; else a new one.

        A member gets its rows once: they are its own, and it may have written to them.
        """
        slot = self.slot
        result: _Result | None = None
        if torch.compiler.is_dynamo_compiling():
            from .traced import note, unchanged

            stamp: Stamp = None
            if unchanged(x, slot):
                result = getattr(x, slot)
        else:
            stamp = self._stamp(x)
            result = getattr(x, slot, None)
        if result is None or result[0] is not self or result[1] != stamp or member in result[3]:
            result = (self, stamp, self.rows(x, 0, self.out_features, self.bias), ())
            if torch.compiler.is_dynamo_compiling():
                note(x, slot)
        return result

    def _stamp(self, x: Tensor) -> Stamp:
        """Equal stamps: neither x nor the weights changed in between, and what one call computed the other can read."""
        if not x.is_cuda:
            return x._version, self.generation, 0, False
        stream = torch.cuda.current_stream(x.device).cuda_stream
        return x._version, self.generation, stream, torch.cuda.is_current_stream_capturing()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.generation += 1
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Nothing: the members save their rows."""

    def _load_from_state_dict(self, *arguments: Any) -> None:
        """Nothing: the members load their rows."""


class GroupMember(nn.Module):
    """One layer of a `SparseGroup`, to be used like a `SparseLinear`. It moves when its parent is moved, not by itself."""

    group: SparseGroup

    def __init__(self, group: SparseGroup, name: str, first: int, count: int) -> None:
        super().__init__()
        self.__dict__["group"] = group  # no child: it belongs to all members
        self.name, self.first, self.out_features = name, first, count

    @property
    def in_features(self) -> int:
        return self.group.in_features

    @property
    def weight(self) -> Tensor:
        """The dense weight, unpacked at every look."""
        return self.group.layout.dense(self.group.packed, self.first, self.out_features)

    @property
    def bias(self) -> Tensor | None:
        bias = self.group.bias
        return None if bias is None else bias[self.first : self.first + self.out_features]

    def forward(self, x: Tensor) -> Tensor:
        """As `SparseLinear.forward`."""
        return self.group.member_rows(x, self.name, self.first, self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, rows of {self.group.slot}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        layout, blob, end = self.group.layout, self.group.packed, self.first + self.out_features
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()
        destination[prefix + VALUES] = layout.values(blob)[self.first : end]
        destination[prefix + METADATA] = layout.linear_metadata(blob)[self.first : end].clone()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        group = self.group
        expected = [prefix + VALUES, prefix + METADATA, *([] if group.bias is None else [prefix + "bias"])]
        if strict:
            missing_keys.extend(key for key in expected if key not in state_dict)
            unexpected_keys.extend(key for key in state_dict if key.startswith(prefix) and key not in expected)
        if any(key not in state_dict for key in expected):
            return
        values, metadata, *bias = (state_dict[key].detach() for key in expected)
        if group.packed.is_meta and not values.is_meta and local_metadata.get("assign_to_params_buffers", False):
            group.to_empty(device=values.device)  # for all members, which then copy like this one
        problem = load_problem(group.layout, group.packed, self.out_features, values, metadata, assign=False)
        if not problem and bias and bias[0].shape != (self.out_features,):
            problem = f"expected a bias of shape ({self.out_features},), got {tuple(bias[0].shape)}. Load the weights of this layer."
        if problem:
            error_msgs.append(f"{prefix.removesuffix('.')}: {problem}")
            return
        group.generation += 1
        with torch.no_grad():
            group.layout.write(group.packed, self.first, values, metadata)
            if self.bias is not None:
                self.bias.copy_(bias[0])
