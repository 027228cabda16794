"""Models that are built with empty places where packed layers will be: their dense weights are never allocated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .linear import SparseLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHT = "weight"


class Slot(nn.Module):
    """Stands where a packed layer will be, with its bias alone.

    Its `weight` has the shape, the dtype and no memory, and belongs to no state dict: code that initialises a block through its layers'
    weights (`init.normal_(block.out_proj.weight)`) finds one, marked as transformers marks what is loaded already, and leaves it alone.
    """

    weight: Tensor
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight: Any = torch.empty_like(linear.weight, device="meta", requires_grad=False)
        self._is_hf_initialized = weight._is_hf_initialized = True
        self.weight = weight
        self.bias = linear.bias


def with_slots(kind: type[PreTrainedModel], groups: Sequence[Sequence[str]]) -> type[PreTrainedModel]:
    """The class `kind`, whose models have slots: nothing is allocated for their weights, looked for in files, initialised or tied.

    Args: groups: the modules of each packed weight, all that share it.
    """
    names = [name for group in groups for name in group]
    packed = {f"{name}.{WEIGHT}" for name in names}

    def __init__(self: Any, *arguments: Any, **options: Any) -> None:  # noqa: N807
        kind.__init__(self, *arguments, **options)
        for name in names:
            module = self.get_submodule(name)
            if not isinstance(module, Slot):  # by another name of the same module
                self.set_submodule(name, Slot(module))
        tied = getattr(self, "all_tied_weights_keys", None)
        if tied:
            self.all_tied_weights_keys = {key: source for key, source in tied.items() if packed.isdisjoint((key, source))}

    return type(kind.__name__, (kind,), {"__init__": __init__, "__module__": kind.__module__})


def fill_slots(
    model: nn.Module, names: Sequence[str], values: Tensor, metadata: Tensor, *, device: torch.device | str | None = None
) -> None:
    """Replace the slots of one packed weight by a packed layer: one for all that have the same bias."""
    made: dict[int, SparseLinear] = {}
    for name in names:
        slot = model.get_submodule(name)
        if isinstance(slot, SparseLinear):  # by another name of the same module
            continue
        bias: Any = slot.bias
        layer = made.get(id(bias))
        if layer is None:
            layer = made[id(bias)] = SparseLinear.from_packed(values, metadata, bias, device=device)
        model.set_submodule(name, layer)


def sharing(model: nn.Module) -> Mapping[str, list[str]]:
    """Parameter name -> the names of all modules that hold the parameter as their `weight`; one that is shared is found by each name."""
    holders: dict[int, list[str]] = {}
    for name, weight in _weights(model):
        holders.setdefault(id(weight), []).append(name)
    return {f"{name}.{WEIGHT}": holders[id(weight)] for name, weight in _weights(model)}


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, module in model.named_modules(remove_duplicate=False):
        weight = module._parameters.get(WEIGHT)
        if weight is not None:
            yield name, weight
