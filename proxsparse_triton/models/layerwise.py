"""Walking through a model one decoder block at a time, with the hidden states of all windows in hand.

Layer-by-layer methods prune block k on the outputs of the pruned blocks before it. The arguments that a block receives
beside its hidden states (rotary embeddings, masks) do not depend on the hidden states, so they are captured once per window length
from the model's own forward pass; this works for every family without knowing its signature.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError


class _CapturedError(Exception):
    """Ends a forward pass once the first block's input is in hand."""


class BlockWalker:
    """Holds the hidden states of all windows at the entrance of the current block.

    for index, block in walker:
        walker.forward(block)      # run block `index` on all windows; hooks see its inputs, outputs are dropped
        ... change the block ...
    On the next iteration the hidden states have passed through the changed block.
    """

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, windows: Sequence[Tensor]) -> None:
        self._blocks = blocks
        self._windows = [window.to(next(model.parameters()).device) for window in windows]
        self._arguments: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self._hidden: list[Tensor] = []
        with torch.no_grad():
            for window in self._windows:
                if len(window) not in self._arguments:
                    self._arguments[len(window)] = self._capture_arguments(model, window)
                self._hidden.append(self._capture_hidden(model, window))

    def __iter__(self) -> Iterator[tuple[int, nn.Module]]:
        for index, block in enumerate(self._blocks):
            yield index, block
            for position, hidden in enumerate(self._hidden):
                self._hidden[position] = self._run(index, block, hidden, len(self._windows[position]))

    def forward(self, index: int) -> None:
        """Runs block `index` on all windows for the sake of hooks."""
        for window, hidden in zip(self._windows, self._hidden, strict=True):
            self._run(index, self._blocks[index], hidden, len(window))

    def _run(self, index: int, block: nn.Module, hidden: Tensor, length: int) -> Tensor:
        args, kwargs = self._arguments[length][index]
        with torch.no_grad():
            out = block(hidden, *args, **kwargs)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def _capture_arguments(self, model: nn.Module, window: Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Extra arguments of every block for windows of this length."""
        captured: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

        def hook(index: int):  # type: ignore[no-untyped-def]
            def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
                captured[index] = (args[0 if "hidden_states" in kwargs else 1 :], rest)

            return capture

        handles = [block.register_forward_pre_hook(hook(index), with_kwargs=True) for index, block in enumerate(self._blocks)]
        try:
            model(input_ids=window[None], use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        if len(captured) != len(self._blocks):
            raise ModelError(
                "layer-by-layer pruning: expected every decoder block to run in a forward pass, "
                f"got {len(captured)} of {len(self._blocks)}. "
                "Use --method magnitude or proxsparse for this architecture."
            )
        return [captured[index] for index in range(len(self._blocks))]

    def _capture_hidden(self, model: nn.Module, window: Tensor) -> Tensor:
        """Hidden states at the entrance of the first block, [1, tokens, width]."""
        captured: list[Tensor] = []

        def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            captured.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
            raise _CapturedError

        handle = self._blocks[0].register_forward_pre_hook(capture, with_kwargs=True)
        try:
            model(input_ids=window[None], use_cache=False)
        except _CapturedError:
            pass
        finally:
            handle.remove()
        return captured[0]
