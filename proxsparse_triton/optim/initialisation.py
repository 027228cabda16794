"""The step by which torch.distributed.checkpoint makes the state of a fresh optimizer: it must not move a weight."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from ..ops.sharded import all_sum, local


def closure_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, bool]:
    """The closure of a call of `step`, and whether one was given, were it None. args: as a hook sees them, the optimizer first."""
    return (args[1], True) if len(args) > 1 else (kwargs.get("closure"), "closure" in kwargs)


def only_makes_state(optimizer: Optimizer, ours: Collection[str] = ()) -> bool:
    """Whether a step with closure=None is no step of learning: no state yet, a learning rate of 0 and zero gradients everywhere.

    torch.distributed.checkpoint.state_dict calls `step(closure=None)` so, since it moves no weight of an optimizer of torch. The prox is
    not multiplied by the learning rate and would. The first step of a warm-up has a learning rate of 0 too, but gradients, or is called
    without a closure. Waits for the device, in a first step at learning rate 0 only.

    Args: ours: keys of the state that the optimizer itself does not know.
    """
    if any(key not in ours for state in optimizer.state.values() for key in state):
        return False
    if not all(_is_zero(group.get("lr", 0.0)) for group in optimizer.param_groups):
        return False
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    gradients = [local(p.grad) for p in parameters]
    if not gradients or any(gradient.layout != torch.strided or gradient.is_meta for gradient in gradients):
        return False
    counts = torch.stack([gradient.count_nonzero().to(gradients[0].device) for gradient in gradients])
    return not all_sum(counts, parameters).any()  # of all ranks, that all decide alike


def _is_zero(lr: object) -> bool:
    """A learning rate on the device, which nobody may wait for, is none that torch has set to 0."""
    if isinstance(lr, Tensor):
        return lr.device.type == "cpu" and lr.item() == 0
    return lr == 0
