"""Train and eval mode for the length of a block, module by module: a caller may have put some of them into another mode than the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Eval mode inside the block (dropout off), train mode with `enabled` False; afterwards every module is in the mode it was in."""
    before = [(module, module.training) for module in model.modules()]
    model.train(not enabled)
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
