"""Walking through a model one decoder block at a time, each block on the outputs of the pruned blocks before it.

What block k computes on a window is, by definition, what it computes in a forward pass of the whole model on that window. So the
model's own forward is what runs, for every window anew: it makes each block's side inputs (rotary tables, masks, per-layer
embeddings), whatever the family, and nothing of one window reaches another. To save time, blocks that the walk has passed do not run
again but hand on what they handed on the last time (`models/replay.py`). Whether a model can be walked so is tried at the start, on a
short window; where it cannot, every pass runs all blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .modes import evaluating
from .reading import read_as
from .replay import Pass, calls_of, can_be_replayed, run
from .states import WindowStates

PROBE = 64  # tokens of the window on which walking is tried
SKIPPED = (
    "layer-by-layer pruning: expected every decoder block to run in a forward pass, got {got}. "
    "Use --method magnitude or proxsparse for this architecture."
)


class BlockWalker:
    """Runs one decoder block after the other on all windows, in evaluation mode and without gradients.

    for index, block in walker:
        walker.forward(index)      # block `index` runs on all windows; hooks see its inputs
        ... change the block, and none before it ...

    replays: False where each pass has to run all blocks before the current one again.

    Args:
        model: called as model(input_ids=[1, tokens], use_cache=False). blocks: its decoder blocks.
        windows: token ids, int64 [tokens], at least one, on any device.
        memory: bytes of the GPU to keep within; None: all of it. Only where the states of the windows are kept depends on it.
    Raises: ModelError: a decoder block that a forward pass does not run.
    """

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, windows: Sequence[Tensor], *, memory: int | None = None) -> None:
        self._model, self._blocks = model, list(blocks)
        device = next(model.parameters()).device
        self._windows = [window.to(device) for window in windows]
        self._states = WindowStates([len(window) for window in windows], device, memory)
        self._done = -1  # the last block whose state is kept
        probe = self._windows[0][:PROBE]
        with evaluating(model), torch.no_grad():
            calls = calls_of(model, self._blocks, probe)
            if not set(self._blocks) <= set(calls):
                raise ModelError(SKIPPED.format(got=f"{len(set(calls))} of {len(self._blocks)}"))
            self._last_call = {block: position for position, block in enumerate(calls)}  # a looped model runs a block more than once
            self.replays = calls == self._blocks and len(self._last_call) == len(calls) and can_be_replayed(model, self._blocks, probe)

    def __iter__(self) -> Iterator[tuple[int, nn.Module]]:
        yield from enumerate(self._blocks)

    def forward(self, index: int) -> None:
        """Runs block `index` on all windows for the sake of hooks."""
        keep = index - 1 if self.replays else -1
        with evaluating(self._model), torch.no_grad():
            for position in range(len(self._windows)):
                passing = Pass(self._done, self._states.take(position, last=keep > self._done), keep, self._last_call[self._blocks[index]])
                self._states.fetch(position + 1)
                kept = self._run(position, passing)
                if kept is not None:
                    self._states.put(position, kept)
                del passing, kept  # a window's state is large, and the next one's is asked for at once
        self._done = max(self._done, keep)

    def reads(self, index: int, weights: Mapping[str, nn.Parameter]) -> set[str]:
        """Which of these weights the model computes with on the first window, by whatever path, until block `index` has run."""
        seen = set()

        def reader(name: str, weight: nn.Parameter) -> Tensor:
            seen.add(name)
            return weight

        readers = {weight: partial(reader, name) for name, weight in weights.items()}
        with evaluating(self._model), torch.no_grad(), read_as(self._model, readers):
            self._run(0, Pass(self._done, self._states.take(0), -1, self._last_call[self._blocks[index]]))
        return seen

    def _run(self, position: int, passing: Pass) -> Any:
        run(self._model, self._blocks, self._windows[position], passing)
        if not passing.ended:
            raise ModelError(SKIPPED.format(got="one that skips some in a window"))
        return passing.kept
