"""Loading a state dict bit for bit: torch casts floating state to the parameter's dtype, which would round fp32 moments of bf16 weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from ..errors import ConfigError
from .parameters import OPTIMIZER, Parameter
from .state import Precision, check_loaded


class AsSaved:
    """A saved state that passes through torch's casting as it is, since it is neither a tensor nor a container."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.state = state


def unwrap(saved: AsSaved, device: torch.device) -> dict[str, Any]:
    """A copy of the state on the parameter's device."""
    return {key: value.to(device, copy=True) if isinstance(value, Tensor) else value for key, value in saved.state.items()}


def check_and_wrap(items: Sequence[Parameter], precision: Precision) -> Callable[[Optimizer, dict[str, Any]], dict[str, Any]]:
    """A load-state-dict pre-hook: refuses a state dict that does not fit, and keeps the others from being cast."""

    def hook(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        saved = state_dict["param_groups"]
        _check_groups(optimizer.param_groups, saved)
        by_id = dict(zip([identity for group in saved for identity in group["params"]], items, strict=True))
        for identity, state in state_dict["state"].items():
            if state and identity in by_id:
                item = by_id[identity]
                check_loaded(item.name, item.p, state, precision if item.group["prox"] else None)
        return {**state_dict, "state": {identity: AsSaved(state) for identity, state in state_dict["state"].items()}}

    return hook


def _check_groups(groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> None:
    sizes, saved_sizes = ([len(group["params"]) for group in each] for each in (groups, saved))
    if sizes != saved_sizes:
        raise ConfigError(
            f"{OPTIMIZER}: expected a state dict with groups of {sizes} parameters, got {saved_sizes}. "
            "Build the optimizer as it was built then."
        )
    for number, (group, other) in enumerate(zip(groups, saved, strict=True)):
        if other.get("prox") != group["prox"]:
            actual = f"prox={other['prox']}" if "prox" in other else "the state of another optimizer"
            raise ConfigError(
                f"{OPTIMIZER}: expected a state dict with prox={group['prox']} in group {number}, got {actual}. "
                "Build the optimizer as it was built then."
            )
