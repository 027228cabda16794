"""`attach_prox`: the 2:4 prox after every step of any optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from ..errors import ConfigError, ShapeError
from ..ops import accumulate_frozen_penalty, prox_24
from ..ops.dispatch import check_floating, check_strength
from ..ops.sharded import align_gradient, all_sum, check_columns, local, part_of
from ..sparsity import BLOCK, check_width, count_24_blocks
from .initialisation import closure_of, only_makes_state
from .parameters import Handles, is_vector

FUNCTION = "attach_prox"
PRETRAINED = "proxsparse_pretrained"  # key of W0 in the optimizer's state


@dataclass(frozen=True)
class Place:
    """Where a weight is in the optimizer's groups, and its name for messages. Sharding a model replaces the weights, not their places."""

    name: str
    group: int
    position: int


@dataclass(frozen=True)
class Strengths:
    lambda1: float
    lambda2: float
    frozen_eps: float
    column_scale: Tensor | None


class AttachedProx(Handles):
    """What `attach_prox` returns."""

    def __init__(self, optimizer: Optimizer, places: Sequence[Place], strengths: Strengths) -> None:
        self._optimizer, self._places, self._strengths = optimizer, places, strengths
        self._stepped: list[Tensor] = []  # weights with a gradient in the step under way
        self._taken: dict[Tensor, Tensor] = {}  # their W0, if this is their first step
        self._idle = False
        handles = [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]
        if strengths.lambda2 > 0:
            handles.append(optimizer.register_load_state_dict_pre_hook(self._check_loaded))
        super().__init__(handles)

    def share_24(self) -> Tensor:
        """Share of 2:4 blocks over all attached weights, a scalar on their device; reads the weights once, no host sync."""
        weights = [w for _, w in self._weights()]
        counts = torch.stack([count_24_blocks(local(w)) for w in weights])
        return all_sum(counts, weights).sum() / max(sum(w.numel() // BLOCK for w in weights), 1)

    def _weights(self) -> list[tuple[Place, Tensor]]:
        groups = self._optimizer.param_groups
        return [(place, groups[place.group]["params"][place.position]) for place in self._places]

    # --- around a step ----------------------------------------------------------------------------------------------------------------

    def _before(self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if kwargs.get("grad_scaler") is not None:
            raise ConfigError(f"{FUNCTION}: expected an optimizer that gets unscaled gradients, got a GradScaler. Use another optimizer.")
        self._stepped, self._taken = [], {}
        closure, given = closure_of(args, kwargs)
        if closure is None:
            self._idle = given and only_makes_state(optimizer, [PRETRAINED])
            self._see_gradients()
            return None
        self._idle = False

        def evaluated() -> Any:
            loss = closure()
            self._see_gradients()
            return loss

        return ((args[0], evaluated, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": evaluated})

    @torch.no_grad()
    def _see_gradients(self) -> None:
        """Notes the weights that will be stepped, and adds the penalty's gradient to theirs."""
        found = [(place, w) for place, w in self._weights() if w.grad is not None]
        self._stepped = [w for _, w in found]
        for place, w in found if self._strengths.lambda2 > 0 else ():
            align_gradient(FUNCTION, place.name, w)
            self._add_penalty(place.name, w, self._pretrained(w))

    def _pretrained(self, w: Tensor) -> Tensor:
        known: Tensor | None = self._optimizer.state.get(w, {}).get(PRETRAINED)
        return self._taken.setdefault(w, w.detach().clone()) if known is None else known

    def _add_penalty(self, name: str, w: Tensor, w0: Tensor) -> None:
        lam, eps, gradient = self._strengths.lambda2, self._strengths.frozen_eps, local(w.grad)  # type: ignore[arg-type]
        scale: Tensor | None = getattr(self._optimizer, "grad_scale", None)
        if scale is None:
            accumulate_frozen_penalty(local(w), local(w0), lam, eps, gradient)
            return
        # GradScaler leaves it to this optimizer to unscale: what is added must be scaled too.
        if gradient.dtype == torch.float16:
            raise ConfigError(
                f"{FUNCTION}: expected fp32 or bf16 gradients beside a GradScaler and lambda2 > 0, got fp16 of {name}, where the scaled "
                "penalty overflows. Keep the weights in fp32, or use an optimizer without fused=True."
            )
        penalty = torch.zeros_like(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
        accumulate_frozen_penalty(local(w), local(w0), lam, eps, penalty)
        gradient.add_(penalty.mul_(scale.to(penalty.device)))

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> None:
        for w, w0 in self._taken.items():
            # Not before the step: optimizers know a first step by an empty state.
            optimizer.state[w][PRETRAINED] = w0
        if not self._idle:
            skipped = getattr(optimizer, "found_inf", None)
            for w in self._stepped:
                self._prox(w, skipped)
        self._stepped, self._taken = [], {}

    def _prox(self, w: Tensor, skipped: Tensor | None) -> None:
        """skipped: of a GradScaler whose optimizer skips steps itself: not 0 where it has, known to the device alone."""
        part, scale = local(w), self._strengths.column_scale
        columns = None if scale is None else scale[part_of(w).columns]
        if skipped is None:
            prox_24(part, self._strengths.lambda1, column_scale=columns, out=part)
        else:
            target = prox_24(part, self._strengths.lambda1, column_scale=columns)
            part.copy_(torch.where(torch.as_tensor(skipped, device=part.device) != 0, part, target))

    # --- state dicts ------------------------------------------------------------------------------------------------------------------

    def _check_loaded(self, optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
        """Refuses the state of a run under way without W0: the next step would take the half-learned weight for it."""
        groups, states = state_dict["param_groups"], state_dict["state"]
        for place, w in self._weights():
            if place.group >= len(groups) or place.position >= len(groups[place.group]["params"]):
                return  # torch says what does not fit
            saved, own = states.get(groups[place.group]["params"][place.position]), optimizer.state.get(w)
            # This optimizer may itself be in the middle of a run without W0: it was attached late, and has not stepped since.
            if saved and PRETRAINED not in saved and (not own or PRETRAINED in own):
                raise ConfigError(
                    f"{FUNCTION}: expected the pretrained value of {place.name} in the state dict ({PRETRAINED!r}) for lambda2 > 0, "
                    "got none. Attach after loading to take the loaded weights for it."
                )


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

    The gradient of lambda2 || w / (w0 + frozen_eps sgn(w0)) (w - w0) ||^2 is added to `.grad` when `step()` is called, or whenever its
    closure has been evaluated. Gradients clipped before that do not contain it (`ProxAdamW` clips the total), nor does the closure's loss.
    W0 is copied at a weight's first step. It is then part of the optimizer's state, under "proxsparse_pretrained", and of its state dict.

    A weight without a gradient is left alone, and so are all weights in steps that a GradScaler skips (the penalty is multiplied by its
    scale where an optimizer with `fused=True` unscales itself), and in the step with which torch.distributed.checkpoint makes the state of
    a fresh optimizer.

    Args:
        optimizer: of torch, or one that wraps it as `.optimizer` (accelerate, transformers' Trainer, Lightning).
        params: weights [..., in_features] of the optimizer, or (name, weight) pairs; fp32, fp16 or bf16, also sharded as DTensors.
            `prunable_parameters` finds those of a language model.
        lambda1: strength of the prox, used as it is (not multiplied by the learning rate).
        column_scale: [in_features] of every weight here, see `prox_24`; attach once for each scale.
    Returns: a handle with `.remove()` and `.share_24()`.
    Raises: TypeError, ShapeError: weights that have no blocks, named. ConfigError: strengths out of range, weights of another optimizer,
        L-BFGS with lambda2; at a step with lambda2: fp16 gradients that the optimizer unscales itself; at loading with lambda2: the state
        of a run under way without W0.
    """
    for name, value in (("lambda1", lambda1), ("lambda2", lambda2)):
        check_strength(FUNCTION, name, value)
    check_strength(FUNCTION, "frozen_eps", frozen_eps, positive=True)
    optimizer = stepping(optimizer)
    if lambda2 > 0 and isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError(f"{FUNCTION}: expected an optimizer that does not look at the loss for lambda2 > 0, got L-BFGS. Add the penalty.")
    places = _checked(optimizer, params, column_scale)
    return AttachedProx(optimizer, places, Strengths(lambda1, lambda2, frozen_eps, column_scale))


def stepping(optimizer: Any) -> Optimizer:
    """The optimizer whose `step()` runs hooks: of wrappers that have none of their own, the one inside."""

    def hooks(of: Any) -> Any:
        return getattr(of, "_optimizer_step_post_hooks", None)

    inner = getattr(optimizer, "optimizer", None)
    while isinstance(inner, Optimizer) and (hooks(optimizer) is None or hooks(optimizer) is hooks(inner)):
        optimizer, inner = inner, getattr(inner, "optimizer", None)
    if hooks(optimizer) is None:
        raise TypeError(
            f"{FUNCTION}: expected an optimizer of torch or one with it as .optimizer, got {type(optimizer).__name__}. "
            "Pass the optimizer that steps the weights."
        )
    found: Optimizer = optimizer
    return found


def _checked(optimizer: Optimizer, params: Iterable[Tensor | tuple[str, Tensor]], column_scale: Tensor | None) -> list[Place]:
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
        if is_vector(w):
            raise ShapeError(
                f"{FUNCTION}: expected weights [..., in_features], got shape {tuple(w.shape)} in {name}. "
                "Pass the weights to prune: prunable_parameters(model) finds them."
            )
        check_columns(FUNCTION, name, w)
        if column_scale is not None and tuple(column_scale.shape) != (w.shape[-1],):
            raise ShapeError(
                f"{FUNCTION}: expected column_scale of shape {(w.shape[-1],)} for {name}, got {tuple(column_scale.shape)}. "
                "Attach once for each scale."
            )
        places.append(Place(name, *known[w]))
    if not places:
        raise ConfigError(f"{FUNCTION}: expected at least one weight, got none. Pass the weights to prune.")
    return places
