"""Forward and backward pass of a learning step, replayed as a CUDA graph where that pays: below a billion parameters a GPU computes faster
than Python can launch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .batches import Batch

EAGER = 3  # first steps: kernels are compiled and workspaces allocated, which a capture may not do
SHARE = 0.5  # of the GPU's memory that an eager step may reach: with larger models the arithmetic dominates, and memory is short


class Passes:
    """`passes(batch)` leaves the gradients of `loss_of(batch)` in `.grad` and returns the loss, without its autograd graph.

    From the fourth step on, batches of one shape without padding are replayed; all others, and passes that cannot be captured (they wait
    for the GPU, say to route tokens to experts), run as ever. A replay writes the gradients over those of the replay before.

    Args: parameters: all that the loss gives a gradient. capture: False runs everything as ever.
    """

    def __init__(self, loss_of: Callable[[Batch], Tensor], parameters: Iterable[nn.Parameter], *, capture: bool) -> None:
        self._loss_of, self._parameters = loss_of, list(parameters)
        self._capture, self._eager = capture, EAGER
        self._graph: torch.cuda.CUDAGraph | None = None
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []

    def __call__(self, batch: Batch) -> Tensor:
        if not self._capture or self._eager or batch.mask is not None:
            self._eager = max(0, self._eager - 1)
            return self._run(batch)
        if self._graph is None:
            self._record(batch)
        if self._graph is None or batch.tokens.shape != self._tokens.shape:
            return self._run(batch)
        self._tokens.copy_(batch.tokens)
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        self._graph.replay()
        return self._loss

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def _run(self, batch: Batch) -> Tensor:
        loss = self._loss_of(batch)
        loss.backward()
        return loss.detach()

    def _record(self, batch: Batch) -> None:
        device = batch.tokens.device
        if torch.cuda.max_memory_allocated(device) > SHARE * torch.cuda.get_device_properties(device).total_memory:
            self._capture = False
            return
        self._forget()
        self._tokens = batch.tokens.clone()
        random = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
        before = torch.Generator(device)
        before.set_state(random.get_state())
        graph = torch.cuda.CUDAGraph()
        here = torch.cuda.stream(torch.cuda.current_stream(device))  # comes back to it, which a capture that fails does not
        try:
            with here, torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._loss = self._run(Batch(self._tokens, None))
        except RuntimeError:
            self._capture = False
            self._forget()
            random.graphsafe_set_state(before.graphsafe_get_state())  # its own is that of a capture which never ended
            return
        self._graph = graph
        self._gradients = [(p, p.grad) for p in self._parameters if p.grad is not None]

    def _forget(self) -> None:
        """The first backward pass of a capture has to make its gradients itself: then they lie in the graph's memory."""
        for parameter in self._parameters:
            parameter.grad = None


@contextmanager
def one_text_a_window() -> Iterator[None]:
    """Spares transformers its look for several packed texts in a window, for which every forward pass would wait for the GPU. Learning
    windows have no position_ids of their own, so there is never anything to find."""
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    before = getattr(masking_utils, name, None)
    if before is None:  # transformers that does not look
        yield
        return
    setattr(masking_utils, name, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, name, before)
