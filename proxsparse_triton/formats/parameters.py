"""The weights of a model in memory under the names that masks have, whatever wraps, shards or offloads it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from ..errors import ModelError
from .shards import resolve_names

# Names that torch.compile, FSDP1, activation checkpointing and peft put inside a parameter's name; DDP and peft put some before it.
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"})


def find_parameters(function: str, model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """For every name that of the model's own parameter: the same, or the one that differs by wrappers or a leading prefix.

    Raises: ModelError: some have none, or several.
    """
    names = list(names)
    own = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    found = {name: name for name in set(own).intersection(names)}
    unwrapped = {_unwrapped(name): name for name in own}
    wanted = {name: _unwrapped(name) for name in names if name not in found}
    try:
        keys = resolve_names(function, wanted.values(), unwrapped)
    except ModelError:
        unknown = [name for name, short in wanted.items() if not _resolves(short, unwrapped)] or list(wanted)
        flat = any(name.endswith("_flat_param") for name in own)
        raise ModelError(
            f"{function}: expected names of the model's parameters, got {len(unknown)} unknown: {', '.join(unknown[:3])}. "
            + ("Call it inside FSDP.summon_full_params(model)." if flat else "Use the model that the masks were made for.")
        ) from None
    return found | {name: unwrapped[keys[short]] for name, short in wanted.items()}


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _resolves(name: str, keys: Iterable[str]) -> bool:
    try:
        return bool(resolve_names("", [name], keys))
    except ModelError:
        return False


def weight_in_memory(function: str, model: nn.Module, name: str) -> Tensor:
    """The tensor that holds a parameter's values, without its graph: of an offloaded one that from which accelerate loads it.

    Raises: ModelError: it is in no memory that could be written to.
    """
    parameter = model.get_parameter(name)
    if not parameter.is_meta:
        return parameter.detach()
    for key, stored in _offloaded(model, name):
        one, other = stored[key], stored[key]
        if one.data_ptr() == other.data_ptr() and not one.is_meta:
            kept: Tensor = one.detach()
            return kept
        raise ModelError(
            f"{function}: expected weights in memory, got {name} offloaded to disk. Load the model without offload, or prune its files."
        )
    raise ModelError(f"{function}: expected weights in memory, got {name} on the meta device, without values. Load the model first.")


def _offloaded(model: nn.Module, name: str) -> Iterator[tuple[str, Any]]:
    """Where accelerate's hooks keep the values of a parameter: its key, and a mapping that has it."""
    parts = name.split(".")
    for depth in reversed(range(len(parts))):
        hook = getattr(model.get_submodule(".".join(parts[:depth])), "_hf_hook", None)
        key = ".".join(parts[depth:])
        for one in getattr(hook, "hooks", [hook]):
            stored = getattr(one, "weights_map", None)
            try:
                if stored is not None and stored[key] is not None:
                    yield key, stored
            except KeyError:
                continue
