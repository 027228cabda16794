"""What one decoder block hands to the next, kept for every window: on the model's device while it fits there, else in host memory.

400 windows of 4096 tokens of a model 5120 wide are 33 GB in fp32. From host memory the next window's state is copied to the device
while the model works on the one before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

SHARE = 0.5  # of the free memory of a GPU; the rest is for a block's activations and for what is gathered of its inputs


class Copies(Protocol):
    """Moves trees of tensors between a device and host memory without waiting for the copies."""

    def out(self, tree: Any, buffers: Any) -> Any:
        """`tree` in host memory; into `buffers`, what an earlier call returned, where the shapes are those. The caller drops `tree`."""

    def into(self, tree: Any) -> Any:
        """A copy on the device, whole after the next `wait`."""

    def wait(self) -> None:
        """What is computed from now on sees all copies that have been asked for."""


class WindowStates:
    """A tree of tensors (tuples, lists, dicts) for each window. What is taken is the caller's own: a model may write into its inputs.

    Args:
        tokens: length of each window, by which the size of all states is foretold from the first.
        device: the model's.
        memory: bytes of the device to keep within; None: all of it.
        copies: what moves states to host memory and back, which then is where all of them are; None: decided by the device's free memory.
    """

    def __init__(self, tokens: Sequence[int], device: torch.device, memory: int | None = None, copies: Copies | None = None) -> None:
        self._tokens, self._device, self._memory = tokens, device, memory
        self._trees: list[Any] = [None] * len(tokens)
        self._copies, self._decided = copies, copies is not None or device.type != "cuda"
        self._ahead: dict[int, Any] = {}

    @property
    def on_host(self) -> bool:
        """Whether the states of a model on a GPU are in host memory."""
        return self._copies is not None

    def put(self, position: int, tree: Any) -> None:
        """Takes over the state of a window: nobody else may write into its tensors."""
        if not self._decided:
            self._copies, self._decided = self._choose(tree, self._tokens[position]), True
        self._trees[position] = tree if self._copies is None else self._copies.out(tree, self._trees[position])

    def fetch(self, position: int) -> None:
        """Begins to bring a window's state to the device; nothing to do where it is there, or where there is none."""
        if self._copies is not None and position < len(self._trees) and self._trees[position] is not None:
            self._ahead[position] = self._copies.into(self._trees[position])

    def take(self, position: int, *, last: bool = False) -> Any:
        """The state of a window; None before the first `put`. last: it is asked for the last time before another is put."""
        if self._copies is None:
            tree = self._trees[position]
            if last:
                self._trees[position] = None
            return tree if last else tensors_mapped(torch.clone, tree)
        if position not in self._ahead:
            self.fetch(position)
        tree = self._ahead.pop(position, None)
        self._copies.wait()
        return tree

    def _choose(self, tree: Any, tokens: int) -> Copies | None:
        size = sum(leaf.nbytes for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor))
        return (
            None if size * sum(self._tokens) / max(tokens, 1) <= SHARE * _free(self._device, self._memory) else StreamCopies(self._device)
        )


class StreamCopies:
    """Copies to pinned memory and back on a stream of their own, beside the computation."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._last: torch.cuda.Event | None = None

    def out(self, tree: Any, buffers: Any) -> Any:
        leaves, spec = tree_flatten(tree)
        old = [] if buffers is None else tree_flatten(buffers)[0]
        if len(old) != len(leaves):
            old = [None] * len(leaves)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            hosts = [self._out(leaf, buffer) if self._moves(leaf) else leaf for leaf, buffer in zip(leaves, old, strict=True)]
        if self._last is not None:  # the host runs ahead of the device by no more than a window, or copies under way would pile up
            self._last.synchronize()
        self._last = self._stream.record_event()
        return tree_unflatten(hosts, spec)

    def into(self, tree: Any) -> Any:
        here = torch.cuda.current_stream(self._device)
        return tensors_mapped(lambda host: self._into(host, here), tree)

    def wait(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _moves(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.device == self._device

    def _out(self, tensor: Tensor, buffer: Any) -> Tensor:
        fits = isinstance(buffer, Tensor) and buffer.shape == tensor.shape and buffer.dtype == tensor.dtype and buffer.is_pinned()
        host: Tensor = buffer if fits else torch.empty_like(tensor, device="cpu", pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)  # its memory is given out again only after the copy
        return host

    def _into(self, host: Tensor, here: torch.cuda.Stream) -> Tensor:
        if not host.is_pinned():  # never left its device
            return host.clone()
        tensor = torch.empty_like(host, device=self._device)
        self._stream.wait_stream(here)  # whose earlier work may still use this memory
        with torch.cuda.stream(self._stream):
            tensor.copy_(host, non_blocking=True)
        return tensor


def tensors_mapped(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """`tree` with `function` of every tensor."""
    return tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def _free(device: torch.device, memory: int | None) -> float:
    """Bytes that can still be allocated on a GPU, within `memory` where that is given."""
    allocated = torch.cuda.memory_allocated(device)
    unused = torch.cuda.memory_reserved(device) - allocated  # by the caching allocator
    return min(torch.cuda.mem_get_info(device)[0] + unused, math.inf if memory is None else memory - allocated)
