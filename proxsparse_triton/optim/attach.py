"""`attach_prox`: the 2:4 prox after every step of any optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from ..errors import ConfigError, ShapeError
from ..ops import accumulate_frozen_penalty, prox_24
from ..ops.dispatch import check_floating, check_strength
from ..sparsity import BLOCK, check_width, count_24_blocks
from .distributed import all_sum, check_columns, local, part_of
from .parameters import Handles, Removable

FUNCTION = "attach_prox"


def weights_at(optimizer: Optimizer, places: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Looked up at every step: sharding a model replaces the optimizer's parameters."""
    return [optimizer.param_groups[i]["params"][j] for i, j in places]


class AttachedProx(Handles):
    """What `attach_prox` returns."""

    def __init__(self, handles: Sequence[Removable], optimizer: Optimizer, places: Sequence[tuple[int, int]]) -> None:
        super().__init__(handles)
        self._optimizer, self._places = optimizer, places

    def share_24(self) -> Tensor:
        """Share of 2:4 blocks over all attached weights, a scalar on their device; reads the weights once, no host sync."""
        weights = weights_at(self._optimizer, self._places)
        counts = torch.stack([count_24_blocks(local(w)) for w in weights])
        return all_sum(counts, weights).sum() / max(sum(w.numel() // BLOCK for w in weights), 1)


def attach_prox(
    optimizer: Optimizer,
    params: Iterable[Tensor | tuple[str, Tensor]],
    lambda1: float,
    *,
    lambda2: float = 0.0,
    frozen_eps: float = 0.1,
    column_scale: Tensor | None = None,
) -> AttachedProx:
    """Turns any optimizer's `step()` into a ProxSparse step: w <- prox_lambda1(w) after it, the frozen penalty's gradient before it.

    The gradient of lambda2 || w / (w0 + frozen_eps sgn(w0)) (w - w0) ||^2 is added to `.grad` when `step()` is called; W0 is copied
    the first time. Gradients clipped before that do not contain it (`ProxAdamW` clips the total).

    Args:
        params: weights [..., in_features] of the optimizer, or (name, weight) pairs; fp32, fp16 or bf16, also sharded as DTensors.
        lambda1: strength of the prox, used as it is (not multiplied by the learning rate).
        column_scale: [in_features] of every weight here, see `prox_24`; attach once for each scale.
    Returns: a handle with `.remove()` and `.share_24()`.
    Raises: TypeError, ShapeError: weights that have no blocks, named. ConfigError: strengths out of range, weights of another optimizer;
        at a step with lambda2: a closure, which computes the gradient too late.
    """
    for name, value in (("lambda1", lambda1), ("lambda2", lambda2)):
        check_strength(FUNCTION, name, value)
    check_strength(FUNCTION, "frozen_eps", frozen_eps, positive=True)
    places = _checked(optimizer, params, column_scale)
    pretrained: dict[tuple[int, int], Tensor] = {}

    @torch.no_grad()
    def before(_: Optimizer, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        # The optimizer itself is the first of the arguments.
        if len(args) > 1 or kwargs.get("closure") is not None:
            raise ConfigError(f"{FUNCTION}: expected step() without a closure for lambda2 > 0, got one. Run backward before step().")
        for place, w in zip(places, weights_at(optimizer, places), strict=True):
            if place not in pretrained:
                pretrained[place] = local(w).clone()
            if w.grad is not None:
                accumulate_frozen_penalty(local(w), pretrained[place], lambda2, frozen_eps, local(w.grad))

    @torch.no_grad()
    def after(_: Optimizer, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        for w in weights_at(optimizer, places):
            prox_24(local(w), lambda1, column_scale=None if column_scale is None else column_scale[part_of(w).columns], out=local(w))

    handles: list[Removable] = [optimizer.register_step_post_hook(after)]
    if lambda2 > 0:
        handles.append(optimizer.register_step_pre_hook(before))
    return AttachedProx(handles, optimizer, places)


def _checked(optimizer: Optimizer, params: Iterable[Tensor | tuple[str, Tensor]], column_scale: Tensor | None) -> list[tuple[int, int]]:
    """Where the weights are in the optimizer's groups."""
    if isinstance(params, Tensor):
        raise TypeError(f"{FUNCTION}: expected a list of weights, got one tensor. Pass [weight].")
    known = {p: (i, j) for i, group in enumerate(optimizer.param_groups) for j, p in enumerate(group["params"])}
    places = []
    for number, entry in enumerate(params):
        name, w = entry if isinstance(entry, tuple) else (f"parameter {number}", entry)
        check_floating(FUNCTION, name, w)
        if w not in known:
            raise ConfigError(f"{FUNCTION}: expected weights of this optimizer, got {name} that is none. Add it to the optimizer first.")
        check_width(f"{FUNCTION}: {name}", w.shape)
        check_columns(FUNCTION, name, w)
        if column_scale is not None and tuple(column_scale.shape) != (w.shape[-1],):
            raise ShapeError(
                f"{FUNCTION}: expected column_scale of shape {(w.shape[-1],)} for {name}, got {tuple(column_scale.shape)}. "
                "Attach once for each scale."
            )
        places.append(known[w])
    if not places:
        raise ConfigError(f"{FUNCTION}: expected at least one weight, got none. Pass the weights to prune.")
    return places
